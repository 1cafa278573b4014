"""Copies of views: equal bits, aligned, and every value that is NaN or infinite met."""

import ml_dtypes
import numpy as np
import pytest

from jaxllm.hf import scan

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
VIEWS = {
  "scalar": lambda x: x[3, 4, 5],
  "vector": lambda x: x[1, 2],
  "strided vector": lambda x: x[1, :, 2],
  "matrix": lambda x: x[1],
  "transposed": lambda x: x[1].T,
  "columns": lambda x: x[1][:, 3:600:1],
  "transposed columns": lambda x: x[1][5:, 3:600].T,
  "every other": lambda x: x[1][::2, ::2],
  "three axes": lambda x: x[:3],
  "heads": lambda x: x[:, :-2],
  "empty": lambda x: x[:0, 0],
}


@pytest.fixture(scope="module")
def numbers():
  """More than a few chunks and tiles, none of their sizes a multiple of one."""
  return np.random.default_rng(0).standard_normal((5, 261, 1031), np.float32)


@pytest.mark.core
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", DTYPES)
def test_copies_are_equal_and_aligned(numbers, name, view):
  x = VIEWS[view](numbers.astype(DTYPES[name]))
  found, largest = scan.copy(np.asarray(x), np.dtype(DTYPES[name]))
  assert largest < np.inf and found.shape == x.shape and found.tobytes() == x.tobytes()
  assert not x.size or (found.ctypes.data % scan.ALIGNMENT == 0 and found.flags.c_contiguous)


@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("view", ["matrix", "transposed"])
def test_casts_are_those_of_numpy(numbers, view, to):
  x = VIEWS[view](numbers)
  found, largest = scan.copy(x, np.dtype(DTYPES[to]))
  assert largest < np.inf and found.tobytes() == x.astype(DTYPES[to]).tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", DTYPES)
def test_one_bad_value_anywhere_is_met(numbers, name, value):
  """And the largest finite numbers are no infinities."""
  dtype = np.dtype(DTYPES[name])
  x = numbers[:2].astype(dtype)
  x[0, 0, :2] = ml_dtypes.finfo(dtype).max, ml_dtypes.finfo(dtype).min
  rng = np.random.default_rng(1)
  places = [
    (0, 0, 2),
    (1, 260, 1030),
    *rng.integers((0, 0, 3), (2, 261, 1031), (6, 3)).tolist(),
  ]
  for i, row, column in places:
    old, x[i, row, column] = x[i, row, column], value
    for view in (x, x[i], x[i].T):
      assert scan.copy(view, dtype)[1] == np.inf
    text = scan.explain(x, dtype)
    assert text == f"1 value is NaN or infinite, the first at [{i}, {row}, {column}]: {value}"
    x[i, row, column] = old
  assert scan.copy(x, dtype)[1] == float(ml_dtypes.finfo(dtype).max)


def test_payloads_of_zeros_and_subnormals_stay(numbers):
  x = np.array([0x80000000, 1, 0x807FFFFF, 0x7F7FFFFF], np.uint32).view(np.float32)
  found, largest = scan.copy(x, np.dtype(np.float32))
  assert largest < np.inf and found.tobytes() == x.tobytes()


def test_explanations():
  f32, f16 = np.dtype(np.float32), np.dtype(np.float16)
  x = np.zeros((3, 4), np.float32)
  x[1:, 2] = np.nan, np.inf
  assert scan.explain(x, f32) == "2 values are NaN or infinite, the first at [1, 2]: nan"
  assert (
    scan.explain(np.float32(np.inf)[None][0:1].reshape(()), f32)
    == "1 value is NaN or infinite, the first at []: inf"
  )
  x[1:, 2] = 70000, -1e9
  assert scan.copy(x, f16)[1] == np.inf
  assert scan.explain(x, f16) == "70000 at [1, 2] is beyond the largest float16"
