"""Rows of a table by number."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxllm.leaf import QTensor


def lookup(table: jax.Array | QTensor, index: jax.Array, fill: float | None = None) -> jax.Array:
  """table[index], in the table's type; numbers beyond it read its last row, or with `fill` that number.

  The gradient of an array of 16 bits is summed in float32 and rounded once: a sum of bfloat16 no longer grows once it is 256
  times what is added, as for the most frequent token of a batch.
  """
  if isinstance(table, QTensor) or table.dtype.itemsize != 2:
    return _rows(fill, table, index)
  return _lookup(fill, table.shape, table.dtype, table, index)


def _rows(fill, table, index):
  return table[index] if fill is None else table.at[index].get(mode="fill", fill_value=fill)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _lookup(fill, shape, dtype, table, index):
  return _rows(fill, table, index)


def _backward(fill, shape, dtype, index, g):
  wide = jax.ShapeDtypeStruct(shape, jnp.float32)
  (by_table,) = jax.linear_transpose(lambda table: _rows(fill, table, index), wide)(g.astype(jnp.float32))
  return by_table.astype(dtype), None


_lookup.defvjp(lambda fill, shape, dtype, table, index: (_rows(fill, table, index), index), _backward)
