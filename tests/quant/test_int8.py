"""Weights of 8 bits: the published formulas written out, the edges of their range, and models that run on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantization_table import equal, nearest

from jaxllm import quant

NAMES = ("int8", "int8_tensor", "int8_asym")
SHAPES = ((48, 32), (3, 16, 8))


def weights(shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 0.3 + 0.05


def held(name, w):
  scheme = quant.SCHEMES[name]()
  return quant.QTensor(jax.jit(scheme.quantize)(jnp.asarray(w)), scheme)


def reference(name, w):
  """(n, scale, zero) in float64, by the definitions: a column is w[..., :, f]."""
  over = (-1, -2) if name == "int8_tensor" else -2
  w = w.astype(np.float64)
  if name != "int8_asym":
    scale = np.abs(w).max(over, keepdims=True) / 127
    return w / scale, scale, np.zeros_like(scale)
  low, high = np.minimum(w.min(over, keepdims=True), 0), np.maximum(w.max(over, keepdims=True), 0)
  scale = (high - low) / 254
  return w / scale - 127 - np.round(low / scale), scale, -127 - np.round(low / scale)


@pytest.mark.core
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_numbers_and_scales_are_those_of_the_definition(name, shape):
  w = weights(shape)
  q, (n, scale, zero) = held(name, w), reference(name, w)
  assert q.shape == shape and q.dtype == jnp.int8 and q.size == w.size
  np.testing.assert_allclose(np.swapaxes(q.parts["scale"], -1, -2), scale, rtol=1e-6)
  found = np.swapaxes(q.parts["value"], -1, -2).astype(int)
  assert np.abs(found).max() == 127
  nearest(f"definition: {name}, numbers", found, n)
  if name == "int8_asym":
    equal(f"definition: {name}, zero points", np.swapaxes(q.parts["zero"], -1, -2), zero.astype(np.int8))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_every_weight_is_off_by_half_a_scale_at_most(name, shape):
  w = weights(shape, 1)
  q = held(name, w)
  assert np.all(np.abs(quant.dequantize(q) - w) <= np.swapaxes(q.parts["scale"], -1, -2) * (0.5 + 1e-5))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_the_product_is_that_of_the_weight_that_is_held(name, dtype):
  q, x = held(name, weights((48, 32))), jnp.asarray(weights((5, 48), 2), dtype)
  expected = np.asarray(x, np.float64) @ np.asarray(quant.dequantize(q), np.float64)
  found = jax.jit(lambda x, q: q.scheme.product(x, q.parts))(x, q)
  # integers of 8 bits are exact in bfloat16, too
  assert found.dtype == jnp.float32 and np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max()


def test_why_minus_128_is_left_out():
  """It has no counterpart: its magnitude is no int8, and in a range from -128 the same weight of two signs differs."""
  assert np.abs(np.int8(-128)) == -128
  q = held("int8", np.array([[1.0], [-1.0]], np.float32))
  assert q.parts["value"].tolist() == [[127, -127]]
  np.testing.assert_array_equal(quant.dequantize(q), [[1], [-1]])


@pytest.mark.parametrize("name", NAMES)
def test_columns_of_nothing_one_value_one_sign_and_tiny_numbers(name):
  w = np.zeros((4, 6), np.float32)
  w[:, 1], w[:, 2], w[:, 3], w[0, 4] = 0.5, -0.25, [1, 2, 3, 4], 1e-38
  w[:, 5] = [-3, 1, 0, 2]
  q = held(name, w)
  found = np.asarray(quant.dequantize(q))
  assert np.isfinite(found).all() and not found[:, 0].any() and found[2, 5] == 0
  assert np.all(np.abs(found - w) <= np.swapaxes(q.parts["scale"], -1, -2) * (0.5 + 1e-5))
  if name == "int8_asym":  # zero is held exactly, and a column of one sign has all 255 numbers
    assert q.parts["value"][3].tolist()[-1] == 127 and q.parts["zero"][3] == -127


def test_long_sums_do_not_wrap():
  """16,384 products of 127 by 127, whose sum an int16 or an int8 does not hold."""
  q = held("int8", np.ones((16384, 1), np.float32))
  found = q.scheme.product(jnp.full((1, 16384), 127, jnp.float32), q.parts)
  np.testing.assert_allclose(found, [[16384 * 127]], rtol=1e-6)
