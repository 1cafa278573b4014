"""A least number of new tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxllm.sampling.base import as_pytree, checked, checked_table, per_row, per_token
from jaxllm.sampling.history import Remembers


@as_pytree
@dataclasses.dataclass(frozen=True)
class MinNewTokens(Remembers):
  """Excludes the tokens that end a text until `number` others were drawn.

  z_v <- -inf where stop_v and fewer than `number` tokens were drawn.  number: an integer or [B] of them; 0 is off.
  stop: bool [V] or [B, V], as `token_mask(cfg.eos_ids, vocab_size)` makes it.  Raises SamplingError for other values,
  a stop of everything, and another shape than the logits'.
  Source: transformers' MinNewTokensLengthLogitsProcessor.
  """

  number: Any
  stop: Any

  def __post_init__(self):
    checked(self, "number", lambda n: n >= 0, "an integer >= 0 (0 is off)", dtype=np.int32)
    valid = lambda mask: (~mask).any(axis=-1)
    checked_table(self, "stop", valid, "[V] or [B, V] of True or False, not all of a row True", np.bool_)

  def filter(self, logits_BV, state):
    logits_BV = logits_BV.astype(jnp.float32)
    early_B1 = state.drawn_B[:, None] < per_row(self.number, logits_BV, jnp.int32)
    return jnp.where(early_B1 & per_token(self.stop, logits_BV, jnp.bool_), -jnp.inf, logits_BV)
