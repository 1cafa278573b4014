"""Products with quantized weights, without a copy of the weight as floats."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxllm.leaf import QTensor
from jaxllm.ops.constrain import compiler_axes

ROWS = 16
"""Up to so many rows are multiplied one at a time on a CPU, where XLA converts integers within a product for one row only."""

TILE = 512
"""The most columns of a weight that a CPU converts at a time, for more rows."""


def product(x_CD: jax.Array, w: QTensor) -> jax.Array:
  """x w, float32 [C, F], by the weight's scheme.

  The weight goes through a barrier with the rows: a loop around the product, as decoding is one, would else convert the weight
  once, before it, and keep the copy.  On one CPU device a product is made in pieces, of one row or of TILE columns, as XLA
  converts the whole weight for two rows or more; and of one row in two halves of the columns, as XLA computes what the row
  comes from anew for every column unless a loop is between.  (On two cores, 32 weights of 1024 x 2816 and what is between
  them, one row: float32 12.7 ms, int8 2.9, and 4.6 in one piece.)  Rows are float32 there, whatever their type: CPUs convert
  integers to half types slowly.
  """
  columns = w.shape[1]
  if not w.scheme.converts or jax.default_backend() != "cpu" or any(n > 1 for n in compiler_axes().values()):
    return _piece(x_CD, w)
  x_CD = x_CD.astype(jnp.float32)
  if 1 < len(x_CD) <= ROWS:
    return jax.lax.map(lambda x_D: _piece(x_D[None], w)[0], x_CD)
  most = columns // 2 if len(x_CD) == 1 else TILE
  tile = max(n for n in range(1, min(most, columns) + 1) if columns % n == 0)
  if tile < 32:  # a width without such a divisor
    return _piece(x_CD, w)

  def one_tile(i):
    cut = lambda part: part if part.shape[0] == 1 else jax.lax.dynamic_slice_in_dim(part, i * tile, tile)
    return _piece(x_CD, QTensor(jax.tree.map(cut, w.parts), w.scheme))

  y_QCt = jax.lax.map(one_tile, jnp.arange(columns // tile))
  return jnp.moveaxis(y_QCt, 0, 1).reshape(len(x_CD), columns)


@jax.checkpoint  # a backward pass converts the weight once more, in place of keeping it as floats until then
def _piece(x_CD: jax.Array, w: QTensor) -> jax.Array:
  return w.scheme.product(*jax.lax.optimization_barrier((x_CD, w.parts)))
