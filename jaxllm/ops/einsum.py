"""The one place that multiplies weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxllm.leaf import Matrix


def einsum(equation: str, *operands: jax.Array | Matrix, out_dtype=jnp.float32) -> jax.Array:
  """`jnp.einsum` accumulated in float32 (`preferred_element_type`), then cast to `out_dtype`.

  Letters of the equation are those of the operands' shape suffixes.  A `leaf.Matrix` is multiplied as it is stored: its last
  two letters change places, and nothing is transposed.
  """
  if any(isinstance(x, Matrix) for x in operands):
    inputs, output = equation.split("->")
    pairs = zip(inputs.split(","), operands, strict=True)
    terms, operands = zip(*(_stored(term, x) for term, x in pairs), strict=True)
    equation = f"{','.join(terms)}->{output}"
  return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32).astype(out_dtype)


def _stored(term: str, x: jax.Array | Matrix) -> tuple[str, jax.Array]:
  return (x.letters(term), x.value) if isinstance(x, Matrix) else (term, x)
