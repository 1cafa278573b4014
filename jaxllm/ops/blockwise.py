"""Blockwise attention: the same result as `attention.Plain` in memory of a tile, for long sequences."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxllm.errors import ConfigError
from jaxllm.ops.attention import MASKED, ScoreFn, Side, allowed, per_head, zero_unused
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
    score: ScoreFn,
    sinks_N: jax.Array | None = None,
  ) -> jax.Array:
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    t, s = min(self.q_block, T), min(self.k_block, S)
    v_BSKH = zero_unused(v_BSKH, k_side.valid)
    if S % s:  # padding keys must be known as such
      real = jnp.ones((1, S), bool) if k_side.valid is None else k_side.valid
      k_side = dataclasses.replace(k_side, valid=real)
    # where order is known while tracing, two numbers say that a tile is empty, and its mask is never computed
    by_number = q_side.in_order and k_side.in_order and q_side.prefix is None and q_side.segment is None
    q_side, k_side = (dataclasses.replace(side, in_order=False) for side in (q_side, k_side))  # tiles are not
    # a gradient is added up over tiles in the type of what all of them read
    q_type, k_type, v_type = (x.dtype for x in (q_BTNH, k_BSKH, v_BSKH))
    q_BTNH = q_BTNH.astype(jnp.float32) if s < S else q_BTNH
    if t < T:
      k_BSKH, v_BSKH = k_BSKH.astype(jnp.float32), v_BSKH.astype(jnp.float32)
    # heads before tokens: what products want, and a transpose here is one a call in place of one a tile
    keys = [_tiles(jnp.moveaxis(x, 2, 1), s, 2) for x in (k_BSKH, v_BSKH)]
    keys += [jax.tree.map(lambda x: _tiles(x, s), k_side)]
    queries = (_tiles(jnp.moveaxis(q_BTNH, 2, 1), t, 2), jax.tree.map(lambda x: _tiles(x, t), q_side))
    sinks = None if sinks_N is None else per_head(sinks_N, K)
    number = lambda tiles: jnp.arange(tiles.shape[0], dtype=jnp.int32)

    def query_tile(query):
      i, q, q_tile = query
      q_BTNH = jnp.moveaxis(q, 1, 2)

      @jax.checkpoint
      def key_tile(carry, key):
        j, k_BKSH, v_BKSH, k_tile = key

        def attend(carry):
          top, total, out = carry
          q, k, v = q_BTNH.astype(q_type), jnp.moveaxis(k_BKSH, 1, 2).astype(k_type), v_BKSH.astype(v_type)
          scores = score(q, k, q_tile.pos, k_tile.pos)
          mask = (allowed(q_tile, k_tile, window) if by_number else seen)[:, None, None]
          # the result does not depend on the running maximum, so no gradient flows through it
          new_top = jax.lax.stop_gradient(jnp.maximum(top, jnp.max(jnp.where(mask, scores, MASKED), axis=-1)))
          # masked inside the exponential: a row with no key in this tile yet has the top MASKED, and inf * 0 as gradient
          exp = jnp.exp(jnp.where(mask, scores - new_top[..., None], MASKED))
          decay = jnp.exp(top - new_top)
          total = total * decay + jnp.sum(exp, axis=-1)
          out = out * decay[..., None] + einsum("BKGTS,BKSH->BKGTH", exp.astype(v.dtype), v)
          return new_top, total, out

        if by_number:
          some = j * s < (i + 1) * t
          if window is not None:
            some &= i * t - (j * s + s - 1) < window
        else:
          seen = allowed(q_tile, k_tile, window)
          some = jnp.any(seen)
        return jax.lax.cond(some, attend, lambda carry: carry, carry), None

      rows = (B, K, N // K, t)
      # the type of the scores, whatever JAX's default is
      zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
      if sinks_N is None:
        top, total = zeros(rows) + MASKED, zeros(rows)
      else:  # the sink is the first key seen, and its value is 0
        sink = zeros(rows) + sinks[..., 0]
        top = jax.lax.stop_gradient(sink)
        total = jnp.exp(sink - top)
      start = (top, total, zeros((*rows, H)))
      (_, total, out), _ = jax.lax.scan(key_tile, start, (number(keys[0]), *keys))
      return (out / jnp.where(total > 0, total, 1.0)[..., None]).astype(q_type)

    out = jax.lax.map(query_tile, (number(queries[0]), *queries))  # [T / t, B, K, G, t, H]
    return jnp.moveaxis(out, (0, 4), (1, 2)).reshape(B, -1, N, H)[:, :T]


def _tiles(x: jax.Array, size: int, axis: int = 1) -> jax.Array:
  """[B, ..., S, ...] -> [ceil(S / size), B, ..., size, ...], S on `axis`, padded with zeros (False for a mask)."""
  pad = [(0, 0)] * x.ndim
  pad[axis] = (0, -x.shape[axis] % size)
  x = jnp.pad(x, pad)
  return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis, 0)
