"""Top-n-sigma."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxllm.sampling.base import Sampler, as_pytree, checked, per_row


@as_pytree
@dataclasses.dataclass(frozen=True)
class TopNSigma(Sampler):
  """Keeps the tokens whose logits are within n standard deviations of the largest.

  keep_v = (z_v >= max z - n sigma), sigma^2 = mean (z - mean z)^2 over the finite logits.  No temperature before it
  changes the set.  n: a scalar or [B], finite and not negative; 0 is off, as in llama.cpp.  The authors' code
  divides by V - 1 in place of V, which moves sigma by 1 / 2V of itself.  Raises SamplingError for another n.
  Source: Tang et al. (2024), arXiv 2411.07641, section 3; over finite logits as llama.cpp.
  """

  n: Any = 0.0

  def __post_init__(self):
    largest = float(np.finfo(np.float32).max)
    checked(self, "n", lambda n: (n >= 0) & (n <= largest), "a finite number >= 0 (0 is off)")

  def filter(self, logits_BV, state):
    logits_BV = logits_BV.astype(jnp.float32)
    n = per_row(self.n, logits_BV)
    finite_BV = logits_BV > -jnp.inf
    best_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    # counted from the largest: nothing cancels, and a square overflows only where all but it would go anyway
    below_BV = jnp.where(finite_BV, logits_BV - jnp.where(finite_BV, best_B1, 0.0), 0.0)
    number_B1 = jnp.maximum(jnp.sum(finite_BV, axis=-1, keepdims=True), 1)
    mean_B1 = jnp.sum(below_BV, axis=-1, keepdims=True) / number_B1
    square_BV = jnp.where(finite_BV, jnp.square(below_BV - mean_B1), 0.0)
    sigma_B1 = jnp.sqrt(jnp.sum(square_BV, axis=-1, keepdims=True) / number_B1)
    return jnp.where((below_BV >= -n * sigma_B1) | (n <= 0), logits_BV, -jnp.inf)
