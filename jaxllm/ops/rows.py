"""Products of rows with weights that are turned into floats on the way."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxllm.ops.device import current_device

FEW = 16
"""Up to so many rows a CPU multiplies one at a time, as XLA converts integers within a product for one row only; of a weight
that it unpacks, it multiplies that with them rather than them with it."""


def multiply(x_CD: jax.Array, w_FD: jax.Array) -> jax.Array:
  """x w^T, float32 [C, F], of rows and of a weight that is cast to their type.

  One row is multiplied number by number and summed on a GPU: a reduction turns what it reads into floats within itself, while
  a matrix product is given a copy (one H100, the seven matrices of a layer of 4096 and 11008, int8: 94 microseconds, as matrix
  products 161; bfloat16 182).
  """
  if _by_sum(x_CD):
    return _sum((x_CD, w_FD))[None]
  return jnp.dot(x_CD, w_FD.astype(x_CD.dtype).T, preferred_element_type=jnp.float32)


def unpacked(*pairs: tuple[jax.Array, jax.Array]) -> jax.Array:
  """The sum over pairs of (x w^T)^T, float32 [F, C], for weights that are unpacked from bytes.

  A CPU unpacks them within a product of few rows only if it is w x^T, and its result is not turned at once.
  """
  if _by_sum(pairs[0][0]):
    return _sum(*pairs)[:, None]
  if len(pairs[0][0]) > FEW:
    return sum(multiply(*pair) for pair in pairs).T
  dot = lambda x_CD, w_FD: jnp.dot(w_FD.astype(x_CD.dtype), x_CD.T, preferred_element_type=jnp.float32)
  return sum(dot(*pair) for pair in pairs)


def _by_sum(x_CD: jax.Array) -> bool:
  return len(x_CD) == 1 and current_device().platform not in ("cpu", "tpu")


def _sum(*pairs: tuple[jax.Array, jax.Array]) -> jax.Array:
  """The sum over pairs of w x, of one row x, float32 [F]."""
  return jnp.sum(sum(w_FD.astype(jnp.float32) * x_1D.astype(jnp.float32) for x_1D, w_FD in pairs), axis=1)
