"""experiments.attention_length: a table of both cores, and flags that are refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"


def run(*args):
  env = os.environ | {"XLA_FLAGS": FLAGS}  # one device, compiled quickly
  call = [sys.executable, "-m", "experiments.attention_length", *args]
  return subprocess.run(call, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)


def measured(directory, wanted, *args):
  """[MB of the plain core, MB of tiles], numbers on Linux only, of a run that measures `wanted` and writes what it prints."""
  done = run("--smoke", f"--out={directory}", *args)
  assert done.returncode == 0, done.stderr
  written = (directory / "attention_length.md").read_text()
  assert written.split("\n\n")[1] in done.stdout
  (line,) = [line for line in written.splitlines() if line.startswith(f"| {wanted[0]} ")]
  method, length, plain, blockwise, ratio, *megabytes = [cell.strip() for cell in line.split("|")[1:-1]]
  assert (method, length) == wanted
  assert float(plain) > 0 and float(blockwise) > 0 and float(ratio) > 0
  return [int(number.replace(",", "")) for number in megabytes] if sys.platform == "linux" else megabytes


def test_the_smoke_run(tmp_path):
  megabytes = measured(tmp_path, ("rope", "128"))
  if sys.platform == "linux":
    assert all(0 <= number < 500 for number in megabytes)


@pytest.mark.slow
def test_both_cores_are_measured_and_the_memory_of_a_pass_is_seen(tmp_path):
  """All scores of 2048 tokens and two heads are 34 MB, which tiles never hold."""
  megabytes = measured(tmp_path, ("alibi", "2,048"), "--methods=alibi", "--lengths=2048")
  if sys.platform != "linux":
    assert megabytes == ["-", "-"]
    return
  plain, blockwise = megabytes
  assert 34 < plain < 500 and plain > blockwise + 20


@pytest.mark.parametrize(
  ("flag", "named"),
  [
    ("--lengths=1", "'1'"),
    ("--methods=flash", "'flash'"),
    ("--rounds=0", "--rounds=0"),
    ("--plain_up_to=-1", "-1"),
  ],
)
def test_bad_calls(flag, named):
  done = run(flag)
  assert done.returncode == 2 and named in done.stderr


ANSWERS = {  # of the process that measures: its exit status, stdout and stderr; and what is made of it
  "killed": ((-9, "", ""), "None"),
  "refused": ((1, "", "jaxlib.XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory"), "None"),
  "fine": ((0, "17", ""), "17"),
  "broken": (
    (1, "", "ConfigError: num_heads: found 0"),
    "memory of rope, plain at 8 tokens: ConfigError: num_heads: found 0",
  ),
}


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_only_a_lack_of_memory_is_passed_over():
  """Any other failure of the process that measures is told, and not shown as a dash."""
  code = f"""
import subprocess
from experiments import attention_length as a
for answer in {[answer for answer, _ in ANSWERS.values()]!r}:
  subprocess.run = lambda call, **_: subprocess.CompletedProcess(call, *answer)
  try:
    print(a.peak_of_own_process("rope", "plain", 8))
  except RuntimeError as error:
    print(error)
"""
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
  assert done.stdout.splitlines() == [shown for _, shown in ANSWERS.values()], done.stderr
