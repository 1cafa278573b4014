"""Locally typical sampling."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.sampling.base import Sampler, as_pytree, checked, entropy, log_probs, per_row


@as_pytree
@dataclasses.dataclass(frozen=True)
class Typical(Sampler):
  """Keeps the tokens whose information is nearest the entropy, until their probabilities reach p.

  d_v = |-log p_v - H|, H = -sum p log p; keep_v = (d_v <= the d of the token at which the sum of probabilities,
  taken in ascending d, reaches p).  Equal distances enter together, as in transformers.  The likeliest token may
  be excluded.  p: a scalar or [B] in [0, 1]; 1 keeps all, whatever the rounding; 0 keeps the most typical token.
  A sum equal to p, or two distances equal, up to float32 rounding may fall on either side.  Raises SamplingError
  for p outside [0, 1] or NaN.
  Source: Meister et al. (2022), arXiv 2202.00666, section 4 (tau there); transformers' and llama.cpp's typical_p.
  """

  p: Any = 1.0

  def __post_init__(self):
    checked(self, "p", lambda p: (p >= 0) & (p <= 1), "a number in [0, 1]")

  def filter(self, logits_BV, state):
    logits_BV = logits_BV.astype(jnp.float32)
    p = per_row(self.p, logits_BV)
    log_BV = log_probs(logits_BV)
    distance_BV = jnp.abs(log_BV + entropy(log_BV))
    sorted_BV, probs_BV = jax.lax.sort((distance_BV, jnp.exp(log_BV)), num_keys=1)
    reached_B1 = jnp.sum(jnp.cumsum(probs_BV, axis=-1) < p, axis=-1, keepdims=True)
    last_B1 = jnp.take_along_axis(sorted_BV, jnp.minimum(reached_B1, logits_BV.shape[-1] - 1), axis=-1)
    return jnp.where((distance_BV <= last_B1) | (p >= 1), logits_BV, -jnp.inf)
