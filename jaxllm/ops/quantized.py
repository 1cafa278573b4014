"""Products with quantized weights, without a copy of the weight as floats.

But on a CPU with a mesh that cuts weights (fsdp, tensor), where XLA converts each device's share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp

from jaxllm.leaf import QTensor, dense
from jaxllm.ops.constrain import compiler_axes
from jaxllm.ops.device import current_device
from jaxllm.ops.rows import FEW

TILE = 512
"""The most columns of a weight that a CPU converts at a time, for more rows."""

LONGEST = 4095
"""The most numbers of a column that a CPU multiplies with one row at a time: XLA converts longer ones before the product."""

PACKED = 128
"""The most columns of a packed weight that it converts at a time, for up to FEW rows."""

LEAST = 32
"""The fewest columns or rows of a weight that are worth a piece of their own."""


@jax.custom_vjp
def product(x_CD: jax.Array, w: QTensor) -> jax.Array:
  """x w, float32 [C, F], by the weight's scheme.

  Its gradient to x is g w^T, of the weight as it is held, for which integers are kept and no floats of them: where a scheme
  rounds rows, too, that counts as the identity (straight-through: Bengio et al., 2013, section 4).  The weight has none.

  The weight goes through a barrier with the rows: a loop around the product, as decoding is one, would else convert the weight
  once, before it, and keep the copy.  On a CPU a product is made in pieces, of one row or of TILE columns, as XLA converts the
  whole weight for two rows or more (on a mesh that cuts it there are none, and it converts each device's share); and of one row
  in two halves of the columns, as XLA computes what the row comes from anew for every column unless a loop is between.
  (On two cores, 32 weights of 1024 x 2816 and what is between them, one row: float32 12.7 ms, int8 2.9, and 4.6 in one piece.)
  Rows are float32 there, whatever their type: CPUs convert integers to half types slowly.  A row of more than LONGEST numbers
  is a sum over pieces of it (4096 x 11008: 4.1 ms, in one piece 202, float32 6.1).
  A packed weight goes by columns for any rows.  (One such weight, 1 and 8 rows, beside other work: float32 0.30 and 0.85 ms,
  int8 0.20 and 0.73, int4 0.56 and 0.94, int3 0.80 and 1.4.)
  """
  if not len(x_CD):
    return jnp.zeros((0, w.shape[1]), jnp.float32)
  if not w.scheme.converts or _in_one():
    return _piece(x_CD, w)
  x_CD = x_CD.astype(jnp.float32)
  (rows, D), columns = x_CD.shape, w.shape[1]
  few, packed = rows <= FEW, w.scheme.converts == "columns"
  if rows == 1 and not packed and D > LONGEST:
    return _row(x_CD, w)
  if rows > 1 and few and not packed and not _cut_by(["data"]):  # rows of several devices stay side by side
    return jax.lax.map(lambda x_D: _row(x_D[None], w)[0], x_CD)
  most = PACKED if packed and few else columns if rows == 1 else TILE

  def put(start: int | jax.Array, w: QTensor, y_CF: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(y_CF, _piece(x_CD, w), start, axis=1)

  return _pieces(put, w, 0, most, jnp.zeros((rows, columns), jnp.float32))


def _in_one() -> bool:
  """Whether nothing is in pieces: on accelerators, and on a mesh with an axis that cuts weights, into pieces of its own."""
  return current_device().platform != "cpu" or _cut_by(axis for axis in compiler_axes() if axis != "data")


def _cut_by(axes: Iterable[str]) -> bool:
  """Whether the mesh in scope has several devices along any of these axes."""
  sizes = compiler_axes()
  return any(sizes.get(axis, 1) > 1 for axis in axes)


def _piece(x_CD: jax.Array, w: QTensor) -> jax.Array:
  return w.scheme.product(*jax.lax.optimization_barrier((x_CD, w.parts)))


def _row(x_1D: jax.Array, w: QTensor) -> jax.Array:
  """x w of one row, [1, F], as a sum over pieces of w's rows that are short enough."""
  if w.shape[0] <= LONGEST:
    return _piece(x_1D, w)

  def add(start: int | jax.Array, w: QTensor, y_1F: jax.Array) -> jax.Array:
    return y_1F + _piece(jax.lax.dynamic_slice_in_dim(x_1D, start, w.shape[0], axis=1), w)

  return _pieces(add, w, 1, LONGEST, jnp.zeros((1, w.shape[1]), jnp.float32))


def _pieces(body: Callable, w: QTensor, axis: int, most: int, y: jax.Array) -> jax.Array:
  """y after body(start, piece, y) of each piece of w, in order: `most` of its columns (axis 0 of parts) or rows (1), or fewer.

  Two pieces at least, but for LEAST columns.  They are of the largest size that divides the weight, or of `most` and one of the
  rest where that is less than half of it.  What shares a byte or a scale is in one piece, be it more than `most`.
  """
  size = w.shape[1 - axis]
  blocks = {name: size // part.shape[axis] for name, part in w.parts.items() if part.shape[axis] > 1}
  unit = math.lcm(*blocks.values())
  most = max(min(most, max(size // 2, LEAST)) // unit, 1) * unit
  step = next((n for n in range(most, most // 2, -unit) if size % n == 0), most)

  def piece(start: int | jax.Array, size: int) -> QTensor:
    cut = lambda part, block: jax.lax.dynamic_slice_in_dim(part, start // block, size // block, axis)
    parts = {name: cut(part, blocks[name]) if name in blocks else part for name, part in w.parts.items()}
    return QTensor(parts, w.scheme)

  if size <= step:
    return body(0, w, y)
  count, rest = divmod(size, step)
  y = jax.lax.fori_loop(0, count, lambda i, y: body(i * step, piece(i * step, step), y), y)
  return body(count * step, piece(count * step, rest), y) if rest else y


def product_transposed(g_CF: jax.Array, w: QTensor, dtype: jax.typing.DTypeLike) -> jax.Array:
  """g w^T, float32 [C, D], of some columns of w at a time where there are pieces, and in `dtype` where there are none."""
  g_CF, parts = jax.lax.optimization_barrier((g_CF, w.parts))
  w = QTensor(parts, w.scheme)
  if _in_one():
    return jnp.dot(g_CF.astype(dtype), dense(w).T.astype(dtype), preferred_element_type=jnp.float32)

  def add(start: int | jax.Array, w: QTensor, y_CD: jax.Array) -> jax.Array:
    g = jax.lax.dynamic_slice_in_dim(g_CF, start, w.shape[1], axis=1)
    return y_CD + jnp.dot(g, dense(w).T, preferred_element_type=jnp.float32)

  zeros_CD = jnp.zeros((len(g_CF), w.shape[0]), jnp.float32)
  return _pieces(add, w, 0, TILE, zeros_CD)


def _backward(kept: tuple[QTensor, jax.Array], g_CF: jax.Array) -> tuple[jax.Array, None]:
  w, like = kept
  return product_transposed(g_CF, w, like.dtype).astype(like.dtype), None


product.defvjp(lambda x_CD, w: (product(x_CD, w), (w, x_CD[:0])), _backward)
