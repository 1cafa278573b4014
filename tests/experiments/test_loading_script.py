"""experiments.loading: a line for each mesh, both sides read, and what it wrote is removed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import loading
from jaxllm import hf, tree

ROOT = Path(__file__).parents[2]


def run(*flags, **env):
  env = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"} | env
  call = [sys.executable, "-m", "experiments.loading", *flags]
  return subprocess.run(call, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def check(out, model, meshes):
  """The rows of results.jsonl: of each mesh all numbers, as they have to be for a model far smaller than the interpreter."""
  rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
  assert [row["mesh"] for row in rows[::6]] == meshes and len(rows) == 6 * len(meshes)
  for start in range(0, len(rows), 6):
    found = {row["metric"]: row["value"] for row in rows[start : start + 6]}
    assert {(row["model"], row["dtype"], row["status"]) for row in rows[start : start + 6]} == {
      (model, "float32", "ok")
    }
    assert found["speed_ratio"] == pytest.approx(found["safetensors_seconds"] / found["seconds"])
    assert found["parameter_bytes"] == 4 * PARAMETERS
    assert found["bar_bytes"] == pytest.approx(1.15 * 4 * PARAMETERS + 4 * 320 * 64)
    assert found["peak_bytes"] > 20e6


# of the tiny Llama: embedding and head; norms; q, k, v, o; MLP
PARAMETERS = 2 * 320 * 64 + 7 * 64 + 3 * (64 * 64 * 2 + 64 * 32 * 2) + 3 * 3 * 64 * 128


@pytest.fixture
def model(tmp_path, monkeypatch):
  """The tiny Llama as this project writes it, where there is no transformers."""
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  loading.make(str(tmp_path / "model"), "tiny", "float32")
  monkeypatch.undo()
  return tmp_path / "model"


def test_any_checkpoint(model, tmp_path):
  cfg, params = hf.load(model)
  assert (cfg.num_layers, cfg.num_kv_heads, cfg.dtype, tree.num_parameters(params)) == (
    3,
    4,
    "float32",
    PARAMETERS,
  )
  done = run("--smoke", f"--model={model}", f"--out={tmp_path / 'out'}")
  assert done.returncode == 0, done.stderr
  assert [line.split("|")[1:3] for line in done.stdout.splitlines() if "| float32 |" in line] == [
    [" float32 ", " none "],
    [" float32 ", " fsdp=8 "],
  ]
  check(tmp_path / "out", str(model), ["none", "fsdp=8"])
  assert (model / "model.safetensors").exists()


@pytest.mark.slow
def test_the_random_model_of_transformers(tmp_path):
  pytest.importorskip("transformers", minversion="5.0")
  (tmp_path / "work").mkdir()
  done = run("--smoke", f"--work={tmp_path / 'work'}", f"--out={tmp_path / 'out'}")
  assert done.returncode == 0, done.stderr
  check(tmp_path / "out", "tiny", ["none", "fsdp=8"])
  assert not list((tmp_path / "work").iterdir())


def test_bad_flags():
  for flag, words in (
    ("--model=gone", "no such directory"),
    ("--dtypes=int8", "'int8'"),
    ("--meshes= ", "--meshes= "),
  ):
    done = run(flag)
    assert done.returncode == 2 and words in done.stderr
