"""Attention cores: masked softmax attention over scores that a position method computes.

A core is a value: core(q, k, v, q_side, k_side, window, score, sinks) with q_BTNH, k_BSKH, v_BSKH,
score(q_tile, k_tile, q_pos, k_pos) -> float32 [B or 1, K, G, t, s], and sinks_N, a logit a head that every query attends to
without a value (None: there is none).  Masks see order (index), methods see positions (pos).  A core that computes inner
products itself, as fused kernels do, takes a `Score` only, and one whose `hooks` is None.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange

from jaxllm.ops.einsum import einsum

MASKED = -1e30
"""A score that no real one is below: finite, so that masked rows and their gradients stay finite too."""

ScoreFn = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Score:
  """A score function, and what a kernel that does not call it has to know.

  method: the position method's name, for errors.  hooks: what makes the scores more than soft_cap(q . k), as half a sentence
  ("it adds a bias to the scores"), or None where they are that and nothing else.  softcap: the cap, or None.
  """

  compute: ScoreFn
  method: str
  hooks: str | None = None
  softcap: float | None = None

  def __call__(self, q: jax.Array, k: jax.Array, q_pos: jax.Array, k_pos: jax.Array) -> jax.Array:
    """Scores of a tile, float32 [B or 1, K, G, t, s]."""
    return self.compute(q, k, q_pos, k_pos)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Side:
  """What masks and position methods know of the queries or of the keys; leading axis B or 1, int32.

  index: order in the sequence (causality, windows); pos: what position methods rotate by; segment: packed sequences attend
  within their own number only (None: one segment); valid: False for padding and unused cache slots (None: all are real);
  block: the second position of queries and new keys for two-dimensional methods (None: 0), which a cache does not keep.
  prefix: keys of an index below it are seen by every query (read on the queries' side; None: causal throughout).
  in_order: known while tracing that index is 0, 1, 2, ... in every row, so that a program need not look.
  """

  index: jax.Array
  pos: jax.Array
  segment: jax.Array | None = None
  valid: jax.Array | None = None
  block: jax.Array | None = None
  prefix: jax.Array | None = None
  in_order: bool = dataclasses.field(default=False, metadata=dict(static=True))


def allowed(q: Side, k: Side, window: int | None) -> jax.Array:
  """Which keys each query attends to, bool [B or 1, T, S]: causal or in the prefix, within `window`, own segment, real keys.

  A window of w keeps exactly min(w, i + 1) keys: those with i - j < w, the query itself included.
  """
  distance_BTS = q.index[:, :, None] - k.index[:, None, :]
  mask_BTS = distance_BTS >= 0
  if q.prefix is not None:
    mask_BTS |= k.index[:, None, :] < q.prefix[:, :, None]
  if window is not None:
    mask_BTS &= distance_BTS < window
  if q.segment is not None and k.segment is not None:
    mask_BTS &= q.segment[:, :, None] == k.segment[:, None, :]
  if k.valid is not None:
    mask_BTS &= k.valid[:, None, :]
  return mask_BTS


def zero_unused(x_BSKH: jax.Array, valid_BS: jax.Array | None) -> jax.Array:
  """Values with the slots that hold no token set to 0, as 0 * NaN would reach every query."""
  return x_BSKH if valid_BS is None else jnp.where(valid_BS[:, :, None, None], x_BSKH, 0)


def per_head(x_N: jax.Array, num_kv_heads: int) -> jax.Array:
  """A number a query head, float32 [1, K, G, 1, 1]."""
  return x_N.astype(jnp.float32).reshape(1, num_kv_heads, -1, 1, 1)


@jax.custom_jvp
def masked_softmax(scores: jax.Array, mask: jax.Array) -> jax.Array:
  """Softmax over the last axis of the scores that `mask` allows; a row that allows none is all 0, with gradient 0."""
  scores = jnp.where(mask, scores, MASKED)
  exp = jnp.where(mask, jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True)), 0.0)
  total = jnp.sum(exp, axis=-1, keepdims=True)  # at least 1 wherever a key is allowed
  return exp / jnp.maximum(total, 1e-30)


@masked_softmax.defjvp
def _masked_softmax_jvp(primals, tangents):
  probs = masked_softmax(*primals)
  scaled = probs * jnp.where(primals[1], tangents[0], 0.0)
  return probs, scaled - probs * jnp.sum(scaled, axis=-1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Plain:
  """softmax(scores) v with all scores at once: the reference, and the faster one for short sequences.

  Source: Vaswani et al. (2017), section 3.2.1.
  """

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
    scores_BKGTS = score(q_BTNH, k_BSKH, q_side.pos, k_side.pos)
    mask_BKGTS = allowed(q_side, k_side, window)[:, None, None]
    if sinks_N is None:
      probs_BKGTS = masked_softmax(scores_BKGTS, mask_BKGTS)
    else:  # one more key, which all queries see, and whose value is 0
      sink = jnp.broadcast_to(per_head(sinks_N, k_BSKH.shape[2]), (*scores_BKGTS.shape[:-1], 1))
      mask = jnp.pad(mask_BKGTS, [(0, 0)] * 4 + [(0, 1)], constant_values=True)
      probs_BKGTS = masked_softmax(jnp.concatenate([scores_BKGTS, sink], -1), mask)[..., :-1]
    v_BSKH = zero_unused(v_BSKH, k_side.valid)
    # heads and queries in one, R: a plain batch of products, which a CPU computes three times as fast as one of more axes
    probs_BKRS = rearrange(probs_BKGTS.astype(v_BSKH.dtype), "B K G T S -> B K (G T) S")
    out_BKRH = einsum("BKRS,BSKH->BKRH", probs_BKRS, v_BSKH, out_dtype=q_BTNH.dtype)
    return rearrange(out_BKRH, "B K (G T) H -> B T (K G) H", T=q_BTNH.shape[1])
