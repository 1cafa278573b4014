"""experiments.quantize in this process, on a checkpoint of bytes."""

import json

import loaded_case
import sweep_case

from experiments import quantize

TOKENS = 401
TIMED = ("tokens_per_second", "times_none")
QUICK = (f"--tokens={TOKENS}", "--prompt=4", "--new=5", "--rounds=2", "--seconds=0")


def call(*args):
  return sweep_case.run(*args, script=quantize, check=quantize.check)


def rows(out):
  return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def fixed(out):
  """The rows that no clock has touched."""
  return [row for row in rows(out) if row["metric"] not in TIMED]


def save(root):
  """(a directory of a model of bytes, a text as a file), below root."""
  loaded_case.save(root / "model", loaded_case.config(), seed=2)
  (root / "text.txt").write_text(loaded_case.text(20))
  return root / "model", root / "text.txt"
