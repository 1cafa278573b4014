"""Learning rates as functions of the step: a linear warm-up from 0, and what comes after it."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax.numpy as jnp
import optax

from jaxllm.errors import ConfigError


class Schedule(Protocol):
  """Learning rate of the optimizer's step s = 0, 1, ...; a skipped step does not count."""

  def __call__(self, peak: float, warmup: int, steps: int, final: float) -> optax.Schedule:
    """The rate goes from 0 to `peak` in `warmup` steps, then as the schedule says, to `final` at `steps` if it comes down."""


@dataclasses.dataclass(frozen=True)
class Cosine:
  """final + (peak - final) (1 + cos(pi t)) / 2, t from 0 to 1.  Source: Loshchilov and Hutter (2016), SGDR, equation 5."""

  def __call__(self, peak: float, warmup: int, steps: int, final: float) -> optax.Schedule:
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, final)


@dataclasses.dataclass(frozen=True)
class Linear:
  """peak + (final - peak) t, t from 0 to 1.  Source: Devlin et al. (2018), BERT, appendix A.2 (there to 0)."""

  def __call__(self, peak: float, warmup: int, steps: int, final: float) -> optax.Schedule:
    return _after(warmup, peak, optax.linear_schedule(peak, final, steps - warmup))


@dataclasses.dataclass(frozen=True)
class Constant:
  """peak."""

  def __call__(self, peak: float, warmup: int, steps: int, final: float) -> optax.Schedule:
    return _after(warmup, peak, optax.constant_schedule(peak))


@dataclasses.dataclass(frozen=True)
class WarmupStableDecay:
  """peak, and over the last `decay` of all steps a line to final.

  Raises ConfigError where warm-up and decay are longer than the run.
  Source: Hu et al. (2024), MiniCPM, section 4; the line, Hägele et al. (2024), section 3.
  """

  decay: float = 0.2

  def __post_init__(self):
    if not 0 < self.decay <= 1:
      raise ConfigError(f"WarmupStableDecay.decay: found {self.decay}, expected a share of the steps above 0")

  def __call__(self, peak: float, warmup: int, steps: int, final: float) -> optax.Schedule:
    last = max(1, int(self.decay * steps))
    if warmup + last > steps:
      raise ConfigError(
        f"WarmupStableDecay: found {warmup} steps of warm-up and {last} of decay, expected at most {steps} in all; lower one"
      )
    return _after(warmup, peak, optax.linear_schedule(peak, final, last, steps - last - warmup))


@dataclasses.dataclass(frozen=True)
class InverseSquareRoot:
  """peak sqrt(w / max(s, w)), w = max(warmup, 1).  Source: Vaswani et al. (2017), section 5.3."""

  def __call__(self, peak: float, warmup: int, steps: int, final: float) -> optax.Schedule:
    w = max(warmup, 1)
    return _after(warmup, peak, lambda after: peak * jnp.sqrt(w / jnp.maximum(after + warmup, w)))


SCHEDULES: dict[str, type] = {
  "cosine": Cosine,
  "linear": Linear,
  "constant": Constant,
  "wsd": WarmupStableDecay,
  "inverse_sqrt": InverseSquareRoot,
}
"""Schedules by name; `final` means nothing to constant and inverse_sqrt, which do not end."""


def _after(warmup: int, peak: float, schedule: optax.Schedule) -> optax.Schedule:
  return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), schedule], [warmup])
