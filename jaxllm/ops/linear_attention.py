"""Linear attention with rotary positions: a state of fixed size in the place of a cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxllm.ops.einsum import einsum


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearState:
  """What the tokens so far left behind, float32: kv_BNHE = sum_j (R_j phi(k_j)) v_j^T, k_BNH = sum_j phi(k_j)."""

  kv: jax.Array
  k: jax.Array


def feature_map(x: jax.Array) -> jax.Array:
  """phi(x) = elu(x) + 1, positive, in float32.  Source: Katharopoulos et al. (2020)."""
  return jax.nn.elu(x.astype(jnp.float32)) + 1


def linear_attention(
  q_BTNH: jax.Array,
  k_BTNH: jax.Array,
  v_BTNE: jax.Array,
  turn: Callable[[jax.Array], jax.Array] = lambda x: x,
  state: LinearState | None = None,
) -> tuple[jax.Array, LinearState]:
  """Causal linear attention, (out_BTNE, the state after these tokens):

    out_i = sum_{j <= i} (R_i phi(q_i))^T (R_j phi(k_j)) v_j / sum_{j <= i} phi(q_i)^T phi(k_j).

  `turn` rotates features [B, T, N, H] by the positions of these tokens, in the numerator only: a turned denominator could
  be 0 or negative.  One call on all tokens is the parallel form, calls on one token each with the state of the last are
  the recurrent one, and any chunks in between give the same.  Source: Su et al. (2021), RoFormer, equation 19.
  """
  q_BTNH, k_BTNH = feature_map(q_BTNH), feature_map(k_BTNH)
  q_turned, k_turned = turn(q_BTNH), turn(k_BTNH)
  v = v_BTNE.astype(jnp.float32)
  T = q_BTNH.shape[1]
  causal_TS = jnp.tri(T, dtype=bool)[None, None]
  scores = lambda q, k: jnp.where(causal_TS, einsum("BTNH,BSNH->BNTS", q, k), 0)
  above = einsum("BNTS,BSNE->BTNE", scores(q_turned, k_turned), v)
  below = jnp.moveaxis(jnp.sum(scores(q_BTNH, k_BTNH), axis=-1), 1, 2)
  new = LinearState(einsum("BSNH,BSNE->BNHE", k_turned, v), jnp.sum(k_BTNH, axis=1))
  if state is not None:
    above += einsum("BTNH,BNHE->BTNE", q_turned, state.kv)
    below += einsum("BTNH,BNH->BTN", q_BTNH, state.k)
    new = jax.tree.map(jnp.add, state, new)
  return (above / below[..., None]).astype(v_BTNE.dtype), new
