"""Loss scaling: a factor on the loss that keeps small gradients of 16 bits from becoming 0, and how it follows overflow."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import ConfigError, check_positive

State = dict[str, jax.Array]
"""{"scale": float32, "clean": steps since the scale or an overflow, "left": overflows that pass, "skipped": ones in a row}."""


@dataclasses.dataclass(frozen=True)
class LossScale:
  """A loss scale as a state machine: it grows after clean steps, and backs off at gradients that are not finite.

  After `interval` steps in a row without overflow: scale <- min(growth scale, ceiling), or as it was if that is infinite.
  At an overflow the step is skipped, and scale <- max(backoff scale, floor), but the first hysteresis - 1 overflows leave it;
  those are counted anew when the scale grows, and with `consecutive` at each clean step.  growth = backoff = 1: a static one.
  Raises ConfigError for fields that make no such machine.
  """

  initial: float = 2.0**16
  growth: float = 2.0
  interval: int = 2000
  backoff: float = 0.5
  hysteresis: int = 1
  consecutive: bool = False
  floor: float = 0.0
  ceiling: float = float(np.finfo(np.float32).max)

  def __post_init__(self):
    check_positive(
      self, initial=self.initial, interval=self.interval, hysteresis=self.hysteresis, ceiling=self.ceiling
    )
    if not (1 <= self.growth < math.inf and 0 < self.backoff <= 1):
      raise ConfigError(
        f"LossScale: found growth={self.growth}, backoff={self.backoff}, expected growth from 1 and backoff from 0 to 1"
      )
    if not 0 <= self.floor <= self.initial <= self.ceiling:
      raise ConfigError(
        f"LossScale: found floor={self.floor}, initial={self.initial}, ceiling={self.ceiling}, expected them in this order"
      )

  def init(self) -> State:
    """The state before the first step."""
    count = lambda value: jnp.full((), value, jnp.int32)
    scale = jnp.full((), self.initial, jnp.float32)
    return {"scale": scale, "clean": count(0), "left": count(self.hysteresis), "skipped": count(0)}

  def update(self, state: State, finite: jax.Array) -> State:
    """The state after a step whose gradients are all finite, or not (bool, a scalar)."""
    scale, left = state["scale"], state["left"]
    left = jnp.where(finite, self.hysteresis if self.consecutive else left, jnp.maximum(left - 1, 0))
    clean = jnp.where(finite, state["clean"] + 1, 0)
    grows = clean == self.interval
    grown = scale * self.growth
    grown = jnp.where(jnp.isfinite(grown), jnp.minimum(grown, self.ceiling), scale)
    backed_off = jnp.where(left == 0, jnp.maximum(scale * self.backoff, self.floor), scale)
    return {
      "scale": jnp.where(finite, jnp.where(grows, grown, scale), backed_off),
      "clean": jnp.where(grows, 0, clean),
      "left": jnp.where(grows, self.hysteresis, left),
      "skipped": jnp.where(finite, 0, state["skipped"] + 1),
    }


LOSS_SCALES: dict[str, LossScale] = {
  "static": LossScale(2.0**7, growth=1.0, backoff=1.0),
  "apex": LossScale(ceiling=2.0**24),
  "apex_legacy": LossScale(2.0**32, interval=1000, floor=1.0),
  "torch": LossScale(),
  "megatron": LossScale(2.0**32, interval=1000, hysteresis=2, floor=1.0),
  "deepspeed": LossScale(interval=1000, hysteresis=2, floor=1.0),
}
"""A static scale, and the five dynamic ones of libraries, with their defaults; dataclasses.replace changes a number.

Source: apex.amp.scaler.LossScaler; apex.fp16_utils.loss_scaler.DynamicLossScaler; torch.amp.GradScaler; Megatron-LM,
DynamicGradScaler; DeepSpeed, DynamicLossScaler with the defaults of its configuration ("consecutive" is its
consecutive_hysteresis).  Those that count in Python's numbers would pass float32's largest, where this one stays.
"""


def all_finite(tree) -> jax.Array:
  """Whether every number of every leaf is finite: one flag, also for arrays that lie over a mesh."""
  return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]).all()
