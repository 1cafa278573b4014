"""Attention for CPUs: a head at a time, each block of queries over exactly the keys that it sees."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxllm.errors import ConfigError
from jaxllm.ops.attention import MASKED, Side
from jaxllm.ops.call import Call
from jaxllm.ops.einsum import turned
from jaxllm.ops.kernels import Kernel


@dataclasses.dataclass(frozen=True)
class ByHead(Kernel):
  """softmax(q k^T) v of `block` queries at a time and the keys up to the last of them, in a loop over rows and key heads.

  The scores of a block stay in a core's cache, its products are two-dimensional, which a CPU computes with all cores, and what
  no query sees is not computed.  The backward pass computes the scores again from the logarithm of each query's sum:
  dS = P (dO V^T - sum(dO O)), dQ = dS K, dK = dS^T Q, dV = P^T dO.
  Blocks are unrolled, so it is for texts of a few of them; a rest of the text makes a shorter last one.
  Source: Dao et al. (2022), FlashAttention, algorithm 4 (the backward pass); Dao (2023), section 3.1.
  """

  name: ClassVar[str] = "by_head"

  block: int = 128

  def __post_init__(self):
    if not isinstance(self.block, int) or self.block < 1:
      raise ConfigError(f"ByHead.block: found {self.block!r}, expected an integer of at least 1")

  def refusal(self, call: Call) -> str | None:
    if reason := super().refusal(call):
      return reason
    if call.sinks:
      return "it has no attention sinks"
    if call.softcap is not None:
      return "it does not cap scores"
    return None

  def attend(self, q_BTNH, k_BSKH, v_BSKH, q_side, k_side, window, softcap, sinks_N) -> jax.Array:
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    group = lambda x: jnp.moveaxis(x.reshape(B, T, K, -1, H), 1, 3).reshape(B * K, -1, T, H)
    labels = _labels(q_side, k_side, (B, T))
    if labels is not None:
      labels = tuple(jnp.repeat(x, K, axis=0) for x in labels)
    q, k, v = group(q_BTNH), group(k_BSKH)[:, 0], group(v_BSKH)[:, 0]
    out = _attend(self.block, window, q, k, v, labels).reshape(B, K, -1, T, H)
    return jnp.moveaxis(out, 3, 1).reshape(B, T, N, H)


def _labels(q_side: Side, k_side: Side, shape: tuple[int, int]) -> tuple[jax.Array, jax.Array] | None:
  """Numbers of queries and keys that are equal where a mask other than order lets them meet, or None: there is no other."""
  if k_side.valid is None and (q_side.segment is None or k_side.segment is None):
    return None
  some = q_side.segment is not None and k_side.segment is not None
  q, k = (side.segment if some else jnp.zeros((1, 1), jnp.int32) for side in (q_side, k_side))
  if k_side.valid is not None:
    # a segment of their own for what is no token, which no query has
    q, k = 2 * q, jnp.where(k_side.valid, 2 * k, 2 * k + 1)
  return tuple(jnp.broadcast_to(x, shape) for x in (q, k))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(block: int, window: int | None, q_MGTH, k_MTH, v_MTH, labels):
  return _forward(block, window, q_MGTH, k_MTH, v_MTH, labels)[0]


def _forward(block, window, q_MGTH, k_MTH, v_MTH, labels):
  """(output, (arguments, output, logarithm of the sum of exponentials)); M: rows and key heads, one at a time."""

  def head(x):
    q_GTH, k_TH, v_TH, labels = x
    outs, logs = [], []
    for rows, keys in _blocks(q_GTH.shape[1], block, window):
      scores, mask = _scores(q_GTH, k_TH, labels, rows, keys, window)
      top = jnp.max(scores, axis=-1, keepdims=True)
      exp = jnp.where(mask, jnp.exp(scores - top), 0.0)
      total = jnp.maximum(jnp.sum(exp, axis=-1, keepdims=True), 1e-30)  # at least 1 wherever a key is seen
      weighted = _dot(_flat(exp).astype(v_TH.dtype), v_TH[keys]).reshape(*exp.shape[:2], -1)
      outs.append((weighted / total).astype(q_GTH.dtype))
      logs.append(top + jnp.log(total))
    return jnp.concatenate(outs, axis=1), jnp.concatenate(logs, axis=1)

  out, logs = jax.lax.map(head, (q_MGTH, k_MTH, v_MTH, labels))
  return out, (q_MGTH, k_MTH, v_MTH, labels, out, logs)


def _backward(block, window, kept, g_MGTH):
  def head(x):
    (q_GTH, k_TH, v_TH, labels, out_GTH, log_GT1), g_GTH = x
    T, dtype = len(k_TH), q_GTH.dtype
    both = g_GTH.astype(jnp.float32) * out_GTH.astype(jnp.float32)
    inner_GT1 = jnp.sum(both, axis=-1, keepdims=True)
    by_q, by_k, by_v = (
      [],
      jnp.zeros((k_TH.shape[1], T), jnp.float32),
      jnp.zeros(v_TH.shape[::-1], jnp.float32),
    )
    for rows, keys in _blocks(T, block, window):
      scores, mask = _scores(q_GTH, k_TH, labels, rows, keys, window)
      q, g = q_GTH[:, rows], g_GTH[:, rows]
      p = jnp.where(mask, jnp.exp(scores - log_GT1[:, rows]), 0.0)
      by_p = _dot(_flat(g), v_TH[keys], turn=True).reshape(p.shape)
      by_scores = _flat(p * (by_p - inner_GT1[:, rows])).astype(dtype)
      by_q.append(_dot(by_scores, k_TH[keys]).reshape(q.shape))
      # turned: what is small is transposed, and not the scores
      by_k = by_k.at[:, keys].add(_dot(turned(_flat(q)), by_scores))
      by_v = by_v.at[:, keys].add(_dot(turned(_flat(g)), _flat(p).astype(dtype)))
    return jnp.concatenate(by_q, axis=1).astype(dtype), turned(by_k).astype(dtype), turned(by_v).astype(dtype)

  return *jax.lax.map(head, (kept, g_MGTH)), None


_attend.defvjp(_forward, _backward)


def _blocks(length: int, block: int, window: int | None):
  """Slices of each block's queries, and of the keys that its first to last query see."""
  for start in range(0, length, block):
    end = min(start + block, length)
    yield slice(start, end), slice(0 if window is None else max(0, start - window + 1), end)


def _scores(q_GTH, k_TH, labels, rows: slice, keys: slice, window: int | None) -> tuple[jax.Array, jax.Array]:
  """(scores of a block, float32 [G, t, s], MASKED where it does not see; what it sees, [1, t, s])."""
  q = q_GTH[:, rows]
  index_t, index_s = (jnp.arange(x.start, x.stop, dtype=jnp.int32) for x in (rows, keys))
  distance = index_t[None, :, None] - index_s[None, None]
  mask = distance >= 0
  if window is not None:
    mask &= distance < window
  if labels is not None:
    mask &= labels[0][None, rows, None] == labels[1][None, None, keys]
  scores = _dot(_flat(q), k_TH[keys], turn=True).reshape(*q.shape[:2], -1)
  return jnp.where(mask, scores, MASKED), mask


def _flat(x: jax.Array) -> jax.Array:
  """[G, t, ...] -> [G t, ...]"""
  return x.reshape(-1, x.shape[-1])


def _dot(a: jax.Array, b: jax.Array, turn: bool = False) -> jax.Array:
  """a b, or a b^T, float32."""
  axes = (((1,), (1 if turn else 0,)), ((), ()))
  return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)
