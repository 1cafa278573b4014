"""Runs that are interrupted at many steps, each time with nothing left but what is on disk, beside runs that are not."""

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_cases
from training_table import about, measured

from jaxllm.train import loop, manifest
from jaxllm.train.loss_scale import LOSS_SCALES
from jaxllm.train.precision import POLICIES

O2 = dataclasses.replace(
  POLICIES["O2"], loss_scale=dataclasses.replace(LOSS_SCALES["apex"], initial=2.0**22, interval=25)
)
"""Overflows at first and, as the scale grows again, later on."""
TYPES = {"float32": POLICIES["O0"], "bf16": POLICIES["bf16_master"], "fp16 + loss scale": O2}
EPOCH = len(train_cases.TEXT) // (train_cases.LENGTH * train_cases.BATCH)
"""Steps; two interruptions are to fall into one of them."""


@pytest.fixture(autouse=True)
def traced_once(monkeypatch):
  monkeypatch.setattr(loop, "make_step", train_cases.compiled_step)
  monkeypatch.setattr(loop, "init_state", train_cases.first_state)
  monkeypatch.setattr(loop, "IN_FLIGHT", 0)  # so that a run stops at the very step


class Cut(BaseException):
  """Ends a run where it asks whether to stop."""


class StopAt:
  """What `fit` asks after each step."""

  def __init__(self, last):
    self.last, self.losses = last, []

  def on_step(self, step, loss):
    self.losses.append((step, np.asarray(loss).tobytes()))

  def __bool__(self):
    return bool(self.losses) and self.losses[-1][0] == self.last

  def check(self):
    if self:
      raise Cut


def part(directory, steps, last, **config):
  """(state or None, losses) of a run to `last`, from what is in the directory."""
  stop, state = StopAt(last if last < steps else None), None
  try:
    state, _ = train_cases.train(
      directory, steps, on_step=stop.on_step, check_stop=stop.check, stop=stop, **config
    )
  except Cut:
    assert stop
  assert (state is None) == (last < steps)
  return state, stop.losses


def digests(state):
  """{name: (type, shape, SHA-256)} of parameters, optimizer, loss scale and step."""
  return {
    manifest.plain(path): (manifest.kind(x), hashlib.sha256(np.asarray(x).tobytes()).hexdigest())
    for path, x in jax.tree_util.tree_leaves_with_path(state)
  }


def straight(directory, types, accumulate, steps):
  state, losses = part(directory, steps, steps, precision=TYPES[types], accumulate=accumulate)
  return digests(state), losses


def schedule(rng, steps, count):
  """Where to interrupt: after the first step, before the last, twice in one epoch, and elsewhere at random."""
  first = int(rng.integers(1, steps // EPOCH - 1)) * EPOCH if steps > 2 * EPOCH else 2
  fixed = {1, steps - 1, first + 1, first + 7, first + EPOCH if steps > 2 * EPOCH else first + 8}
  free = [step for step in range(2, steps - 1) if step not in fixed]
  return sorted(fixed | set(rng.choice(free, count - len(fixed), replace=False).tolist()))


QUICK = [("fp16 + loss scale", 4, 1, 14, 5)]
FULL = [(types, accumulate, 20, 300, 12) for types in TYPES for accumulate in (1, 4)]


@pytest.mark.parametrize(
  ("types", "accumulate", "schedules", "steps", "count"),
  [*QUICK, *(pytest.param(*row, marks=pytest.mark.slow) for row in FULL)],
)
def test_a_run_interrupted_anywhere_is_the_run(
  tmp_path, monkeypatch, types, accumulate, schedules, steps, count
):
  """Bit for bit, every loss and every array; also where it stopped between two regular saves."""
  row = f"{types}, {accumulate}"
  about("resume", row)
  monkeypatch.setattr(loop, "SAVE_EVERY", 10)
  config = dict(precision=TYPES[types], accumulate=accumulate)
  expected, losses = straight(tmp_path / "straight", types, accumulate, steps)
  assert len(losses) == steps
  for number in range(schedules):
    cuts, seen = schedule(np.random.default_rng(number), steps, count), []
    for last in [*cuts, steps]:
      state, found = part(tmp_path / str(number), steps, last, **config)
      seen += found
    assert seen == losses, [a[0] for a, b in zip(seen, losses, strict=True) if a != b]
    assert digests(state) == expected
  if "loss_scale/scale" in expected:
    assert (
      float(state["loss_scale"]["scale"]) != 2.0**22
    )  # overflows, and growth, are part of what was compared
  measured(
    "resume",
    row,
    runs=schedules,
    interruptions=schedules * len(cuts),
    losses=schedules * steps,
    arrays=schedules * len(expected),
    differ=0,
  )


def test_a_run_that_forgets_its_loss_scale_would_be_told(tmp_path, monkeypatch):
  """What is compared can differ: the same interruptions with one array of the state as it was at first."""
  config = dict(precision=O2, accumulate=4)
  expected, _ = straight(tmp_path / "straight", "fp16 + loss scale", 4, 14)
  part(tmp_path / "cut", 14, 9, **config)
  restore = loop.Checkpoints.restore

  def forgetful(self, target):
    state = restore(self, target)
    return state | {
      "loss_scale": state["loss_scale"] | {"clean": jnp.int32(0), "scale": jnp.float32(2.0**22)}
    }

  monkeypatch.setattr(loop.Checkpoints, "restore", forgetful)
  state, _ = part(tmp_path / "cut", 14, 14, **config)
  assert digests(state) != expected
