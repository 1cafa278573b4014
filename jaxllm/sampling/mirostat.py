"""Mirostat, version 2."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxllm.sampling.base import ROOM, Sampler, as_pytree, checked, log_probs, only_argmax

BITS = float(1 / np.log(2.0))
"""A nat, in bits."""


@as_pytree
@dataclasses.dataclass(frozen=True)
class Mirostat(Sampler):
  """Steers the surprise of the text to tau: a cutoff that follows what was drawn.

  keep_v = (-log2 p_v <= mu); where there are none, the likeliest (of equal ones the lowest id).  After each draw
  mu <- mu - eta (s - tau), s = -log2 of the token's probability among those it was drawn from; mu = 2 tau at
  first.  tau: bits a token, a scalar or [B], finite and above 0 (llama.cpp: 5).  eta: the rate, finite, >= 0 (0.1).
  The state is mu [B].  It takes the place of top-k, top-p and the like, after temperature, and is the last of a
  chain; it is kept where filters left nothing to draw.  Raises SamplingError for other values.
  Source: Basu et al. (2021), arXiv 2007.14966, algorithm 2 without its estimate of the exponent, and with s after
  the cutoff rather than before it, as llama.cpp and text-generation-webui have it.
  """

  tau: Any = 5.0
  eta: Any = 0.1

  def __post_init__(self):
    largest = float(np.finfo(np.float32).max) / 2
    checked(self, "tau", lambda t: (t > 0) & (t <= largest), "a finite number > 0, in bits")
    checked(self, "eta", lambda e: (e >= 0) & (e <= largest), "a finite number >= 0")

  def init(self, tokens, lengths, room=ROOM):
    return jnp.broadcast_to(2 * jnp.asarray(self.tau, jnp.float32), (len(lengths),))

  def filter(self, logits_BV, state):
    logits_BV = logits_BV.astype(jnp.float32)
    keep_BV = _surprise(logits_BV) <= state[:, None]
    some_B1 = jnp.any(keep_BV, axis=-1, keepdims=True)
    return jnp.where(some_B1, jnp.where(keep_BV, logits_BV, -jnp.inf), only_argmax(logits_BV))

  def update(self, tokens_B, state, logits_BV):
    place_B1 = jnp.maximum(tokens_B, 0)[:, None]
    surprise_B = jnp.take_along_axis(_surprise(logits_BV), place_B1, axis=-1)[:, 0]
    tau, eta = (jnp.broadcast_to(jnp.asarray(x, jnp.float32), state.shape) for x in (self.tau, self.eta))
    return jnp.where(tokens_B >= 0, state - eta * (surprise_B - tau), state)


def _surprise(logits_BV):
  """-log2 p_v; of a row with nothing left, whose softmax is NaN, that of equal logits."""
  left_B1 = jnp.any(logits_BV > -jnp.inf, axis=-1, keepdims=True)
  return -log_probs(jnp.where(left_B1, logits_BV, 0.0)) * BITS
