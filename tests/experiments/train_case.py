"""Runs of experiments.train in this process, on a text of some kilobytes."""

import json

import loaded_case
import sweep_case
from absl.testing import flagsaver

from experiments import train
from experiments.training import settings

QUICK = ("--smoke", "--steps=12", "--length=16", "--save_every=6", "--eval_every=6", "--log_every=3")


def call(*args):
  return sweep_case.run(*args, script=train, check=settings.read)


def settings_of(*args):
  """The settings that flags make."""
  saved = flagsaver.save_flag_values(train.FLAGS)
  try:
    train.FLAGS(["train", *args])
    return settings.read(train.FLAGS)
  finally:
    flagsaver.restore_flag_values(saved, train.FLAGS)


def write_text(directory):
  """A file of lines."""
  path = directory / "text.txt"
  path.write_text(loaded_case.text(100))
  return path


def rows(out, name="metrics.jsonl"):
  return [json.loads(line) for line in (out / name).read_text().splitlines()]


def learned(out):
  """The rows of metrics without what a clock has touched."""
  timed = ("tokens_per_second", "mfu", "hfu")
  return [{name: value for name, value in row.items() if name not in timed} for row in rows(out)]
