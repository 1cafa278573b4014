"""Top-k."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxllm.sampling.base import Sampler, as_pytree, checked, per_row


@as_pytree
@dataclasses.dataclass(frozen=True)
class TopK(Sampler):
  """Keeps the k most likely tokens.

  keep_v = (z_v >= the k-th largest z).  k: an integer or [B] of them; 0 is off, and more than the vocabulary
  is the whole of it.  Tokens equal to the k-th are all kept, as in transformers' TopKLogitsWarper, so k = 1
  is greedy only where the largest logit is alone.  Raises SamplingError for a negative or fractional k.
  Source: Fan, Lewis, Dauphin (2018), section 5.4.
  """

  k: Any = 0

  def __post_init__(self):
    checked(self, "k", lambda k: k >= 0, "an integer >= 0 (0 is off)", dtype=np.int32)

  def filter(self, logits_BV, state):
    logits_BV = logits_BV.astype(jnp.float32)
    B, V = logits_BV.shape
    k = per_row(self.k, logits_BV, jnp.int32)
    k_B1 = jnp.broadcast_to(jnp.where(k > 0, jnp.minimum(k, V), V), (B, 1))
    # A sort, not lax.top_k: k is traced and may differ from row to row.
    kth_B1 = jnp.take_along_axis(jnp.sort(logits_BV, axis=-1), V - k_B1, axis=-1)
    return jnp.where(logits_BV >= kth_B1, logits_BV, -jnp.inf)
