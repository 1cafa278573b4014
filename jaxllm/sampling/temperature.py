"""Temperature."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxllm.sampling.base import Sampler, as_pytree, checked, only_argmax, per_row


@as_pytree
@dataclasses.dataclass(frozen=True)
class Temperature(Sampler):
  """Sharpens (below 1) or flattens (above 1) the distribution; 0 is greedy, exactly.

  p_v = exp(z_v / temperature) / sum_u exp(z_u / temperature).  temperature: a scalar or [B], finite and not
  negative.  Rows with temperature 0, or so small that the largest logit overflows when divided, keep their
  argmax alone.  Raises SamplingError for a negative, infinite or NaN temperature.
  """

  temperature: Any = 1.0

  def __post_init__(self):
    largest = float(np.finfo(np.float32).max)
    checked(self, "temperature", lambda t: (t >= 0) & (t <= largest), "a finite number >= 0")

  def filter(self, logits_BV, state):
    logits_BV = logits_BV.astype(jnp.float32)
    temperature = per_row(self.temperature, logits_BV)
    # Divide by 1 where it is 0: 0/0 would be a NaN that jax_debug_nans reports, though `where` drops it.
    divisor = jnp.where(temperature > 0, temperature, 1.0)
    top_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    warm_B1 = (temperature > 0) & jnp.isfinite(top_B1 / divisor)
    return jnp.where(warm_B1, logits_BV / divisor, only_argmax(logits_BV))
