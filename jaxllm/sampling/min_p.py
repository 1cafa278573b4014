"""Min-p."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxllm.sampling.base import Sampler, as_pytree, checked, per_row


@as_pytree
@dataclasses.dataclass(frozen=True)
class MinP(Sampler):
  """Keeps the tokens that are at least min_p times as likely as the likeliest.

  keep_v = (p_v >= min_p max_u p_u), computed as z_v >= max z + log min_p.  min_p: a scalar or [B] in [0, 1]; 0
  is off, 1 keeps the largest (and its equals) alone.  Raises SamplingError for min_p outside [0, 1] or NaN.
  Source: Nguyen et al. (2024), arXiv 2407.01082, section 3.
  """

  min_p: Any = 0.0

  def __post_init__(self):
    checked(self, "min_p", lambda p: (p >= 0) & (p <= 1), "a number in [0, 1]")

  def filter(self, logits_BV, state):
    logits_BV = logits_BV.astype(jnp.float32)
    best_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    least_B1 = best_B1 + jnp.log(per_row(self.min_p, logits_BV))
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
