"""Products over a width that a mesh splits, between tokens that it splits too: one all-gather before, one reduce-scatter after.

The compiler sums each product over the mesh by itself, in float32 and before the sum of several.  An axis of its own for the
parts of the width, P, one a device, makes of it one sum that is known as such: what a device adds up is added up first.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.leaf import LoRA, Matrix, QTensor
from jaxllm.ops.constrain import compiler_axes, constrain, gathered


class Fan(NamedTuple):
  """Tokens of the residual stream, gathered: [B, T, D], and a copy of them for each part of a width, [P, B, T, D]."""

  whole: jax.Array
  parts: jax.Array


def fan(x_BTD: jax.Array, sequence: bool) -> jax.Array | Fan:
  """What products over a split width read: x itself without sequence parallelism or a tensor axis."""
  tensor = compiler_axes().get("tensor", 1)
  if not sequence or tensor == 1:
    return x_BTD
  return Fan(gathered(x_BTD, True), _fanned(x_BTD, tensor))


def columns(x: Fan, w_DF: jax.Array | Matrix | QTensor | LoRA) -> jax.Array | None:
  """x w, float32 [B, T, F], of a weight whose columns are split; None for one that is not split, or no array."""
  parts = len(x.parts)
  if isinstance(w_DF, (QTensor, LoRA)) or w_DF.shape[-1] % parts:
    return None
  if isinstance(w_DF, Matrix) and w_DF.stored == "oi":
    w = constrain(w_DF.value.reshape(parts, -1, w_DF.shape[0]), "N--")
    out = jnp.einsum("PBTD,PFD->BTPF", x.parts, w, preferred_element_type=jnp.float32)
  else:
    value = w_DF.value if isinstance(w_DF, Matrix) else w_DF
    w = constrain(value.reshape(w_DF.shape[0], parts, -1), "-N-")
    out = jnp.einsum("PBTD,DPF->BTPF", x.parts, w, preferred_element_type=jnp.float32)
  return constrain(out, "BTN-").reshape(*out.shape[:2], -1)


def rows(x_BTF: jax.Array, w_FD: jax.Array | Matrix | QTensor | LoRA, dtype) -> jax.Array | None:
  """x w [B, T, D] with tokens split again, summed in float32, of a weight whose rows are split; None as for `columns`."""
  parts = compiler_axes().get("tensor", 1)
  if isinstance(w_FD, (QTensor, LoRA)) or parts == 1 or w_FD.shape[0] % parts:
    return None
  x = constrain(x_BTF.reshape(*x_BTF.shape[:2], parts, -1), "BTN-")
  if isinstance(w_FD, Matrix) and w_FD.stored == "oi":
    w = constrain(w_FD.value.reshape(w_FD.shape[1], parts, -1), "-N-")
    out = jnp.einsum("BTPF,DPF->PBTD", x, w, preferred_element_type=jnp.float32)
  else:
    value = w_FD.value if isinstance(w_FD, Matrix) else w_FD
    w = constrain(value.reshape(parts, -1, w_FD.shape[1]), "N--")
    out = jnp.einsum("BTPF,PFD->PBTD", x, w, preferred_element_type=jnp.float32)
  return _joined(constrain(out, "NBTD"), jnp.dtype(dtype))


def _copies(x_BTD: jax.Array, parts: int) -> jax.Array:
  return constrain(jnp.broadcast_to(constrain(x_BTD, "BTD")[None], (parts, *x_BTD.shape)), "NBTD")


def _sum(x_PBTD: jax.Array, dtype) -> jax.Array:
  return constrain(jnp.sum(x_PBTD.astype(jnp.float32), axis=0), "BTD", sequence=True).astype(dtype)


# each is the transpose of the other, which the transpose of a constraint, the same one, would not give
_fanned = jax.custom_vjp(_copies, nondiff_argnums=(1,))
_fanned.defvjp(lambda x, parts: (_copies(x, parts), None), lambda parts, _, g: (_sum(g, g.dtype),))
_joined = jax.custom_vjp(_sum, nondiff_argnums=(1,))
_joined.defvjp(
  lambda x, dtype: (_sum(x, dtype), len(x)), lambda dtype, parts, g: (_copies(g, parts).astype(jnp.float32),)
)
