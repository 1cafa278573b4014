"""experiments.loading: a line for each mesh, both sides read, and what it wrote is removed."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from absl.testing import flagsaver

from experiments import loading
from jaxllm import hf, tree
from jaxllm.study import run_app

ROOT = Path(__file__).parents[2]


def run(*flags, **env):
  env = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"} | env
  call = [sys.executable, "-m", "experiments.loading", *flags]
  return subprocess.run(call, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def check(out, model, meshes):
  """The rows of results.jsonl: of each mesh all numbers, as they have to be for a model far smaller than the interpreter."""
  rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
  assert [row["mesh"] for row in rows[::7]] == meshes and len(rows) == 7 * len(meshes)
  for start in range(0, len(rows), 7):
    found = {row["metric"]: row["value"] for row in rows[start : start + 7]}
    assert {(row["model"], row["dtype"], row["status"]) for row in rows[start : start + 7]} == {
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


SECOND_COPY = """
from jaxllm.hf import scan
kept, copy = [], scan.copy
def twice(view, dtype, out=None):
  kept.append(copy(view, dtype)[0])
  return copy(view, dtype, out)
scan.copy = twice
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is told by /proc")
@pytest.mark.parametrize("before", ["", SECOND_COPY], ids=["as it is", "a loader that keeps a second copy"])
def test_the_memory_of_a_load(tmp_path, monkeypatch, before):
  """The bar, for real, of 103 MB; speed is not judged, where other tests run beside."""
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  loading.make(str(tmp_path / "model"), "small", "float32")
  monkeypatch.undo()
  found = loading.measure(str(tmp_path / "model"), "none", 1, before)
  assert found["parameter_bytes"] > loading.MEMORY_FROM
  used = loading.used_bytes(found)
  assert used > found["parameter_bytes"]  # all of them were seen
  problems = loading.missed(found)
  assert len(problems) == (1 if before else 0), (problems, found)


@pytest.mark.parametrize(
  "change, words",
  [
    ({}, None),
    ({"speed_ratio": 0.49}, "speed 0.49 of safetensors, expected at least 0.5"),
    ({"peak_bytes": 1_360_000_001}, "memory 1.260 GB beyond the imports, expected at most 1.260 GB"),
    ({"peak_bytes": None}, None),
    ({"speed_ratio": 0.1, "parameter_bytes": 10**9 - 1}, None),
    ({"peak_bytes": 10**10, "parameter_bytes": 10**6}, None),
  ],
)
def test_a_missed_bar_ends_with_1(model, monkeypatch, capfd, change, words):
  numbers = {"seconds": 2.0, "safetensors_seconds": 1.0, "speed_ratio": 0.5, "parameter_bytes": 10**9}
  numbers |= {"peak_bytes": 1_360_000_000, "idle_bytes": 10**8, "bar_bytes": 1.26e9}
  monkeypatch.setattr(loading, "measure", lambda *args: numbers | change)
  saved, handler = flagsaver.save_flag_values(loading.FLAGS), signal.getsignal(signal.SIGTERM)
  try:
    with pytest.raises(SystemExit) as e:
      argv = ["loading", f"--model={model}", "--meshes=none"]
      run_app(loading.main, loading.check, argv=argv, values=loading.FLAGS)
  finally:
    flagsaver.restore_flag_values(saved, loading.FLAGS)
    signal.signal(signal.SIGTERM, handler)
  assert e.value.code == (1 if words else 0)
  err = capfd.readouterr().err
  assert f"MISSED: float32, mesh none: {words}" in err if words else "MISSED" not in err


def test_bad_flags():
  for flag, words in (
    ("--model=gone", "no such directory"),
    ("--dtypes=int8", "'int8'"),
    ("--meshes= ", "--meshes= "),
  ):
    done = run(flag)
    assert done.returncode == 2 and words in done.stderr
