"""Products of rows with the matrix of their group: what a mixture of experts computes, each row once."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.leaf import Matrix, QTensor
from jaxllm.ops.device import current_device
from jaxllm.ops.quantized import product, product_transposed

BLOCK = {"cpu": 32}
"""Rows that are multiplied at once, by platform; 128 on all that are not named."""
NATIVE = ("tpu",)
"""Platforms whose `lax.ragged_dot` is a kernel.  Elsewhere XLA expands it to a product of all rows with all matrices."""


def group(index_R: jax.Array, groups: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(order [R], its inverse [R], sizes [groups]) of rows by the number of their group: x[order] has groups one after the other.

  Rows of one group keep their order.
  """
  order = jnp.argsort(index_R, stable=True).astype(jnp.int32)
  inverse = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=jnp.int32), unique_indices=True)
  sizes = jnp.zeros((groups,), jnp.int32).at[index_R].add(1)
  return order, inverse, sizes


@jax.custom_vjp
def permute(x_RD: jax.Array, order_R: jax.Array, inverse_R: jax.Array) -> jax.Array:
  """x[order], whose gradient is a permutation too; plain indexing would add up rows one after the other."""
  return x_RD[order_R]


permute.defvjp(
  lambda x, order, inverse: (x[order], (order, inverse)),
  lambda kept, g: (g[kept[1]], None, None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def spread(x_CD: jax.Array, order_R: jax.Array, inverse_R: jax.Array, times: int) -> jax.Array:
  """The rows of x, `times` of each, in the order of R = C times rows: x[order // times]."""
  return x_CD[order_R // times]


def _spread_backward(times, inverse_R, g_RD):
  copies = g_RD[inverse_R].reshape(-1, times, g_RD.shape[-1])
  return (
    jnp.sum(copies, axis=1, dtype=jnp.promote_types(g_RD.dtype, jnp.float32)).astype(g_RD.dtype),
    None,
    None,
  )


spread.defvjp(lambda x, order, inverse, times: (x[order // times], inverse), _spread_backward)


def grouped_dot(
  x_RD: jax.Array, w_GDF: jax.Array | Matrix | QTensor, sizes_G: jax.Array, out_dtype=jnp.float32
) -> jax.Array:
  """y[r] = x[r] w[g], g the group of row r: [R, F], of rows that are sorted by group, sizes_G of each; all R rows are in one.

  w is cast to the type of x, products are accumulated in float32.  A `leaf.Matrix` [G, F, D] is multiplied as it is stored, a
  `leaf.QTensor` as `ops.quantized.product` has it: it has no gradient, and rows have that of the weight as it is held.
  Memory beside operands and result is one matrix, whatever the sizes are.

  On a TPU it is `lax.ragged_dot_general`, a kernel there.  XLA expands that on a CPU to all rows with all G matrices (measured
  on two cores, 2048 rows, D 512, F 1024, float32, the fastest of two: 8 groups 652 ms, 8 times one dense product's 82 ms; 8
  rows of 32 groups 200 ms, where these loops take 9), so there, and on GPUs, where XLA does so too unless told otherwise, each
  matrix that has rows is taken once, and multiplied with a block of them at a time: 58 to 83 ms for 8 groups, 63 to 130 for 32.
  Source: the block-sparse products of Gale et al. (2022), MegaBlocks, section 4.
  """
  if isinstance(w_GDF, QTensor):
    x_RD, sizes_G = map(jnp.asarray, (x_RD, sizes_G))
    platform = current_device().platform
    block = BLOCK.get(platform, 128)
    if platform == "cpu":  # few rows are multiplied one by one, and those of the next group for nothing
      block = min(block, max(1, 2 * len(x_RD) // len(sizes_G)))
    return _quantized(x_RD, w_GDF, sizes_G, block).astype(out_dtype)
  value, stored = (w_GDF.value, w_GDF.stored) if isinstance(w_GDF, Matrix) else (w_GDF, "io")
  x_RD, value, sizes_G = map(jnp.asarray, (x_RD, value, sizes_G))
  platform = current_device().platform
  if platform in NATIVE:
    return _native(x_RD, value.astype(x_RD.dtype), sizes_G, stored).astype(out_dtype)
  return _blocks(x_RD, value, sizes_G, stored, BLOCK.get(platform, 128)).astype(out_dtype)


def _native(x_RD: jax.Array, value: jax.Array, sizes_G: jax.Array, stored: str) -> jax.Array:
  """The product by XLA's own instruction."""
  numbers = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (1 if stored == "io" else 2,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
  )
  return lax.ragged_dot_general(x_RD, value, sizes_G, numbers, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _blocks(x_RD: jax.Array, value: jax.Array, sizes_G: jax.Array, stored: str, block: int) -> jax.Array:
  """The product in loops over groups and blocks of their rows, float32."""
  equation = "RD,DF->RF" if stored == "io" else "RD,FD->RF"

  def one_of(g):
    w = value[g].astype(x_RD.dtype)  # once a group
    return lambda x: jnp.einsum(equation, x, w, preferred_element_type=jnp.float32)

  return _loops(x_RD, sizes_G, block, value.shape[2 if stored == "io" else 1], one_of)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _quantized(x_RD: jax.Array, w_GDF: QTensor, sizes_G: jax.Array, block: int) -> jax.Array:
  """The product with integers in such loops, float32; its gradient is that of `ops.quantized.product`, the weight has none."""
  return _loops(x_RD, sizes_G, block, w_GDF.shape[2], lambda g: lambda x: product(x, w_GDF[g]))


def _quantized_forward(x_RD, w_GDF, sizes_G, block):
  return _quantized(x_RD, w_GDF, sizes_G, block), (w_GDF, sizes_G, x_RD[:0])


def _quantized_backward(block, kept, g_RF):
  w_GDF, sizes_G, like = kept
  one_of = lambda g: lambda g_CF: product_transposed(g_CF, w_GDF[g], like.dtype)
  return _loops(g_RF, sizes_G, block, w_GDF.shape[1], one_of).astype(like.dtype), None, None


_quantized.defvjp(_quantized_forward, _quantized_backward)


def _loops(x_RD: jax.Array, sizes_G: jax.Array, block: int, features: int, one_of) -> jax.Array:
  """one_of(g)(x) of the rows of each group g, a block of them at a time, float32.

  The last block of a group reaches into the rows of the next, which then writes over what it wrote there.  They are 0 in it, as
  a scheme that looks at all rows of a product (`quant.llm_int8`) would see those of another group.
  """
  rows, block, starts_G = len(x_RD), max(1, min(block, len(x_RD))), jnp.cumsum(sizes_G) - sizes_G
  padded = jnp.pad(x_RD, ((0, block), (0, 0)))

  def one_group(g, out):
    product = one_of(g)

    def one_block(i, out):
      at = starts_G[g] + i * block
      mine = (i * block + jnp.arange(block, dtype=jnp.int32) < sizes_G[g])[:, None]
      y = product(jnp.where(mine, lax.dynamic_slice_in_dim(padded, at, block), 0))
      return lax.dynamic_update_slice_in_dim(out, y, at, 0)

    return lax.fori_loop(0, -(-sizes_G[g] // block), one_block, out)

  return _each_group(sizes_G, one_group, jnp.zeros((rows + block, features), jnp.float32))[:rows]


def _each_group(sizes_G: jax.Array, body, carry):
  """body(g, carry) for the groups that have rows, in order."""
  first = jnp.argsort(sizes_G == 0, stable=True)
  return lax.fori_loop(0, jnp.sum(sizes_G > 0), lambda i, carry: body(first[i], carry), carry)


def _forward(x_RD, value, sizes_G, stored, block):
  return _blocks(x_RD, value, sizes_G, stored, block), (x_RD, value, sizes_G)


def _backward(stored, block, kept, g_RF):
  x_RD, value, sizes_G = kept
  g_RF = g_RF.astype(x_RD.dtype)
  other = "oi" if stored == "io" else "io"
  d_x = _blocks(g_RF, value, sizes_G, other, block).astype(x_RD.dtype)
  return d_x, _outer(x_RD, g_RF, sizes_G, stored, block).astype(value.dtype), None


_blocks.defvjp(_forward, _backward)


def _outer(x_RD: jax.Array, g_RF: jax.Array, sizes_G: jax.Array, stored: str, block: int) -> jax.Array:
  """The sum over the rows of each group of x[r] g[r]^T, [G, D, F] or [G, F, D] as stored, float32."""
  block, starts_G = max(1, min(block, len(x_RD))), jnp.cumsum(sizes_G) - sizes_G
  x_RD, g_RF = (jnp.pad(a, ((0, block), (0, 0))) for a in (x_RD, g_RF))
  equation, left, right = ("RD,RF->DF", x_RD, g_RF) if stored == "io" else ("RF,RD->FD", g_RF, x_RD)

  def one_group(g, out):
    def one_block(i, total):
      at = i * block + jnp.arange(block, dtype=jnp.int32)
      mine = (at < sizes_G[g])[:, None]  # both, as 0 times a NaN of another group's row is NaN
      a, b = (
        jnp.where(mine, lax.dynamic_slice_in_dim(side, starts_G[g] + i * block, block), 0)
        for side in (left, right)
      )
      return total + jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)

    shape = (left.shape[1], right.shape[1])
    total = lax.fori_loop(0, -(-sizes_G[g] // block), one_block, jnp.zeros(shape, jnp.float32))
    return lax.dynamic_update_index_in_dim(out, total, g, 0)

  shape = (len(sizes_G), left.shape[1], right.shape[1])
  return _each_group(sizes_G, one_group, jnp.zeros(shape, jnp.float32))
