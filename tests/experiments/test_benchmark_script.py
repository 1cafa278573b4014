"""experiments.benchmark: a row for each task, with and without another side."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = [
  "benchmark",
  "--lengths=16",
  "--tokens=32",
  "--rounds=1",
  "--embed_dim=16",
  "--num_layers=1",
  "--num_heads=2",
  "--mlp_dim=16",
]
# in its own process, as its flags are also those of the sweep
RUN = """
from experiments import benchmark
from jaxllm.study import run_app
benchmark.torch_side = lambda *args: None
run_app(benchmark.main, check=benchmark.check, argv={argv})
"""


def run(code):
  env = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # one device, compiled quickly
  return subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240
  )


def test_a_row_for_training_and_one_for_evaluation_without_torch():
  done = run(RUN.format(argv=TINY))
  assert done.returncode == 0, done.stderr
  rows = [
    [cell.strip() for cell in line.split("|")[1:-1]]
    for line in done.stdout.splitlines()
    if "| float32 |" in line
  ]
  assert [row[:3] for row in rows] == [["float32", "16", "train"], ["float32", "16", "evaluate"]]
  for row in rows:
    assert float(row[3].replace(",", "")) > 0
    assert row[4:] == ["-", "-"]


def test_the_ratio_is_above_one_where_this_side_is_faster():
  sides = "lambda: time.sleep(0.01), lambda: time.sleep(0.03)"
  done = run(
    f"import time; from experiments import benchmark; print(benchmark.measure({sides}, 3, 600).ratio)"
  )
  assert 1.5 < float(done.stdout) < 4, done.stderr


@pytest.mark.parametrize(
  ("flag", "named"),
  [
    pytest.param("--lengths=24", ["24 does not divide --tokens=32"], marks=pytest.mark.core),
    ("--dtypes=int8", ["'int8'", "bfloat16"]),
    ("--rounds=0", ["--rounds=0"]),
    ("--num_heads=0", ["--num_heads=0"]),
  ],
)
def test_bad_calls(flag, named):
  done = run(RUN.format(argv=[*TINY, flag]))
  assert done.returncode == 2
  for words in named:
    assert words in done.stderr
