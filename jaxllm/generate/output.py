"""What generation gives back: the new tokens of each row as they come, where a caller ends them, and why they ended."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import ConfigError
from jaxllm.sampling.base import log_probs

ENDED = -1
"""Stands where a token would, in rows that ended before."""

Stop = Callable[[int, list[int]], int | None]
"""stop(row, its new ids so far) -> how many of them to keep, where the row ends there; None where it goes on."""

Reason = Literal["stop", "length", "exhausted"]
"""Why a row ended."""

OnTokens = Callable[[int, list[int]], Any]
"""on_tokens(row, its new ids since the last call)."""


@dataclasses.dataclass(frozen=True)
class Generated:
  """New ids a row, with the stop id that ended it; and why it ended: a stop id or `stop`, max_new_tokens ("length"), or a
  sampler that left nothing to draw ("exhausted").

  logprobs: log softmax(logits)[id] of each new id, before any filter; likeliest: the k likeliest (id, log-probability) at
  each, the likeliest first.  None unless they were asked for.
  """

  tokens: list[list[int]]
  reasons: list[Reason]
  logprobs: list[list[float]] | None = None
  likeliest: list[list[list[tuple[int, float]]]] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
  """New tokens [B, T], ENDED where there are none; their log-probabilities [B, T], and the likeliest ids and theirs [B, T, k].

  None for what was not asked for.
  """

  token: jax.Array
  logprob: jax.Array | None = None
  top: jax.Array | None = None
  top_logprob: jax.Array | None = None

  @staticmethod
  def none(B: int, T: int, logprobs: int | None) -> Drawn:
    """Places for T tokens a row."""
    token_BT = jnp.full((B, T), ENDED, jnp.int32)
    if logprobs is None:
      return Drawn(token_BT)
    zeros = jnp.zeros((B, T, logprobs), jnp.float32)
    return Drawn(token_BT, jnp.zeros((B, T), jnp.float32), zeros.astype(jnp.int32), zeros)

  @staticmethod
  def of(token_B: jax.Array, logits_BV: jax.Array, logprobs: int | None) -> Drawn:
    """One token a row, [B], with what the logits say of it."""
    if logprobs is None:
      return Drawn(token_B)
    logprob_BV = log_probs(logits_BV)
    chosen = jnp.take_along_axis(logprob_BV, jnp.maximum(token_B, 0)[:, None], axis=1)[:, 0]
    top_logprob, top = jax.lax.top_k(logprob_BV, logprobs)
    return Drawn(token_B, chosen, top.astype(jnp.int32), top_logprob)

  def put(self, new: Drawn, at: jax.Array) -> Drawn:
    """With one more token a row, in column `at`."""
    return jax.tree.map(lambda all_BT, new_B: all_BT.at[:, at].set(new_B), self, new)


class Rows:
  """The rows of one call of `generate`, on the host."""

  def __init__(self, B: int, stop: Stop | None, on_tokens: OnTokens | None, logprobs: int | None):
    self.stop, self.on_tokens, self.logprobs = stop, on_tokens, logprobs
    self.tokens: list[list[int]] = [[] for _ in range(B)]
    self.scores: list[list[float]] = [[] for _ in range(B)]
    self.likeliest: list[list[list[tuple[int, float]]]] = [[] for _ in range(B)]
    self.ended = np.zeros(B, bool)

  def add(self, drawn: Drawn) -> bool:
    """Take in what was drawn, [B, T]; whether `stop` has ended a row."""
    drawn = jax.device_get(drawn)
    any_ended = False
    for row, column in enumerate(drawn.token):
      if self.ended[row]:
        continue
      before = len(self.tokens[row])
      for t, token in enumerate(column.tolist()):
        if token == ENDED:
          break
        self.tokens[row].append(token)
        if self.logprobs is not None:
          self.scores[row].append(float(drawn.logprob[row, t]))
          tops = zip(drawn.top[row, t].tolist(), drawn.top_logprob[row, t].tolist(), strict=True)
          self.likeliest[row].append(list(tops))
        if self._stops(row):
          self.ended[row] = any_ended = True
          break
      if self.on_tokens is not None and len(self.tokens[row]) > before:
        self.on_tokens(row, self.tokens[row][before:])
    return any_ended

  def _stops(self, row: int) -> bool:
    keep = None if self.stop is None else self.stop(row, list(self.tokens[row]))
    if keep is None:
      return False
    if (
      isinstance(keep, bool)
      or not isinstance(keep, (int, np.integer))
      or not 0 <= keep <= len(self.tokens[row])
    ):
      raise ConfigError(
        f"stop: found {keep!r} for row {row}, expected None or how many of its {len(self.tokens[row])} ids to keep"
      )
    for kept in (self.tokens, self.scores, self.likeliest):
      del kept[row][keep:]
    return True

  def result(self, done_B: np.ndarray, empty_B: np.ndarray) -> Generated:
    """All of it; done_B: which rows have ended before the last token, empty_B: those whose sampler left nothing."""
    ends = zip((done_B | self.ended).tolist(), (empty_B & ~self.ended).tolist(), strict=True)
    reasons: list[Reason] = ["exhausted" if empty else "stop" if end else "length" for end, empty in ends]
    return Generated(
      self.tokens,
      reasons,
      None if self.logprobs is None else self.scores,
      self.likeliest if self.logprobs else None,
    )
