"""Hidden states to logits, and the two changes to gradients and values that models make there."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxllm.leaf import LoRA, Matrix, QTensor, dense
from jaxllm.ops.constrain import constrain
from jaxllm.ops.device import current_device
from jaxllm.ops.einsum import einsum

ROWS = 64
"""The columns of a quantized head whose lengths are taken at a time."""


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
  """cap tanh(x / cap), which stays within (-cap, cap); x itself for None.  Source: Gemma 2 (2024), section 2."""
  return x if cap is None else cap * jnp.tanh(x / cap)


def shrink_gradient(w: jax.Array, share: float) -> jax.Array:
  """w, bit for bit, with `share` of its gradient: w_used = share w + stop_gradient((1 - share) w).

  Written as stop_gradient(w) + share (w - stop_gradient(w)), whose second term is exactly 0.
  Source: Zeng et al. (2022), GLM-130B, section 3.1 (there alpha, 0.1).
  """
  if share == 1:
    return w
  still = jax.lax.stop_gradient(w)
  return still + share * (w - still)


def inverse_lengths(w_DV: jax.Array | Matrix | QTensor) -> jax.Array:
  """1 / max(||w_v||_2, 1e-12) of each column of w [D, V], float32 [V].  Source: torch.nn.functional.normalize.

  Of a `leaf.QTensor`, ROWS columns at a time become floats, but on a mesh, which cuts it already.
  """
  if isinstance(w_DV, QTensor) and not current_device().partitioned:
    table_VD, index_V = w_DV.T, jnp.arange(w_DV.shape[1])
    squares_V = jax.lax.map(lambda v: jnp.sum(jnp.square(table_VD[v])), index_V, batch_size=ROWS)
  else:
    squares_V = jnp.sum(jnp.square(dense(w_DV).astype(jnp.float32)), axis=-2)
  # the maximum under the root, as the gradient of a root at 0 is infinite
  return jax.lax.rsqrt(jnp.maximum(squares_V, 1e-24))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Head:
  """logits = soft_cap(scale (x w + bias)), float32; w [D, V], an array, a `leaf.Matrix`, `QTensor` or `LoRA`.

  normed: each column of w counts as divided by its length, w_v / max(||w_v||_2, 1e-12), so that a logit is the hidden state's
  part along the token's direction.  Source of the normed head: Yang et al. (2023), Baichuan 2, NormHead.
  inner: a matrix [D, E] that hidden states go through first, w being [E, V] then.
  vocab_size: how many logits there are, where w and bias were padded to a size that divides over a mesh; None: all of w's.
  """

  w: jax.Array | Matrix | QTensor | LoRA
  bias: jax.Array | None = None
  softcap: float | None = dataclasses.field(default=None, metadata=dict(static=True))
  scale: float = dataclasses.field(default=1.0, metadata=dict(static=True))
  vocab_size: int | None = dataclasses.field(default=None, metadata=dict(static=True))
  normed: bool = dataclasses.field(default=False, metadata=dict(static=True))
  inner: jax.Array | Matrix | QTensor | LoRA | None = dataclasses.field(default=None, kw_only=True)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Logits [..., V] of hidden states [..., D], computed in their type and accumulated in float32."""
    if self.inner is not None:
      x = einsum("...D,DE->...E", x, self.inner.astype(x.dtype), out_dtype=x.dtype)
    logits = einsum("...D,DV->...V", x, self.w.astype(x.dtype))
    if self.normed:
      logits = logits * jnp.expand_dims(inverse_lengths(self.w), range(x.ndim - 1))
    logits = constrain(logits, ("B" + "-" * x.ndim)[: x.ndim - 1] + "V")
    if self.bias is not None:
      logits += jnp.expand_dims(self.bias, range(x.ndim - 1))
    if self.vocab_size is not None:
      logits = logits[..., : self.vocab_size]
    return soft_cap(logits if self.scale == 1 else logits * self.scale, self.softcap)
