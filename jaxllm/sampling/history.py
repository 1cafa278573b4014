"""The tokens of a row, remembered in arrays of fixed shape, and what penalties ask of them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxllm.sampling.base import ROOM, Sampler

EMPTY = -1
"""Stands in a slot that holds no token."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class History:
  """The newest tokens of each row, prompt and draws, and how many were drawn.

  tokens_BC: int32, the newest in the last slot and EMPTY before the first, so that a row's history ends in the
  same place whatever its length; drawn_B: int32.  C ints a row are less than counts of V tokens wherever a
  vocabulary is longer than the text, and serve n-grams as well.
  """

  tokens_BC: jax.Array
  drawn_B: jax.Array

  @classmethod
  def start(cls, tokens_BT, length_B, room):
    """The history of right-padded prompts, with place for `room` draws beyond T."""
    tokens_BT, length_B = jnp.asarray(tokens_BT, jnp.int32), jnp.asarray(length_B, jnp.int32)
    B, T = tokens_BT.shape
    index_BC = jnp.arange(T + room)[None] - (T + room - length_B[:, None])
    tokens_BC = jnp.take_along_axis(tokens_BT, jnp.clip(index_BC, 0, T - 1), axis=1)
    return cls(jnp.where(index_BC >= 0, tokens_BC, EMPTY), jnp.zeros((B,), jnp.int32))

  def grown(self, more):
    """With place for `more` draws before the oldest slot is given up."""
    return History(jnp.pad(self.tokens_BC, ((0, 0), (more, 0)), constant_values=EMPTY), self.drawn_B)

  def push(self, tokens_B):
    """With one token more a row; the oldest slot is given up."""
    tokens_BC = jnp.concatenate([self.tokens_BC[:, 1:], tokens_B[:, None]], axis=1)
    return History(tokens_BC, self.drawn_B + 1)

  def recent(self, last_n, prompt=True):
    """tokens_BC with EMPTY in place of all but the newest last_n (-1: of none), and of the prompt if not wanted.

    last_n, prompt: scalars, or columns [B, 1].
    """
    C = self.tokens_BC.shape[1]
    age_1C = C - jnp.arange(C)[None]  # 1 for the newest
    kept_BC = (last_n < 0) | (age_1C <= last_n)
    kept_BC &= prompt | (age_1C <= self.drawn_B[:, None])
    return jnp.where(kept_BC, self.tokens_BC, EMPTY)


class Remembers(Sampler):
  """A sampler whose state is the History of its rows."""

  def init(self, tokens, lengths, room=ROOM):
    return History.start(tokens, lengths, room)

  def grown(self, state, more):
    return state.grown(more)

  def update(self, tokens_B, state, logits_BV):
    return state.push(tokens_B)


def counts(tokens_BC, vocab_size):
  """How often each token is among tokens_BC, EMPTY apart: int32 [B, V]."""
  return _scattered(tokens_BC, jnp.ones_like(tokens_BC), vocab_size, "add")


def largest(tokens_BC, value_BC, vocab_size):
  """The largest value of each token's slots, 0 for one that has none: int32 [B, V]."""
  return _scattered(tokens_BC, value_BC, vocab_size, "max")


def _scattered(tokens_BC, value_BC, vocab_size, how):
  # EMPTY would count from the end: it goes where `drop` drops it
  place_BC = jnp.where(tokens_BC >= 0, tokens_BC, vocab_size)
  one = lambda place_C, value_C: getattr(jnp.zeros(vocab_size, jnp.int32).at[place_C], how)(
    value_C, mode="drop"
  )
  return jax.vmap(one)(place_BC, value_BC)


def repeats(tokens_BC, limit, breaks_BC=None):
  """For each slot, how many tokens right before it equal the newest ones, at most `limit`: int32 [B, C].

  r_c = the largest n <= limit with tokens[c - k] = tokens[C - k] for k = 1 .. n.  EMPTY equals nothing, nor
  does a token where breaks_BC is true.  limit: a scalar or [B, 1].  Work: C a step, and one step more than the
  longest repeat.  Example: of a b c a b the slots have 0 0 2 0 0, as c follows a b and the text ends in it.
  """
  B, C = tokens_BC.shape
  usable_BC = tokens_BC >= 0 if breaks_BC is None else (tokens_BC >= 0) & ~breaks_BC
  limit_B1 = jnp.broadcast_to(limit, (B, 1))

  def going(carry):
    k, alive_BC, _ = carry
    return (k <= C) & jnp.any(alive_BC)

  def longer(carry):
    k, alive_BC, length_BC = carry
    # slot c meets tokens[c - k], the end tokens[C - k]
    before_BC = jnp.roll(tokens_BC, k, axis=1)
    exists_BC = jnp.roll(usable_BC, k, axis=1) & (jnp.arange(C)[None] >= k)
    newest_B1 = jax.lax.dynamic_slice_in_dim(tokens_BC, C - k, 1, axis=1)
    alive_BC &= exists_BC & (before_BC == newest_B1) & (k <= limit_B1)
    return k + 1, alive_BC, length_BC + alive_BC

  start = jnp.int32(1), jnp.broadcast_to(limit_B1 >= 1, (B, C)), jnp.zeros((B, C), jnp.int32)
  return jax.lax.while_loop(going, longer, start)[2]
