"""The contract of a position method: a method overrides exactly the hooks it changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import numpy as np

from jaxllm.ops.einsum import einsum

Params = Mapping[str, jax.Array]
"""The learned parameters of a position method, by the names that `params` declares."""


@dataclasses.dataclass(frozen=True)
class Position:
  """A decoder without positions, and the defaults of every other method.

  The hooks are called in this order: `embed` once on the token embeddings, for every distinct method of `cfg.layers`,
  however few layers hold it; then per layer either `rotate_q` and `rotate_k` followed by the inner product and `bias`,
  or, where `needs_raw_keys` is True, `scores` on unrotated queries and keys.  `bias` and `scores` see a tile of queries
  and keys at a time, never [T, S].  All layers that hold an equal value share its parameters.

  Shapes: q_BTNH, k_BSKH, q_pos_BT, k_pos_BS (int32); scores and biases are float32 [B or 1, K, G, T, S].
  """

  needs_raw_keys: ClassVar[bool] = False
  """True when a cached key cannot be rotated once and for all, because its rotation depends on the query."""

  seen: ClassVar[tuple[int, int] | None] = None
  """(sinks, window) where a query sees no more than the first tokens and the nearest ones: a cache may drop the others."""

  two_dimensional: ClassVar[bool] = False
  """True when `rotate_q` and `rotate_k` take [B, T, 2] positions: (position, block position)."""

  @property
  def length_limit(self) -> int | None:
    """How many positions the method has, or None where it has all."""
    return None

  def params(self, cfg) -> dict[str, tuple[tuple[int, ...], Callable[..., Any]]]:
    """Learned parameters: {name: (shape, initializer)}; all layers with an equal method share them."""
    return {}

  def embed(self, x_BTD: jax.Array, pos_BT: jax.Array, p: Params) -> jax.Array:
    """Token embeddings (float32) with whatever this method adds to them."""
    return x_BTD

  def frequencies(self, rotary_dim: int, seq_len: int | None = None) -> tuple[np.ndarray, float] | None:
    """(inv_freq [rotary_dim / 2] float64, scale on cos and sin), or None where nothing is rotated."""
    return None

  def rotate_q(self, q_BTNH: jax.Array, pos_BT: jax.Array, table) -> jax.Array:
    """Queries turned by their positions."""
    return q_BTNH

  def rotate_k(self, k_BSKH: jax.Array, pos_BS: jax.Array, table) -> jax.Array:
    """Keys turned by their positions."""
    return k_BSKH

  def bias(
    self, p: Params, q_pos_BT: jax.Array, k_pos_BS: jax.Array, num_heads: int, head_dim: int
  ) -> jax.Array | None:
    """What is added to the scaled scores (divided by sqrt(head_dim)), float32 [B or 1, N, T, S], or None."""
    return None

  def scores(self, q_BTNH, k_BSKH, q_pos_BT, k_pos_BS, table, p: Params) -> jax.Array:
    """Scores of raw queries (already divided by sqrt(head_dim)) and raw keys, float32 [B, K, G, T, S], bias included."""
    q_BTNH = self.rotate_q(q_BTNH, q_pos_BT, table)
    k_BSKH = self.rotate_k(k_BSKH, k_pos_BS, table)
    return add_bias(inner_products(q_BTNH, k_BSKH), self.bias(p, q_pos_BT, k_pos_BS, *q_BTNH.shape[2:]))


@dataclasses.dataclass(frozen=True)
class NoPE(Position):
  """No position encoding at all: order is known only through the causal mask.  Source: Kazemnejad et al. (2023)."""


def inner_products(q_BTNH: jax.Array, k_BSKH: jax.Array) -> jax.Array:
  """q . k for every query head and the key head it shares, float32 [B, K, G, T, S]."""
  B, T, N, H = q_BTNH.shape
  K = k_BSKH.shape[2]
  return einsum("BTKGH,BSKH->BKGTS", q_BTNH.reshape(B, T, K, N // K, H), k_BSKH)


def add_bias(scores_BKGTS: jax.Array, bias_BNTS: jax.Array | None) -> jax.Array:
  """Scores with the bias of each query head added."""
  if bias_BNTS is None:
    return scores_BKGTS
  _, K, G, T, S = scores_BKGTS.shape
  return scores_BKGTS + bias_BNTS.reshape(-1, K, G, T, S)
