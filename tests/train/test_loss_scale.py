"""Loss scales step by step as those of the libraries: written anew from what they publish, and torch's own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_table import about, measured

from jaxllm.errors import ConfigError
from jaxllm.train.loss_scale import LOSS_SCALES, LossScale, all_finite

STEPS = 10_000


class Apex:
  """apex.amp.scaler.LossScaler: the count of steps that were not skipped begins anew at overflow and at growth."""

  def __init__(self, window=2000):
    self.scale, self.window, self.unskipped = 2.0**16, window, 0

  def step(self, overflow):
    if overflow:
      self.scale /= 2
      self.unskipped = 0
    else:
      self.unskipped += 1
    if self.unskipped == self.window:
      self.scale = min(2.0**24, self.scale * 2)
      self.unskipped = 0


class ApexLegacy:
  """apex.fp16_utils.loss_scaler.DynamicLossScaler: by the distance of the iteration from the last that overflowed."""

  def __init__(self, window=1000):
    self.scale, self.window, self.iteration, self.last = 2.0**32, window, 0, -1

  def step(self, overflow):
    if overflow:
      self.scale, self.last = max(self.scale / 2, 1), self.iteration
    elif (self.iteration - self.last) % self.window == 0:
      self.scale *= 2
    self.iteration += 1


class Megatron:
  """Megatron-LM's DynamicGradScaler: two trackers, of growth and of hysteresis; the latter goes below zero."""

  def __init__(self, interval=1000):
    self.scale, self.interval, self.growth, self.hysteresis = 2.0**32, interval, 0, 2

  def step(self, overflow):
    if overflow:
      self.growth = 0
      self.hysteresis -= 1
      if self.hysteresis <= 0:
        self.scale = max(self.scale * 0.5, 1.0)
      return
    self.growth += 1
    if self.growth == self.interval:
      self.growth, self.hysteresis = 0, 2
      self.scale *= 2


class DeepSpeed:
  """DeepSpeed's DynamicLossScaler: hysteresis stops at 1, and comes back with growth, or with any clean step."""

  def __init__(self, window=1000, consecutive=False):
    self.scale, self.window, self.consecutive = 2.0**16, window, consecutive
    self.iteration, self.last, self.hysteresis = 0, -1, 2

  def step(self, overflow):
    if overflow:
      if self.hysteresis == 1:
        self.scale = max(self.scale / 2, 1)
      else:
        self.hysteresis -= 1
      self.last = self.iteration
    else:
      if self.consecutive:
        self.hysteresis = 2
      if (self.iteration - self.last) % self.window == 0:
        if not self.consecutive:
          self.hysteresis = 2
        self.scale *= 2
    self.iteration += 1


class Torch:
  """torch.amp.GradScaler itself, on a gradient that is infinite or not."""

  def __init__(self, interval=2000, **kwargs):
    torch = pytest.importorskip("torch")
    self.weight = torch.nn.Parameter(torch.zeros(1))
    self.gradients = torch.zeros(1), torch.full((1,), float("inf"))
    self.optimizer = torch.optim.SGD([self.weight], lr=0.0)
    self.scaler = torch.amp.GradScaler("cpu", growth_interval=interval, **kwargs)
    self.scaler.scale(torch.ones(()))  # the scale exists from the first loss on

  @property
  def scale(self):
    return self.scaler.get_scale()

  def step(self, overflow):
    self.weight.grad = self.gradients[bool(overflow)].clone()
    self.scaler.unscale_(self.optimizer)  # where it looks for overflow
    self.scaler.update()


REFERENCES = {
  "apex": Apex,
  "apex_legacy": ApexLegacy,
  "torch": Torch,
  "megatron": Megatron,
  "deepspeed": DeepSpeed,
}


def traced(reference, cycles=4, chance=1e-3):
  """(overflow of each step, scale after it): above a limit that wanders from 2^-4 to 2^30, and by chance."""
  rng = np.random.default_rng(0)
  limit = 2.0 ** (13 - 17 * np.cos(np.arange(STEPS) * 2 * np.pi * cycles / STEPS + 3))
  flags, scales = rng.random(STEPS) < chance, np.zeros(STEPS)
  for i, near in enumerate(rng.uniform(0.5, 2, STEPS)):
    flags[i] |= reference.scale > limit[i] * near
    reference.step(flags[i])
    scales[i] = reference.scale
  return flags, scales


def scales_of(loss_scale, overflow):
  """The scale after each step."""

  def step(state, finite):
    state = loss_scale.update(state, finite)
    return state, state["scale"]

  return np.asarray(jax.jit(lambda x: jax.lax.scan(step, loss_scale.init(), x)[1])(~overflow), np.float64)


@pytest.mark.core
@pytest.mark.parametrize("interval", [None, 20])
@pytest.mark.parametrize("name", list(REFERENCES))
def test_ten_thousand_steps_are_those_of_the_library(name, interval):
  reference, scale = REFERENCES[name](), LOSS_SCALES[name]
  assert float(scale.init()["scale"]) == reference.scale
  if interval is not None:
    reference, scale = REFERENCES[name](interval), dataclasses.replace(scale, interval=interval)
  overflow, expected = traced(reference, *(() if interval else (1, 1e-4)))
  row = f"{name}, interval {scale.interval}"
  about("scale", row)
  changes = np.diff(expected)
  assert min(np.sum(changes > 0), np.sum(changes < 0)) >= (50 if interval else 2)
  found = scales_of(scale, overflow)
  np.testing.assert_array_equal(found, expected)
  measured("scale", row, steps=STEPS, overflows=np.sum(overflow), differ=np.sum(found != expected))
  # each number of the policy matters on this trace
  wrong = [
    dict(interval=scale.interval + 1),
    dict(hysteresis=3 - scale.hysteresis),
    dict(backoff=0.25),
    dict(growth=4.0),
  ]
  if interval:
    wrong += [
      dict(floor=1.0 - scale.floor),
      dict(ceiling=2.0**24 if name != "apex" else 2.0**30, initial=1.0),
    ]
    wrong += [dict(consecutive=True)] * (scale.hysteresis > 1)
  for change in wrong:
    assert np.any(scales_of(dataclasses.replace(scale, **change), overflow) != expected), change


def test_consecutive_hysteresis_is_deepspeeds():
  overflow, expected = traced(DeepSpeed(20, consecutive=True))
  scale = dataclasses.replace(LOSS_SCALES["deepspeed"], interval=20, consecutive=True)
  np.testing.assert_array_equal(scales_of(scale, overflow), expected)


def test_other_factors_are_torchs():
  overflow, expected = traced(Torch(20, growth_factor=1.5, backoff_factor=0.25))
  np.testing.assert_array_equal(
    scales_of(LossScale(growth=1.5, backoff=0.25, interval=20), overflow), expected
  )


def test_apex_has_halved_at_step_10_is_back_at_2010_and_never_above_2_to_the_24():
  overflow = np.arange(1, 40_001) == 10
  found = scales_of(LOSS_SCALES["apex"], overflow)
  assert found[8] == 65536 and found[9] == 32768
  assert found[2008] == 32768 and found[2009] == 65536
  assert found.max() == found[-1] == 2.0**24


def test_a_static_scale_stays_and_counts_what_is_skipped():
  state, scale = LOSS_SCALES["static"].init(), LOSS_SCALES["static"]
  for finite, skipped in ((False, 1), (False, 2), (True, 0), (False, 1)):
    state = scale.update(state, jnp.array(finite))
    assert (float(state["scale"]), int(state["skipped"])) == (128.0, skipped)


def test_growth_stops_at_the_largest_number():
  found = scales_of(LossScale(2.0**126, interval=1), np.zeros(5, bool))
  np.testing.assert_array_equal(found, 2.0**127)


def test_one_number_that_is_not_finite_is_seen_on_whichever_device_it_lies():
  mesh = jax.make_mesh((8,), ("data",))
  rows = jax.NamedSharding(mesh, jax.P("data"))
  seen = jax.jit(all_finite)
  for device in range(8):
    for bad in (np.inf, -np.inf, np.nan):
      values = np.ones((8, 4), np.float16)
      values[device, 2] = bad
      for leaf in (jax.device_put(values, rows), jnp.asarray(values)):
        assert not seen({"good": jnp.ones(3), "bad": leaf})
  assert seen({"large": jax.device_put(np.full((8, 4), 65504, np.float16), rows)})


@pytest.mark.parametrize(
  "fields",
  [
    dict(interval=0),
    dict(growth=0.5),
    dict(backoff=0.0),
    dict(hysteresis=0),
    dict(floor=2.0**17),
    dict(initial=-1.0),
  ],
)
def test_what_is_no_loss_scale_is_refused(fields):
  with pytest.raises(ConfigError, match=next(iter(fields))):
    LossScale(**fields)
