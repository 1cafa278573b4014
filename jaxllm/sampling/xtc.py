"""Exclude top choices."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.sampling.base import (
  ROOM,
  Sampler,
  as_pytree,
  checked,
  checked_table,
  log_probs,
  per_row,
  per_token,
)


@as_pytree
@dataclasses.dataclass(frozen=True)
class Xtc(Sampler):
  """At some draws, excludes every token above a threshold but the least likely of those.

  With probability `probability`, a draw and a row: exclude_v = (p_v >= threshold) and v is not the last of those
  in descending order (of equal ones the highest id is last).  Where fewer than two reach the threshold nothing
  happens, so above 0.5 never.  probability, threshold: scalars or [B] in [0, 1]; probability 0 is off.  keep: None,
  as llama.cpp, or a mask of tokens, bool [V] or [B, V]: where one of them would be excluded, nothing is, as
  text-generation-webui has it for the newline and the end of a text.  The state is a uniform number a row, 1 before
  the first draw.  Raises SamplingError for other values.
  Source: text-generation-webui, pull request 6335 (2024), by p-e-w; llama.cpp's xtc.
  """

  probability: Any = 0.0
  threshold: Any = 0.1
  keep: Any = None

  def __post_init__(self):
    for name in ("probability", "threshold"):
      checked(self, name, lambda p: (p >= 0) & (p <= 1), "a number in [0, 1]")
    if self.keep is not None:
      checked_table(self, "keep", lambda _: True, "None, or [V] or [B, V] of True or False", bool)

  def init(self, tokens, lengths, room=ROOM):
    return jnp.ones(len(lengths), jnp.float32)

  def toss(self, key_B, state):
    # a key of its own: the row's key draws the token
    uniform = lambda key: jax.random.uniform(jax.random.fold_in(key, 1))
    return jax.vmap(uniform)(key_B)

  def filter(self, logits_BV, state):
    logits_BV = logits_BV.astype(jnp.float32)
    V = logits_BV.shape[-1]
    # a threshold of 0 is reached by all that can be drawn, not by what cannot
    above_BV = log_probs(logits_BV) >= jnp.log(per_row(self.threshold, logits_BV))
    above_BV &= logits_BV > -jnp.inf
    least_B1 = jnp.min(jnp.where(above_BV, logits_BV, jnp.inf), axis=-1, keepdims=True)
    last_B1 = V - 1 - jnp.argmax((above_BV & (logits_BV == least_B1))[:, ::-1], axis=-1, keepdims=True)
    excluded_BV = above_BV & (jnp.arange(V)[None] != last_B1)
    acts_B1 = state[:, None] < per_row(self.probability, logits_BV)
    if self.keep is not None:
      kept_BV = per_token(self.keep, logits_BV, jnp.bool_)
      acts_B1 &= ~jnp.any(excluded_BV & kept_BV, axis=-1, keepdims=True)
    return jnp.where(acts_B1 & excluded_BV, -jnp.inf, logits_BV)
