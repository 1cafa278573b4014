"""Leaves that hold a weight in another form than its logical array: they quack like it, and `ops.einsum` multiplies them."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax

from jaxllm.errors import check_choice

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
    return self.value.nbytes

  def astype(self, dtype: Any) -> Matrix:
    """The same matrix in another type, in the same layout."""
    return Matrix(self.value.astype(dtype), self.stored)

  def letters(self, term: str) -> str:
    """The letters of the stored value, where `term` has those of the logical one: "DF" is "FD" for "oi"."""
    return term if self.stored == "io" else term[:-2] + term[:-3:-1]


def dense(x: Any) -> Any:
  """The logical array [..., in, out] of any leaf: of a NumPy `Matrix` a view."""
  if not isinstance(x, Matrix):
    return x
  return x.value if x.stored == "io" else x.value.swapaxes(-1, -2)
