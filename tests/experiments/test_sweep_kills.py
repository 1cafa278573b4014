"""A sweep that is killed at any moment goes on, and ends as one that nothing disturbed."""

import signal

import kill_sweep
import pytest
import sweep_case

ARGS = (*sweep_case.TINY, "--steps=60", "--other_steps=30", "--metrics=bpb_last,bpb")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, corpus):
  """(directory, flags, course) of an undisturbed run."""
  out, args = tmp_path_factory.mktemp("kills") / "whole", (*ARGS, f"--corpus={corpus}")
  return out, args, kill_sweep.undisturbed(out, args)


def check(whole, out, signals, seed):
  found = kill_sweep.disturb(out, whole[1], whole[2], signals, seed)
  assert found["problems"] == []
  assert kill_sweep.differing(whole[0], out) == []
  return found


@pytest.mark.slow  # a minute, and a step of its own in CI
def test_a_few(whole, tmp_path):
  found = check(whole, tmp_path / "out", [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL], seed=1)
  assert found["between"] == 3
  assert found["in_training"] and found["in_cells"]


@pytest.mark.slow  # a minute, and a step of its own in CI
def test_three_kills_and_a_request_to_stop(whole, tmp_path):
  signals = [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGKILL]
  found = check(whole, tmp_path / "out", signals, seed=1)
  assert found["between"] >= 1  # where each lands depends on the machine's load


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_twenty(whole, tmp_path, number):
  found = check(whole, tmp_path / "out", [number] * 20, seed=2)
  assert found["between"] >= 15
