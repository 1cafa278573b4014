"""Tensors of mapped files copied into memory that an array can own, every value looked at on the way."""

from __future__ import annotations

import math
from collections.abc import Iterator

import ml_dtypes
import numpy as np

INFINITIES = {
  np.dtype(np.float32): (np.dtype(np.int32), 0x7F800000),
  np.dtype(np.float16): (np.dtype(np.int16), 0x7C00),
  np.dtype(ml_dtypes.bfloat16): (np.dtype(np.int16), 0x7F80),
}
"""The types of parameters: integers of the same size, and the infinity as one; whatever is above it, the sign aside, is NaN."""

ALIGNMENT = 64
"""Bytes; XLA takes an array that starts at a multiple as it is."""

CHUNK = 1 << 18
"""Bytes copied at once: what is looked at next is still in the cache, and a call of NumPy costs little beside it."""

TILE = 256, 1024
"""Rows, and bytes of each, that are transposed at once."""


def copy(view: np.ndarray, dtype: np.dtype, out: np.ndarray | None = None) -> tuple[np.ndarray, float]:
  """(a copy in `dtype`, in the order of its axes and aligned for XLA, or in `out`; the largest magnitude of its values).

  Where that is infinity, a value is infinite or NaN and the copy is not complete.  A cast can make an infinity; `explain` tells
  the two apart.  Integers, which parts of quantized weights are, are all numbers: they are copied, and count as 1.
  """
  out = aligned(view.shape, dtype) if out is None else out
  if dtype not in INFINITIES:
    np.copyto(out, view, casting="no")
    return out, 1.0
  integers, _ = INFINITIES[dtype]
  source, target = view, out
  if view.dtype == dtype:  # the same bits, by NumPy's fastest loops
    source, target = view.view(integers), out.view(integers)
  largest, infinity = 0, INFINITIES[dtype][1]
  with np.errstate(over="ignore"):  # of a cast: seen by its infinity
    for block in _transposed(source, target) if _is_transposed(view) else _rows(source, target):
      if block.size:
        largest = max(largest, _largest_bits(block, dtype))
        if largest >= infinity:
          return out, math.inf
  return out, float(np.array(largest, integers).view(dtype))


def _largest_bits(block: np.ndarray, dtype: np.dtype) -> int:
  """The largest magnitude, its bits as an integer, in whose order magnitudes are.

  Positive ones are compared as signed integers, below which all negative ones are, and these as unsigned ones.
  """
  integers, _ = INFINITIES[dtype]
  bits = block.view(integers)
  positive, negative = (
    int(bits.max()),
    int(bits.view(f"u{integers}").max()) - (1 << 8 * integers.itemsize - 1),
  )
  return max(positive, negative)


def explain(view: np.ndarray, dtype: np.dtype) -> str:
  """What `copy` met in a tensor: how many values of which kind, and where the first is."""
  count, first = 0, None
  overflows = None
  with np.errstate(all="ignore"):
    for row in range(len(view)) if view.ndim > 1 else (...,):  # little memory
      values = view[row].astype(np.float64)
      bad = ~np.isfinite(values)
      if not bad.any() and overflows is None:
        large = np.abs(values) > float(ml_dtypes.finfo(dtype).max)
        if large.any():
          overflows = _index(row, large), values[large].flat[0]
      if bad.any():
        first = first or (_index(row, bad), values[bad].flat[0])
        count += int(bad.sum())
  if count:
    one = count == 1
    return f"{count:,} value{'' if one else 's'} {'is' if one else 'are'} NaN or infinite, the first at {first[0]}: {first[1]}"
  return f"{overflows[1]:.6g} at {overflows[0]} is beyond the largest {dtype}"


def _index(row, bad: np.ndarray) -> list[int]:
  inner = np.unravel_index(int(bad.argmax()), bad.shape) if bad.ndim else ()
  return [*([] if row is ... else [int(row)]), *map(int, inner)]


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """An array of no values yet, which XLA takes as it is."""
  nbytes = math.prod(shape) * dtype.itemsize
  memory = np.empty(nbytes + ALIGNMENT, np.uint8)
  start = -memory.ctypes.data % ALIGNMENT
  return memory[start : start + nbytes].view(dtype).reshape(shape)


def _rows(source: np.ndarray, target: np.ndarray) -> Iterator[np.ndarray]:
  """Copies some rows at a time, and yields them."""
  if source.ndim < 2:
    source, target = source.reshape(1, -1), target.reshape(1, -1)
  row_bytes = max(target[:1].nbytes, 1)
  if row_bytes > 4 * CHUNK and source.ndim > 2:
    for i in range(len(source)):
      yield from _rows(source[i], target[i])
    return
  width = source.shape[1] if row_bytes <= 4 * CHUNK else CHUNK // target.itemsize
  step = max(CHUNK // row_bytes, 1)
  for start in range(0, len(source), step):
    for left in range(0, source.shape[1], max(width, 1)):
      block = target[start : start + step, left : left + width]
      block[...] = source[start : start + step, left : left + width]
      yield block


def _is_transposed(view: np.ndarray) -> bool:
  return view.ndim == 2 and view.strides[0] == view.itemsize != view.strides[1]


def _transposed(source: np.ndarray, target: np.ndarray) -> Iterator[np.ndarray]:
  """The same for the transpose of rows, by tiles.

  Rows of files are often powers of two apart, and then compete for the same few places of a cache: hence by way of a tile whose
  rows are not.  (Four times as fast as NumPy's copy of a transpose on a Zen 3.)
  """
  rows = source.T
  height, width = TILE[0], max(TILE[1] // source.itemsize, 1)
  padded = np.empty((height, width + 8), source.dtype)
  turned = np.empty((width, height), target.dtype)
  for top in range(0, rows.shape[0], height):
    for left in range(0, rows.shape[1], width):
      tile = rows[top : top + height, left : left + width]
      straight = padded[: tile.shape[0], : tile.shape[1]]
      straight[...] = tile
      if tile.shape[::-1] != turned.shape:
        turned = np.empty(tile.shape[::-1], target.dtype)
      turned[...] = straight.T
      target[left : left + width, top : top + height] = turned
      yield turned
