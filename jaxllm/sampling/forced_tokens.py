"""Tokens that are given in advance."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxllm.errors import SamplingError
from jaxllm.sampling.base import as_pytree, checked_table
from jaxllm.sampling.history import Remembers


@as_pytree
@dataclasses.dataclass(frozen=True)
class ForcedTokens(Remembers):
  """Makes the i-th new token tokens[i], where that is an id.

  z_v <- 0 for v = tokens[i], -inf for all others, i = the number of tokens drawn; nothing where tokens[i] is -1 or i
  is beyond the list.  tokens: [n], or [B, n] for one list a row, of ids or -1.  An id beyond the vocabulary leaves
  nothing to draw.  transformers' forced_bos_token_id is a list of one; its forced_eos_token_id is the last of
  max_new_tokens, after -1 each.  Place it last among what bans tokens.  Raises SamplingError for other values.
  Source: transformers' ForcedBOSTokenLogitsProcessor and ForcedEOSTokenLogitsProcessor.
  """

  tokens: Any

  def __post_init__(self):
    checked_table(self, "tokens", lambda t: t >= -1, "[n] or [B, n] of ids, or -1 where free", np.int32)

  def filter(self, logits_BV, state):
    logits_BV = logits_BV.astype(jnp.float32)
    B, V = logits_BV.shape
    tokens = jnp.asarray(self.tokens, jnp.int32)
    if tokens.ndim == 2 and len(tokens) != B:
      raise SamplingError(
        f"ForcedTokens: tokens has {len(tokens)} rows, the logits have {B}; give [n] or [B, n]"
      )
    n = tokens.shape[-1]
    index_B1 = jnp.minimum(state.drawn_B, n - 1)[:, None]
    wanted_B1 = jnp.take_along_axis(jnp.broadcast_to(tokens, (B, n)), index_B1, axis=1)
    forced_B1 = (wanted_B1 >= 0) & (state.drawn_B[:, None] < n)
    only_BV = jnp.where(jnp.arange(V)[None] == wanted_B1, 0.0, -jnp.inf)
    return jnp.where(forced_B1, only_BV, logits_BV)
