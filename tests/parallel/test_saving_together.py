"""Two processes save one state in a directory that they share, and restore it; damage is found by one and told to both."""

import os
import subprocess
import sys

import numpy as np
import pytest
from test_two_processes import HERE, environment, free_port

from jaxllm.train.checkpoint import Checkpoints


def both(directory):
  """What the two processes say."""
  command = [sys.executable, str(HERE / "saving_together.py"), str(free_port())]
  run = lambda i: subprocess.Popen(
    [*command, str(i), str(directory)],
    env=environment(),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  processes = [run(i) for i in range(2)]
  try:
    said = [process.communicate(timeout=150)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
  return said


@pytest.mark.slow
def test_saved_by_two_and_restored_by_two_and_by_one(tmp_path):
  assert all("steps [2, 3]" in said for said in both(tmp_path))
  assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]
  assert all("restored 3" in said for said in both(tmp_path))
  expected = np.arange(64 * 32, dtype=np.float32).reshape(64, 32)
  alone = {"w": expected, "step": np.int32(0)}
  with Checkpoints(tmp_path) as checkpoints:
    found = checkpoints.restore(alone)
  assert int(found["step"]) == 3 and (np.asarray(found["w"]) == expected + 3).all()
  path = next(path for path in (tmp_path / "3").rglob("*") if path.is_file() and path.name != "manifest.json")
  path.write_bytes(path.read_bytes() + b"\0")
  assert all("restored 2" in said for said in both(tmp_path))
  assert os.listdir(tmp_path / "quarantine") == ["3"]
