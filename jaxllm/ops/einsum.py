"""The one place that multiplies weights."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxllm.leaf import LoRA, Matrix, QTensor
from jaxllm.ops.device import current_device
from jaxllm.ops.quantized import product

PRODUCT = "product"
"""What checkpoint policies know a layer's product of activations with a weight by (`jax.ad_checkpoint.checkpoint_name`), in the
type that it goes on in: of a product with a gradient of its own, or a sum of several, they see no dot.
"""

LARGE = 2**17
"""Numbers of a float32 matrix, and of the rows before it, from which on a CPU transposes rows for the matrix's gradient.

(On two cores of a Zen 4, 2048 rows: 384 x 384 164 GFLOP/s by JAX's rule, 184 so; 384 x 8192 192 and 210.)
"""


def einsum(equation: str, *operands: jax.Array | Matrix | QTensor | LoRA, out_dtype=jnp.float32) -> jax.Array:
  """`jnp.einsum` accumulated in float32 (`preferred_element_type`), then cast to `out_dtype`.

  Letters of the equation are those of the operands' shape suffixes.  A `leaf.Matrix` is multiplied as it is stored: its last
  two letters change places, and nothing is transposed.  In "...D,DF->...F" only, a `leaf.QTensor` w is multiplied by its
  scheme, and for a `leaf.LoRA` it is x base + scale (x a) b, without a gradient to base.  On a CPU one row of a 16-bit type is
  multiplied twice, as XLA takes a seventh of the time for two rows that it takes for one.

  The gradient of bfloat16 rows times a matrix is made of products of that type, too: what comes to it, which may be wider, is
  rounded first.  (By JAX's own rule both factors become float32 where one is.)  On a CPU the rows are transposed for the
  gradient of the matrix, in float32, too, where it is LARGE.
  """
  if any(isinstance(x, LoRA) for x in operands):
    x, w = operands
    assert _is_by_matrix(equation) and w.ndim == 2, (equation, w.shape)
    low = einsum("...D,DR->...R", x, w.a, out_dtype=x.dtype)
    out = einsum(equation, x, jax.lax.stop_gradient(w.base))
    return (out + w.scale * einsum("...R,RF->...F", low, w.b)).astype(out_dtype)
  if any(isinstance(x, QTensor) for x in operands):
    x, w = operands
    assert _is_by_matrix(equation) and w.ndim == 2, (equation, w.shape)
    out_CF = product(x.reshape(-1, x.shape[-1]), w)
    return out_CF.reshape(*x.shape[:-1], w.shape[1]).astype(out_dtype)
  if _is_slow_row(equation, operands):
    x, w = operands
    two = jnp.broadcast_to(x.reshape(1, -1), (2, x.size))
    return einsum("CD,DF->CF", two, w, out_dtype=out_dtype)[:1].reshape(*x.shape[:-1], w.shape[1])
  if _is_own_product(equation, operands):
    x, w = operands
    stored, value = (w.stored, w.value) if isinstance(w, Matrix) else ("io", w)
    return _own_product(stored, x, value).astype(out_dtype)
  if any(isinstance(x, Matrix) for x in operands):
    inputs, output = equation.split("->")
    pairs = zip(inputs.split(","), operands, strict=True)
    terms, operands = zip(*(_stored(term, x) for term, x in pairs), strict=True)
    equation = f"{','.join(terms)}->{output}"
  return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32).astype(out_dtype)


def _is_own_product(equation: str, operands: tuple[jax.Array | Matrix, ...]) -> bool:
  """Whether it is rows times a matrix with a gradient of our own: of bfloat16, or on a CPU, of a large one of float32."""
  if len(operands) != 2 or isinstance(operands[0], Matrix) or not _is_by_matrix(equation):
    return False
  x, w = operands
  if w.ndim != 2 or x.dtype != w.dtype:
    return False
  large = x.dtype == jnp.float32 and min(x.size, w.size) >= LARGE and _turns()
  return large or x.dtype == jnp.bfloat16


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _own_product(stored: str, x: jax.Array, w: jax.Array) -> jax.Array:
  """x w, float32 [..., F], of x [..., D] and a matrix stored as [D, F] ("io") or [F, D] ("oi")."""
  return _contract(x, w, (x.ndim - 1,), (0 if stored == "io" else 1,))


def _own_product_backward(stored: str, kept: tuple[jax.Array, jax.Array], g: jax.Array):
  x, w = kept
  g = g.astype(x.dtype)
  by_x = _contract(g, w, (g.ndim - 1,), (1 if stored == "io" else 0,))
  first, second = (x, g) if stored == "io" else (g, x)
  if _turns():
    first, second = (y.reshape(-1, y.shape[-1]) for y in (first, second))
    by_w = _contract(turned(first), second, (1,), (0,))
  else:
    rows = tuple(range(x.ndim - 1))
    by_w = _contract(first, second, rows, rows)
  return by_x.astype(x.dtype), by_w.astype(w.dtype)


_own_product.defvjp(lambda stored, x, w: (_own_product(stored, x, w), (x, w)), _own_product_backward)


def _turns() -> bool:
  """Whether the rows of a weight's gradient are transposed before their product: on a CPU whose compiler splits nothing."""
  device = current_device()
  return device.platform == "cpu" and not device.partitioned


def _contract(a: jax.Array, b: jax.Array, of_a: tuple[int, ...], of_b: tuple[int, ...]) -> jax.Array:
  return jax.lax.dot_general(a, b, ((of_a, of_b), ((), ())), preferred_element_type=jnp.float32)


def turned(x_CD: jax.Array) -> jax.Array:
  """x^T [D, C], written to memory.

  XLA makes a transpose part of the product that reads it, which its CPU library then does not take, and it does not see that
  the products of 16-bit types that it writes so cannot be run; of a row of numbers between two barriers it makes a copy.
  """
  x_CD = jax.lax.optimization_barrier(x_CD)
  return jax.lax.optimization_barrier(x_CD.T.reshape(-1)).reshape(x_CD.shape[::-1])


def _is_slow_row(equation: str, operands: tuple[jax.Array | Matrix, ...]) -> bool:
  """Whether it is one row times a matrix, of a 16-bit type, on a CPU."""
  if len(operands) != 2:
    return False
  x, w = operands
  if isinstance(x, Matrix):
    return False
  return (
    _is_by_matrix(equation)
    and x.size == x.shape[-1]
    and w.ndim == 2
    and x.dtype.itemsize == 2
    and current_device().platform == "cpu"
  )


def _is_by_matrix(equation: str) -> bool:
  """Whether it is rows times a matrix, as in "CD,DF->CF"."""
  rows, matrix, output = equation.replace("->", ",").split(",")
  return len(matrix) == 2 and rows[-1] == matrix[0] and output == rows[:-1] + matrix[1]


def _stored(term: str, x: jax.Array | Matrix) -> tuple[str, jax.Array]:
  return (x.letters(term), x.value) if isinstance(x, Matrix) else (term, x)
