"""Temperature."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxllm.sampling.base import Sampler, as_pytree, checked, only_argmax, per_row

TINY = float(np.finfo(np.float32).tiny)


@as_pytree
@dataclasses.dataclass(frozen=True)
class Temperature(Sampler):
  """Sharpens (below 1) or flattens (above 1) the distribution; 0 is greedy, exactly.

  p_v = exp(z_v / temperature) / sum_u exp(z_u / temperature).  temperature: a scalar or [B], finite and not
  negative.  Rows whose temperature is 0, or so small that the largest logit overflows when divided, keep
  their argmax alone.  Raises SamplingError for a negative, infinite or NaN temperature.
  Source: Ackley, Hinton and Sejnowski (1985).
  """

  temperature: Any = 1.0

  def __post_init__(self):
    largest = float(np.finfo(np.float32).max)
    checked(self, "temperature", lambda t: (t >= 0) & (t <= largest), "a finite number >= 0")

  def filter(self, logits_BV, state):
    logits_BV = logits_BV.astype(jnp.float32)
    temperature = per_row(self.temperature, logits_BV)
    # Denormals count as 0, because hardware may flush them.  1 stands in there: 0 * inf would be a NaN that
    # jax_debug_nans reports, though `where` drops it; the maximum keeps -inf * 0 away likewise.
    warm = temperature >= TINY
    # Multiplied, because XLA replaces a division by this as it fuses: eager and compiled draws would differ.
    rate = jnp.maximum(1 / jnp.where(warm, temperature, 1.0), TINY)
    warm_B1 = warm & jnp.isfinite(rate * jnp.max(logits_BV, axis=-1, keepdims=True))
    return jnp.where(warm_B1, rate * logits_BV, only_argmax(logits_BV))
