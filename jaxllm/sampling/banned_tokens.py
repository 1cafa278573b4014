"""Tokens that are never drawn."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxllm.sampling.base import Sampler, as_pytree, checked_table, per_token


@as_pytree
@dataclasses.dataclass(frozen=True)
class BannedTokens(Sampler):
  """Excludes tokens.

  z_v <- -inf where mask_v.  mask: bool [V], or [B, V] for one a row, as `token_mask(ids, vocab_size)` makes it.  Raises
  SamplingError for a mask of everything, and another shape than the logits'.
  Source: transformers' suppress_tokens, and bad_words_ids of single tokens.
  """

  mask: Any

  def __post_init__(self):
    valid = lambda mask: (~mask).any(axis=-1)
    checked_table(self, "mask", valid, "[V] or [B, V] of True or False, not all of a row True", np.bool_)

  def filter(self, logits_BV, state):
    return jnp.where(per_token(self.mask, logits_BV, jnp.bool_), -jnp.inf, logits_BV.astype(jnp.float32))
