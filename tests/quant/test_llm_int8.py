"""LLM.int8(): outlier features beside integers, as the paper and bitsandbytes have them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantization_table import about, close, measured

from jaxllm import quant
from jaxllm.ops import quantized

PLANTED = (3, 50, 51)


def random(shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def planted(rows=16, D=128, seed=1):
  """Rows with three features twenty times as large as the others."""
  x = random((rows, D), seed)
  x[:, list(PLANTED)] *= 20
  return x


def held(w, name="llm_int8", **kwargs):
  scheme = quant.SCHEMES[name](**kwargs)
  return quant.QTensor(jax.jit(scheme.quantize)(jnp.asarray(w)), scheme)


def dequantized(q):
  return np.asarray(quant.dequantize(q), np.float64)


def product(x, q):
  return np.asarray(jax.jit(quantized.product)(x, q))


def reference(x, q, threshold=6.0, most=None):
  """The definition in float64, features one after the other."""
  largest = np.abs(x).max(0)
  features = [d for d in np.argsort(-largest, kind="stable")[:most] if largest[d] >= threshold]
  inner = x.copy()
  for d in features:
    inner[np.abs(x[:, d]) >= threshold, d] = 0
  rows = np.abs(inner).max(-1, keepdims=True)
  n = np.round(inner * (np.float32(127) * (1 / np.maximum(rows, np.float32(1e-36))))).astype(int)
  n[:, features] = 0
  value, scale = np.asarray(q.parts["value"], int), np.asarray(q.parts["scale"], np.float64)
  y = (n @ value.T) * (rows.astype(np.float64) / 127) * scale.T
  for d in features:
    y += np.outer(x[:, d].astype(np.float64), value[:, d] * scale[:, 0])
  return y


@pytest.mark.core
@pytest.mark.parametrize("most", [None, 1, 2, 8])
@pytest.mark.parametrize("rows", [1, 16, 40])
def test_the_product_is_that_of_the_definition(rows, most):
  q, x = held(random((128, 64)), outliers=most), planted(rows)
  y = reference(x, q, most=most)
  found = product(x, q)
  assert found.dtype == np.float32 and np.abs(found - y).max() <= 2e-6 * np.abs(y).max()


def lost(x, w, name, **fields):
  """||x w' - x w||: w as it was, not as it is held."""
  return np.linalg.norm(product(x, held(w, name, **fields)) - x.astype(np.float64) @ w)


@pytest.mark.core
@pytest.mark.parametrize(
  "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 6))]
)
def test_planted_outliers_cost_a_fifth_of_the_error_at_most(seed):
  """With `features`, whose rows of w are in 16 bits, as the paper has them; by default these are integers: 0.19 to 0.25."""
  w, x = random((1024, 64), 10 + seed), planted(D=1024, seed=20 + seed)
  vector_wise = lost(x, w, "w8a8")
  for held_as, least, most, fields in (
    ("features=, rows of w in 16 bits", 0, 0.2, dict(features=PLANTED)),
    ("features=, rows of w in 16 bits, no others", 0, 0.2, dict(features=PLANTED, threshold=float("inf"))),
    ("the default, rows of w as integers", 0.18, 0.26, {}),
    ("outliers=8, rows of w as integers", 0.18, 0.26, dict(outliers=8)),
  ):
    row = f"three 20 times as large: {held_as}"
    about("outliers", row)
    kept = lost(x, w, "llm_int8", **fields)
    assert least * vector_wise < kept < most * vector_wise
    measured("outliers", row, **{"w8a8": vector_wise, "LLM.int8()": kept, "ratio": kept / vector_wise})
  assert lost(x, w, "llm_int8", threshold=1e3) == vector_wise
  assert lost(x, w, "llm_int8", features=(0, 1, 2), threshold=1e3) > 0.9 * vector_wise  # others than they are


@pytest.mark.parametrize("most", [None, 8])
def test_rows_lose_a_fifth_at_most_by_default_too(most):
  """Of what rows lose, the weight being what is held, at 20 times the size of others, and of all that is lost at 60 times."""
  w, x = random((1024, 64)), planted(D=1024)
  for rows, expected in ((x, None), (np.where(np.isin(np.arange(1024), PLANTED), 3 * x, x), w)):
    off = []
    for q in (held(w, outliers=most), held(w, "w8a8")):
      whole = dequantized(q) if expected is None else expected
      off.append(np.linalg.norm(product(rows, q) - rows.astype(np.float64) @ whole))
    assert off[0] < 0.2 * off[1]


@pytest.mark.parametrize("rows", [1, 16])
def test_features_that_are_given_are_floats_and_the_rest_is_as_without_them(rows):
  w, x = random((128, 64)), planted(rows)
  w[3] *= 100  # it would widen every column's scale
  q = held(w, features=(3, 7))
  others = np.where(np.isin(np.arange(128), (3, 7))[:, None], 0, w)
  rest = held(others)
  assert q.parts["kept"].dtype == np.float16 and q.parts["kept"].shape == (64, 2)
  np.testing.assert_array_equal(q.parts["value"], rest.parts["value"])
  np.testing.assert_array_equal(q.parts["scale"], rest.parts["scale"])
  half = w[[3, 7]].astype(np.float16).astype(np.float64)
  np.testing.assert_array_equal(dequantized(q)[[3, 7]], half)
  inner = np.where(np.isin(np.arange(128), (3, 7)), 0, x)  # 50 and 51 are found, as ever
  expected = reference(inner, rest) + x[:, [3, 7]] @ half
  assert np.abs(product(x, q) - expected).max() <= 2e-6 * np.abs(expected).max()
  assert 8 * q.nbytes == 64 * (128 * 8 + 2 * 16 + 32)


def test_a_fixed_number_is_the_mask_where_it_suffices():
  w, x = random((128, 64)), planted()
  assert (np.abs(x).max(0) >= 6).sum() == len(PLANTED)
  mask, three, two = (product(x, held(w, outliers=most)) for most in (None, 3, 2))
  np.testing.assert_allclose(three, mask, rtol=0, atol=2e-6 * np.abs(mask).max())
  assert np.abs(two - mask).max() > 1e-3 * np.abs(mask).max()


@pytest.mark.parametrize("most", [None, 4])
def test_without_outliers_it_is_w8a8_to_the_bit(most):
  w, x = random((128, 64)), np.clip(random((16, 128), 1), -5.99, 5.99)
  expected = product(x, held(w, "w8a8"))
  np.testing.assert_array_equal(product(x, held(w, outliers=most)), expected)
  np.testing.assert_array_equal(
    product(planted(), held(w, threshold=float("inf"))), product(planted(), held(w, "w8a8"))
  )


def test_all_outliers_are_the_product_with_the_weight_that_is_held():
  x, q = planted(), held(random((128, 64)), threshold=1e-30)
  expected = x.astype(np.float64) @ np.asarray(quant.dequantize(q), np.float64)
  assert np.abs(product(x, q) - expected).max() <= 2e-6 * np.abs(expected).max()


def test_the_threshold_itself_is_an_outlier():
  x, w = np.ones((2, 8), np.float32), random((8, 8))
  x[0, 3] = 6
  at, above = held(w), held(w, threshold=np.nextafter(np.float32(6), np.float32(7)).item())
  np.testing.assert_allclose(product(x, at), reference(x, at), rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(product(x, above), product(x, held(w, "w8a8")))


def test_numbers_are_those_of_bitsandbytes():
  """Its integers, maxima and features, with values below the threshold beside those above it in a feature."""
  torch = pytest.importorskip("torch")
  functional = pytest.importorskip("bitsandbytes.functional")
  x = planted()
  x[:8, 3] /= 100
  n, largest, features = functional.int8_vectorwise_quant(torch.tensor(x), threshold=6.0)
  assert set(PLANTED) == set(features.tolist())
  # a weight of one column a feature gives back each integer times its scale: 127 are exact in float32
  q = held(np.eye(128, dtype=np.float32))
  found = product(x, q)
  kept = [d for d in range(128) if d not in PLANTED]
  expected = n.numpy().astype(np.float64) * largest.numpy()[:, None] / 127
  close("bitsandbytes: llm_int8, int8_vectorwise_quant, rows", found[:, kept], expected[:, kept], 1e-6)
  assert not n[:, list(PLANTED)].any()
  np.testing.assert_allclose(found[:, list(PLANTED)], x[:, list(PLANTED)], rtol=1e-6)


def test_rows_of_zeros_and_no_numbers():
  x = np.zeros((3, 128), np.float32)
  x[1, 0], x[2, 0], x[2, 1] = 7, np.nan, 1
  found = product(x, held(random((128, 64))))
  assert not found[0].any() and np.isfinite(found[1]).all() and not np.isfinite(found[2]).any()
