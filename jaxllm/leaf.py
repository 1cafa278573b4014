"""Leaves that hold a weight in another form than its logical array: they quack like it, and `ops.einsum` multiplies them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import QuantError, check_choice

STORED = ("oi", "io")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Matrix:
  """A weight that is logically w [..., in, out] and held as value [..., out, in], as torch's Linear has it: y = x value^T.

  A checkpoint's matrices are so used as they are read, without a transposed copy.  `shape` is the logical one; leading axes
  (stacked layers) stay where they are.  stored: "oi", or "io" for a value that is w itself.  Raises ConfigError for another.
  """

  value: jax.Array
  stored: Literal["oi", "io"] = dataclasses.field(default="oi", metadata=dict(static=True))

  def __post_init__(self):
    check_choice(self, "stored", STORED)

  @property
  def shape(self) -> tuple[int, ...]:
    """[..., in, out]."""
    *leading, rows, columns = self.value.shape
    return (*leading, rows, columns) if self.stored == "io" else (*leading, columns, rows)

  @property
  def ndim(self) -> int:
    """The number of axes."""
    return len(self.value.shape)

  @property
  def dtype(self) -> Any:
    """The type of the numbers."""
    return self.value.dtype

  @property
  def size(self) -> int:
    """The number of elements."""
    return self.value.size

  @property
  def nbytes(self) -> int:
    """The bytes that the elements take."""
    return _nbytes(self.value)

  def astype(self, dtype: Any) -> Matrix:
    """The same matrix in another type, in the same layout."""
    return Matrix(self.value.astype(dtype), self.stored)

  def letters(self, term: str) -> str:
    """The letters of the stored value, where `term` has those of the logical one: "DF" is "FD" for "oi"."""
    return term if self.stored == "io" else term[:-2] + term[:-3:-1]


class Scheme(Protocol):
  """How the parts of a `QTensor` hold its weight: a hashable value, as compiled programs are made for it.

  converts: whether `product` turns the weight's numbers into the type of x, so that a CPU had better do it in pieces; "columns"
  where these are of columns for any number of rows, as numbers that are packed cost more to turn than to multiply.
  """

  converts: bool | Literal["columns"]

  def shape(self, parts: Mapping[str, jax.Array]) -> tuple[int, ...]:
    """[..., in, out] of the weight."""

  def dequantize(self, parts: Mapping[str, jax.Array]) -> jax.Array:
    """The weight, float32 [..., in, out]."""

  def product(self, x_CD: jax.Array, parts: Mapping[str, jax.Array]) -> jax.Array:
    """x w, float32 [C, F], of rows [C, D] and a weight [D, F]."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class QTensor:
  """A weight that is logically w [..., in, out] and held by a quantization scheme (`jaxllm.quant`) as its parts.

  parts: arrays of as many axes as the weight, [..., rows, n]; rows divides out, or is 1 for what all of out have in common.
  "value" has the numbers, or several of them in a byte, and others what these are multiplied with and moved by: "scale" and
  "zero" for each block, or what such scales are held by in turn (`quant.codebook`).
  table: it is a table of rows [out, in] instead, as an embedding is one, of which `[index]` are some, float32: no other row is
  computed.  Its transpose `T` is the weight of a tied head, with the same parts.
  """

  parts: dict[str, jax.Array]
  scheme: Scheme = dataclasses.field(metadata=dict(static=True))
  table: bool = dataclasses.field(default=False, metadata=dict(static=True))

  @property
  def shape(self) -> tuple[int, ...]:
    """[..., in, out], or [out, in] of a table."""
    shape = self.scheme.shape(self.parts)
    return shape[::-1] if self.table else shape

  @property
  def T(self) -> QTensor:
    """A table as the weight that its scheme holds, and the other way."""
    return dataclasses.replace(self, table=not self.table)

  @property
  def ndim(self) -> int:
    """The number of axes."""
    return len(self.shape)

  @property
  def dtype(self) -> Any:
    """The type of the numbers as they are held."""
    return self.parts["value"].dtype

  @property
  def size(self) -> int:
    """The number of elements of the weight."""
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    """The bytes that all parts take."""
    return sum(map(_nbytes, self.parts.values()))

  def astype(self, dtype: Any) -> QTensor:
    """Itself: what it is multiplied with says in which type."""
    return self

  def __getitem__(self, index: Any) -> Any:
    """The weights of leading axes (stacked layers, experts), or the rows of a table, float32 [..., in].

    Rows past the ends of a table are its first or last, as those of an array; negative numbers count from its end.  Raises
    QuantError for an index of in or out, and for one of a table that is no integer or array of them.
    """
    if not self.table:
      leading = index if isinstance(index, tuple) else (index,)
      if len(leading) > self.ndim - 2 or any(i is Ellipsis for i in leading):
        raise QuantError(
          f"found the index {index} of a weight {list(self.shape)} of {self.scheme}, expected one of the axes before in and "
          "out; quant.dequantize gives an array that takes any"
        )
      return QTensor({name: part[index] for name, part in self.parts.items()}, self.scheme)
    kind = getattr(index, "dtype", np.dtype(int if type(index) is int else object))
    if not jnp.issubdtype(kind, jnp.integer):
      what = f"{kind}{list(index.shape)}" if hasattr(index, "dtype") else repr(index)
      raise QuantError(
        f"found the index {what} of a table {list(self.shape)} of {self.scheme}, expected an integer or an array of integers, "
        "the numbers of rows; quant.dequantize gives an array that takes any"
      )
    (rows, columns), step, index = self.shape, self.step, jnp.asarray(index).astype(jnp.int32)
    if not index.size:
      return jnp.zeros((*index.shape, columns), jnp.float32)
    flat = jnp.clip(jnp.where(index < 0, index + rows, index).reshape(-1), 0, rows - 1)

    def taken(part):
      if part.shape[0] == 1:
        return part
      blocks = part.reshape(self.shape[0] // step, -1, *part.shape[1:])
      return blocks[flat // step].reshape(-1, *part.shape[1:])

    rows = self.scheme.dequantize(jax.tree.map(taken, self.parts)).T.reshape(flat.size, step, -1)
    return rows[jnp.arange(flat.size), flat % step].reshape(*index.shape, -1)

  @property
  def step(self) -> int:
    """How many rows of a table have parts in common, as those whose numbers are in the same bytes, but for what all have."""
    own = [part.shape[0] for part in self.parts.values() if part.shape[0] > 1]
    return max((self.shape[0] // rows for rows in own), default=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LoRA:
  """A weight with a correction of low rank, w = base + scale a b: base [..., in, out], a [..., in, rank], b [..., rank, out].

  base: an array, a `Matrix` or a `QTensor` (QLoRA), which stays as it is: no gradient reaches it.  scale: alpha / rank.
  Source: Hu et al. (2021), LoRA, section 4.1; Dettmers et al. (2023), QLoRA, equation 5.
  """

  base: Any
  a: jax.Array
  b: jax.Array
  scale: float = dataclasses.field(metadata=dict(static=True))

  @property
  def shape(self) -> tuple[int, ...]:
    """[..., in, out]."""
    return self.base.shape

  @property
  def ndim(self) -> int:
    """The number of axes."""
    return len(self.shape)

  @property
  def dtype(self) -> Any:
    """The type of the base's numbers."""
    return self.base.dtype

  @property
  def size(self) -> int:
    """The number of elements of the weight."""
    return self.base.size

  @property
  def nbytes(self) -> int:
    """The bytes that base, a and b take."""
    return sum(_nbytes(x) for x in jax.tree.leaves(self))

  def astype(self, dtype: Any) -> LoRA:
    """The same weight with a base, as far as that has types, and factors of another type."""
    return LoRA(self.base.astype(dtype), self.a.astype(dtype), self.b.astype(dtype), self.scale)


def _nbytes(x: Any) -> int:
  """The bytes of an array, or of one that a jax.ShapeDtypeStruct stands for."""
  return x.size * x.dtype.itemsize


def dense(x: Any) -> Any:
  """The logical array [..., in, out] of any leaf: of a NumPy `Matrix` a view, of a `QTensor` or a `LoRA` float32."""
  if isinstance(x, LoRA):
    low = jnp.matmul(x.a, x.b, precision="highest", preferred_element_type=jnp.float32)
    return dense(x.base).astype(jnp.float32) + x.scale * low
  if isinstance(x, QTensor):
    w = x.scheme.dequantize(x.parts)
    return w.T if x.table else w
  if not isinstance(x, Matrix):
    return x
  return x.value if x.stored == "io" else x.value.swapaxes(-1, -2)
