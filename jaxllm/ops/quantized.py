"""Products with quantized weights, without a copy of the weight as floats."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxllm.leaf import QTensor, dense
from jaxllm.ops.constrain import compiler_axes

ROWS = 16
"""Up to so many rows are multiplied one at a time on a CPU, where XLA converts integers within a product for one row only."""

TILE = 512
"""The most columns of a weight that a CPU converts at a time, for more rows."""

LONGEST = 4095
"""The most numbers of a column that a CPU multiplies with one row at a time: XLA converts longer ones before the product."""

PACKED = 128
"""The most columns of a packed weight that it converts at a time, for up to ROWS rows."""


@jax.custom_vjp
def product(x_CD: jax.Array, w: QTensor) -> jax.Array:
  """x w, float32 [C, F], by the weight's scheme.

  Its gradient to x is g w^T, of the weight as it is held, for which integers are kept and no floats of them: where a scheme
  rounds rows, too, that counts as the identity (straight-through: Bengio et al., 2013, section 4).  The weight has none.

  The weight goes through a barrier with the rows: a loop around the product, as decoding is one, would else convert the weight
  once, before it, and keep the copy.  On one CPU device a product is made in pieces, of one row or of TILE columns, as XLA
  converts the whole weight for two rows or more; and of one row in two halves of the columns, as XLA computes what the row
  comes from anew for every column unless a loop is between.  (On two cores, 32 weights of 1024 x 2816 and what is between
  them, one row: float32 12.7 ms, int8 2.9, and 4.6 in one piece.)  Rows are float32 there, whatever their type: CPUs convert
  integers to half types slowly.  A row of more than LONGEST numbers is a sum over pieces of it (4096 x 11008: 4.1 ms, in one
  piece 202, float32 6.1).
  A packed weight goes by columns for any rows.  (One such weight, 1 and 8 rows, beside other work: float32 0.30 and 0.85 ms,
  int8 0.20 and 0.73, int4 0.56 and 0.94, int3 0.80 and 1.4.)
  """
  columns = w.shape[1]
  if not w.scheme.converts or _in_one():
    return _piece(x_CD, w)
  x_CD = x_CD.astype(jnp.float32)
  few, packed = len(x_CD) <= ROWS, w.scheme.converts == "columns"
  if len(x_CD) == 1 and not packed and w.shape[0] > LONGEST:
    return _row(x_CD, w)
  if len(x_CD) > 1 and few and not packed:
    return jax.lax.map(lambda x_D: _row(x_D[None], w)[0], x_CD)
  most = PACKED if packed and few else columns // 2 if len(x_CD) == 1 else TILE
  tile = _tile(w, most)
  if not tile:  # a width without such a divisor
    return _piece(x_CD, w)
  y_QCt = jax.lax.map(lambda i: _piece(x_CD, _columns(w, i, tile)), jnp.arange(columns // tile))
  return jnp.moveaxis(y_QCt, 0, 1).reshape(len(x_CD), columns)


def _piece(x_CD: jax.Array, w: QTensor) -> jax.Array:
  return w.scheme.product(*jax.lax.optimization_barrier((x_CD, w.parts)))


def _row(x_1D: jax.Array, w: QTensor) -> jax.Array:
  """x w of one row, [1, F], as a sum over pieces of w's rows that are short enough."""
  D = w.shape[0]
  step = _divisor(D, [part.shape[1] for part in w.parts.values()], LONGEST)
  if step in (0, D):
    return _piece(x_1D, w)

  def add(i, y_1F):
    def cut(part):
      columns = part.shape[1] * step // D
      return part if part.shape[1] == 1 else jax.lax.dynamic_slice_in_dim(part, i * columns, columns, axis=1)

    x = jax.lax.dynamic_slice_in_dim(x_1D, i * step, step, axis=1)
    return y_1F + _piece(x, QTensor(jax.tree.map(cut, w.parts), w.scheme))

  return jax.lax.fori_loop(0, D // step, add, jnp.zeros((1, w.shape[1]), jnp.float32))


def _divisor(size: int, sizes: Sequence[int], most: int) -> int:
  """The largest number up to `most` that divides a dimension, and those of parts with it; 0: there is none worth a loop."""
  fits = lambda n: size % n == 0 and all(part * n % size == 0 for part in sizes if part > 1)
  found = max((n for n in range(1, min(most, size) + 1) if fits(n)), default=0)
  return found if found >= 32 else 0


def _in_one() -> bool:
  """Whether nothing is in pieces: on accelerators, and where a mesh cuts the weight already."""
  return jax.default_backend() != "cpu" or any(n > 1 for n in compiler_axes().values())


def _tile(w: QTensor, most: int) -> int:
  """The largest number of columns up to `most` that divides the weight and its parts; 0: there is none worth a loop."""
  return _divisor(w.shape[1], [part.shape[0] for part in w.parts.values()], most)


def _columns(w: QTensor, i: jax.Array, tile: int) -> QTensor:
  """Columns [i tile, (i + 1) tile) of the weight."""

  def cut(part):
    rows = part.shape[0] * tile // w.shape[1]  # of a packed part fewer than columns
    return part if part.shape[0] == 1 else jax.lax.dynamic_slice_in_dim(part, i * rows, rows)

  return QTensor(jax.tree.map(cut, w.parts), w.scheme)


def _backward(kept: tuple[QTensor, jax.Array], g_CF: jax.Array) -> tuple[jax.Array, None]:
  """(g w^T, nothing), of some columns of w at a time where there are pieces."""
  w, like = kept
  g_CF, parts = jax.lax.optimization_barrier((g_CF, w.parts))
  w = QTensor(parts, w.scheme)
  tile = 0 if _in_one() else _tile(w, TILE)
  dtype = like.dtype if _in_one() else jnp.float32

  def one(g_CF: jax.Array, w: QTensor) -> jax.Array:
    w_FD = dense(w).T.astype(dtype)
    return jnp.dot(g_CF.astype(dtype), w_FD, preferred_element_type=jnp.float32)

  def add(i: jax.Array, g_CD: jax.Array) -> jax.Array:
    return g_CD + one(jax.lax.dynamic_slice_in_dim(g_CF, i * tile, tile, axis=1), _columns(w, i, tile))

  g_CD = jnp.zeros((len(g_CF), w.shape[0]), jnp.float32)
  g_CD = jax.lax.fori_loop(0, w.shape[1] // tile, add, g_CD) if tile else one(g_CF, w)
  return g_CD.astype(like.dtype), None


product.defvjp(lambda x_CD, w: (product(x_CD, w), (w, x_CD[:0])), _backward)
