"""Top-p (nucleus)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxllm.sampling.base import Sampler, as_pytree, checked, per_row


@as_pytree
@dataclasses.dataclass(frozen=True)
class TopP(Sampler):
  """Keeps the smallest set of most likely tokens whose probabilities reach p.

  keep_v = (the sum of the probabilities before v, in descending order, is < p).  p: a scalar or [B] in
  [0, 1].  The first token always stays: p = 0 is greedy.  p = 1 keeps all, whatever the rounding.  Equal
  tokens enter in the order of their ids.  A cumulative sum equal to p up to float32 rounding (2e-7) may
  fall on either side.  Raises SamplingError for p outside [0, 1] or NaN.
  Source: Holtzman et al. (2020), section 3.1.  transformers sorts ascending and drops where the sum is
  <= 1 - p: the same sets but for ties and that rounding.
  """

  p: Any = 1.0

  def __post_init__(self):
    checked(self, "p", lambda p: (p >= 0) & (p <= 1), "a number in [0, 1]")

  def filter(self, logits_BV, state):
    logits_BV = logits_BV.astype(jnp.float32)
    p = per_row(self.p, logits_BV)
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    weight_BV = jnp.exp(sorted_BV - sorted_BV[:, :1])
    upto_BV = jnp.cumsum(weight_BV, axis=-1)
    before_BV = jnp.pad(upto_BV[:, :-1], ((0, 0), (1, 0)))
    # Counted, because a parallel sum is not monotone to the last bit and the set must have no holes.
    size_B1 = jnp.sum(before_BV < p * upto_BV[:, -1:], axis=-1, keepdims=True)
    size_B1 = jnp.maximum(size_B1, 1)
    # Back to the unsorted logits by the smallest value kept, of which only as many as fit: no scatter.
    last_B1 = jnp.take_along_axis(sorted_BV, size_B1 - 1, axis=-1)
    above_BV = logits_BV > last_B1
    equal_BV = logits_BV == last_B1
    room_B1 = size_B1 - jnp.sum(above_BV, axis=-1, keepdims=True)
    keep_BV = above_BV | (equal_BV & (jnp.cumsum(equal_BV, axis=-1) <= room_B1))
    return jnp.where(keep_BV | (p >= 1), logits_BV, -jnp.inf)
