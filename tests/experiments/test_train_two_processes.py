"""experiments.train in two processes of four devices each: the run of one process, checkpoints included."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from train_case import QUICK, call, learned, rows, write_text

from jaxllm.parallel import multihost
from jaxllm.train.checkpoint import restore_tree

ROOT = Path(__file__).parents[2]
MESH = "--mesh=fsdp=2,tensor=4"


def both(*args, strike=None):
  """(exit codes, what each said) of the command in two processes; strike: called with them before they are waited for."""
  with socket.create_server(("localhost", 0)) as server:
    port = server.getsockname()[1]
  flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")
  common = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  variables = [
    dict(zip(multihost.VARIABLES.values(), (f"localhost:{port}", "2", str(i)), strict=True)) for i in range(2)
  ]
  command = [sys.executable, "-m", "experiments.train", *args]
  run = lambda env: subprocess.Popen(
    command, env=common | env, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
  )
  processes = [run(env) for env in variables]
  try:
    if strike is not None:
      strike(processes)
    said = [process.communicate(timeout=200)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  return [process.returncode for process in processes], said


@pytest.fixture(scope="module")
def one(tmp_path_factory):
  """(the output of a run in this process, its flags)."""
  root = tmp_path_factory.mktemp("two")
  args = (*QUICK, f"--text={write_text(root)}", "--num_heads=4", "--eval_every=0")
  assert call(*args, MESH, f"--out={root / 'one'}") == 0
  return root / "one", args


def check_same(out, one):
  """Rows of metrics and the state at the end."""
  for found, expected in zip(learned(out), learned(one), strict=True):
    assert found["step"] == expected["step"] and found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
  states = [restore_tree(run / "checkpoints") for run in (out, one)]
  assert [step for step, _ in states] == [12, 12]
  for found, expected in zip(*(jax.tree.leaves(state["params"]) for _, state in states), strict=True):
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.max(np.abs(expected)))
  assert (out / "model" / "config.json").exists()
  assert len(rows(out, "results.jsonl")) == 4


def test_two_processes_go_on_from_the_checkpoint_of_one_and_save(one, tmp_path):
  shutil.copytree(one[0], tmp_path / "two")
  shutil.rmtree(tmp_path / "two" / "checkpoints" / "12")
  codes, said = both(*one[1], MESH, f"--out={tmp_path / 'two'}")
  assert codes == [0, 0], "\n".join(said)
  assert sum("metrics, results and figure" in text for text in said) == 1  # the first process tells
  check_same(tmp_path / "two", one[0])


@pytest.mark.slow
def test_two_processes_train_as_one_and_go_on_from_what_they_saved(one, tmp_path):
  out = tmp_path / "two"
  for again in (False, True):
    if again:
      shutil.rmtree(out / "checkpoints" / "12")
    codes, said = both(*one[1], MESH, f"--out={out}")
    assert codes == [0, 0], "\n".join(said)
    check_same(out, one[0])
  shutil.rmtree(out / "checkpoints" / "12")
  assert call(*one[1], "--mesh=fsdp=8", f"--out={out}") == 0  # in one process, on another mesh
  check_same(out, one[0])


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_at_one_step(one, tmp_path):
  """And the same command goes on from it."""
  out = tmp_path / "two"
  args = (*one[1], MESH, "--steps=100000", "--save_every=100000", f"--out={out}")

  def strike(processes):
    """Once steps are told of: then both have compiled."""
    while len(rows(out) if (out / "metrics.jsonl").exists() else []) < 1:
      assert all(process.poll() is None for process in processes)
      time.sleep(0.2)
    processes[1].send_signal(signal.SIGTERM)

  steps = []
  for _ in range(2):
    codes, said = both(*args, strike=strike)
    assert codes == [75, 75], "\n".join(said)
    steps.append(restore_tree(out / "checkpoints")[0])
    (out / "metrics.jsonl").write_text("")
  assert 0 < steps[0] < steps[1] < 100000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["results.jsonl", "metrics.jsonl", "LOCK"])
def test_what_the_first_process_cannot_write_ends_both(one, tmp_path, name):
  """At the end, at the begin, and before: neither waits for the other."""
  (tmp_path / "two" / name).mkdir(parents=True)
  start = time.monotonic()
  codes, said = both(*one[1], MESH, f"--out={tmp_path / 'two'}")
  assert codes[0] not in (0, None) and codes[1] not in (0, None), "\n".join(said)
  assert name in said[0] and "process 0 failed, and says why" in said[1], "\n".join(said)
  assert time.monotonic() - start < 90


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_is_lost_is_told_of_by_the_other(one, tmp_path, lost):
  """It ends within the minute, not with 0, and another run goes on from what was saved."""

  def kill(processes):
    while not (tmp_path / "two" / "checkpoints" / "12").exists():
      assert all(process.poll() is None for process in processes)
      time.sleep(0.05)
    processes[lost].kill()

  args = (*one[1], MESH, "--steps=100000", f"--out={tmp_path / 'two'}")
  codes, said = both(*args, strike=kill)
  assert codes[lost] == -signal.SIGKILL and codes[1 - lost] != 0
  assert f"error: multihost: process {1 - lost} of 2: another process was lost" in said[1 - lost], said[
    1 - lost
  ]
  saved = max(int(path.name) for path in (tmp_path / "two" / "checkpoints").iterdir() if path.name.isdigit())
  assert saved >= 12 and restore_tree(tmp_path / "two" / "checkpoints")[0] == saved
