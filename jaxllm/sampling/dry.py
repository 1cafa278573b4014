"""Don't repeat yourself."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxllm.sampling.base import as_pytree, checked, checked_table, per_row, per_token
from jaxllm.sampling.history import Remembers, largest, repeats

LONGEST = 50
"""Longer repeats count as this long, as in text-generation-webui; llama.cpp stops where the power overflows."""

STEEPEST = 1e30
"""The largest power of the base: what no logit outweighs, and no sum turns into an infinity."""


@as_pytree
@dataclasses.dataclass(frozen=True)
class Dry(Remembers):
  """Lowers the logit of each token that would continue a repetition, the more the longer that is.

  z_v <- z_v - multiplier * base^(n_v - allowed_length) where n_v >= allowed_length, n_v = the length of the longest
  run of tokens, anywhere in the text, that equals the text's end and is followed by v.  No run reaches across a
  breaker, and breakers are never penalised.  n_v counts to 50.

  multiplier: finite, >= 0; 0 is off.  base: finite, >= 1.  allowed_length: an integer >= 1.  last_n: how many of the
  newest tokens are looked at, -1 all, prompt included.  Each is a scalar or [B].  breakers: None, or bool [V] or
  [B, V], the tokens of "\\n", ":", '"' and "*" in both projects.  Raises SamplingError for other values.
  Source: text-generation-webui, pull request 5677 (2024), by p-e-w; llama.cpp's dry.
  """

  multiplier: Any = 0.0
  base: Any = 1.75
  allowed_length: Any = 2
  last_n: Any = -1
  breakers: Any = None

  def __post_init__(self):
    limit = float(np.finfo(np.float32).max)
    checked(self, "multiplier", lambda m: (m >= 0) & (m <= limit), "a finite number >= 0 (0 is off)")
    checked(self, "base", lambda b: (b >= 1) & (b <= limit), "a finite number >= 1")
    checked(self, "allowed_length", lambda n: n >= 1, "an integer >= 1", dtype=np.int32)
    checked(self, "last_n", lambda n: n >= -1, "an integer >= -1 (-1 is all)", dtype=np.int32)
    if self.breakers is not None:
      checked_table(self, "breakers", lambda _: True, "None, or [V] or [B, V] of True or False", bool)

  def filter(self, logits_BV, state):
    logits_BV = logits_BV.astype(jnp.float32)
    B, V = logits_BV.shape
    allowed = per_row(self.allowed_length, logits_BV, jnp.int32)
    tokens_BC = state.recent(per_row(self.last_n, logits_BV, jnp.int32))
    breaks_BV = jnp.zeros((B, V), bool)
    if self.breakers is not None:
      breaks_BV = jnp.broadcast_to(per_token(self.breakers, logits_BV, jnp.bool_), (B, V))
    breaks_BC = jnp.take_along_axis(breaks_BV, jnp.clip(tokens_BC, 0, V - 1), axis=1)
    length_BV = largest(tokens_BC, repeats(tokens_BC, LONGEST, breaks_BC), V)
    power_BV = jnp.power(
      per_row(self.base, logits_BV), jnp.maximum(length_BV - allowed, 0).astype(jnp.float32)
    )
    penalty_BV = per_row(self.multiplier, logits_BV) * jnp.minimum(power_BV, STEEPEST)
    return jnp.where((length_BV >= allowed) & ~breaks_BV, logits_BV - penalty_BV, logits_BV)
