"""The one place that multiplies weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def einsum(equation: str, *operands: jax.Array, out_dtype=jnp.float32) -> jax.Array:
  """`jnp.einsum` accumulated in float32 (`preferred_element_type`), then cast to `out_dtype`.

  Letters of the equation are those of the operands' shape suffixes.
  """
  return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32).astype(out_dtype)
