"""Blockwise attention: the same result as `attention.Plain` in memory of a tile, for long sequences."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxllm.errors import ConfigError
from jaxllm.ops.attention import MASKED, Score, Side, allowed, per_head, zero_unused
from jaxllm.ops.einsum import einsum


@dataclasses.dataclass(frozen=True)
class Blockwise:
  """Online-softmax attention over tiles of q_block queries and k_block keys; tiles that the mask empties are skipped.

  For each query tile, over key tiles: m' = max(m, max(s)), l' = l e^(m - m') + sum(e^(s - m')), and the output likewise.
  Memory is one tile of scores forward; the backward pass recomputes tiles.
  Source: Milakov and Gimelshein (2018); Rabe and Staats (2021).
  """

  q_block: int = 256
  k_block: int = 256

  def __post_init__(self):
    for name in ("q_block", "k_block"):
      value = getattr(self, name)
      if not isinstance(value, int) or value < 1:
        raise ConfigError(f"Blockwise.{name}: found {value!r}, expected an integer of at least 1")

  def __call__(
    self,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_side: Side,
    k_side: Side,
    window: int | None,
    score: Score,
    sinks_N: jax.Array | None = None,
  ) -> jax.Array:
    B, T, N, H = q_BTNH.shape
    S = k_BSKH.shape[1]
    t, s = min(self.q_block, T), min(self.k_block, S)
    v_BSKH = zero_unused(v_BSKH, k_side.valid)
    if S % s:  # padding keys must be known as such
      real = jnp.ones((1, S), bool) if k_side.valid is None else k_side.valid
      k_side = dataclasses.replace(k_side, valid=real)
    keys = jax.tree.map(lambda x: _tiles(x, s), (k_BSKH, v_BSKH, k_side))
    queries = jax.tree.map(lambda x: _tiles(x, t), (q_BTNH, q_side))

    def query_tile(query):
      q, q_tile = query

      @jax.checkpoint
      def key_tile(carry, key):
        k, v, k_tile = key
        mask = allowed(q_tile, k_tile, window)
        return jax.lax.cond(
          jnp.any(mask), _attend, lambda carry, *_: carry, carry, q, q_tile, k, v, k_tile, mask
        ), None

      def _attend(carry, q, q_tile, k, v, k_tile, mask):
        top, total, out = carry
        scores = score(q, k, q_tile.pos, k_tile.pos)
        mask = mask[:, None, None]
        # the result does not depend on the running maximum, so no gradient flows through it
        new_top = jax.lax.stop_gradient(jnp.maximum(top, jnp.max(jnp.where(mask, scores, MASKED), axis=-1)))
        # masked inside the exponential: a row with no key in this tile yet has the top MASKED, and inf * 0 as gradient
        exp = jnp.exp(jnp.where(mask, scores - new_top[..., None], MASKED))
        decay = jnp.exp(top - new_top)
        total = total * decay + jnp.sum(exp, axis=-1)
        out = out * decay[..., None] + einsum("BKGTS,BSKH->BKGTH", exp.astype(v.dtype), v)
        return new_top, total, out

      K = k_BSKH.shape[2]
      rows = (B, K, N // K, t)
      # the type of the scores, whatever JAX's default is
      zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
      if sinks_N is None:
        top, total = zeros(rows) + MASKED, zeros(rows)
      else:  # the sink is the first key seen, and its value is 0
        sink = zeros(rows) + per_head(sinks_N, K)[..., 0]
        top = jax.lax.stop_gradient(sink)
        total = jnp.exp(sink - top)
      start = (top, total, zeros((*rows, H)))
      (_, total, out), _ = jax.lax.scan(key_tile, start, keys)
      return jnp.moveaxis(out / jnp.where(total > 0, total, 1.0)[..., None], 3, 1).astype(q_BTNH.dtype)

    out = jax.lax.map(query_tile, queries)  # [T / t, B, t, K, G, H]
    return jnp.moveaxis(out, 0, 1).reshape(B, -1, N, H)[:, :T]


def _tiles(x: jax.Array, size: int) -> jax.Array:
  """[B, S, ...] -> [ceil(S / size), B, size, ...], padded with zeros (False for a mask)."""
  B, S = x.shape[:2]
  x = jnp.pad(x, [(0, 0), (0, -S % size)] + [(0, 0)] * (x.ndim - 2))
  return jnp.moveaxis(x.reshape(B, -1, size, *x.shape[2:]), 1, 0)
