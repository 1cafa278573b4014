"""Rows of GLM-130B and ChatGLM in 8 and 4 bits: the published quantizer and decoder written out, and products."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantization_table import equal

from jaxllm import quant
from jaxllm.ops import quantized

NAMES = ("glm_int8", "glm_int4")


def weights(shape, seed=0, scale=0.02):
  return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float16)


def held(name, w):
  scheme = quant.SCHEMES[name]()
  return quant.QTensor(jax.jit(scheme.quantize)(jnp.asarray(w)), scheme)


def published(w_FD, bits):
  """(weight int8, weight_scale float16) of rows in half precision, whose quotients NumPy rounds to half precision, too."""
  largest = 2 ** (bits - 1) - 1
  scale = (np.abs(w_FD).max(-1).astype(np.float32) / np.float32(largest)).astype(np.float16)
  with np.errstate(divide="ignore", invalid="ignore"):
    n = np.round(w_FD / scale[:, None])
  n = np.where(np.isnan(n), 0, n)  # 0 / 0 of a row of zeros
  n = np.minimum(n, largest).astype(np.int8)  # the published code wraps what a tiny scale leaves above
  if bits == 4:
    n = ((n[:, 0::2].astype(int) << 4) | (n[:, 1::2] & 0xF)).astype(np.uint8).view(np.int8)
  return n, scale


def decoded(weight, scale, bits):
  """The rows as float32: of 4 bits the even column from the high nibble, with sign-extending shifts."""
  if bits == 4:
    low = (weight.view(np.uint8) << 4).astype(np.uint8).view(np.int8)
    weight = np.stack([weight >> 4, low >> 4], axis=-1).reshape(len(weight), -1)
  return weight.astype(np.float32) * scale.astype(np.float32)[:, None]


@pytest.mark.core
@pytest.mark.parametrize("scale", [1.0, 0.02, 3e-4])
@pytest.mark.parametrize(("name", "bits"), [("glm_int8", 8), ("glm_int4", 4)])
def test_bytes_and_scales_are_the_published_ones(name, bits, scale):
  """Of 3e-4 the scales of 8 bits are subnormal numbers of half precision."""
  w = weights((600, 64), scale=scale)
  q, (weight, weight_scale) = held(name, w.T), published(w, bits)
  row = f"published code: {name}, "
  equal(row + "packed bytes", q.parts["value"], weight)
  equal(row + "scales", q.parts["scale"][:, 0], weight_scale)
  equal(row + "weights", quant.dequantize(q).T, decoded(weight, weight_scale, bits))
  assert q.shape == (64, 600) and q.dtype == jnp.int8 and q.parts["scale"].dtype == jnp.float16
  assert 8 * q.nbytes / q.size == bits + 16 / 64


@pytest.mark.parametrize(("name", "bits"), [("glm_int8", 8), ("glm_int4", 4)])
def test_the_scale_of_every_number_of_half_precision_is_the_published_one(name, bits):
  w = np.arange(0x7C00, dtype=np.uint16).view(np.float16)[:, None].repeat(2, 1)  # from 0 to 65504
  expected = published(w, bits)[1]
  np.testing.assert_array_equal(held(name, w.T).parts["scale"][:, 0], np.where(expected == 0, 1, expected))


def test_every_byte_of_4_bits_is_an_even_column_in_its_high_nibble_and_an_odd_one_in_its_low():
  pairs = np.array(list(itertools.product(range(-7, 8), repeat=2)))
  n = np.concatenate([pairs, np.full((len(pairs), 2), 7)], axis=1)  # so that every scale is 1
  q = held("glm_int4", n.T.astype(np.float16))
  assert q.parts["value"][:, 0].astype(int).tolist() == [
    (16 * a + b % 16 + 128) % 256 - 128 for a, b in pairs
  ]
  np.testing.assert_array_equal(quant.dequantize(q).T, n)
  every = quant.QTensor(
    {"value": np.arange(256, dtype=np.uint8).view(np.int8)[:, None], "scale": np.ones((256, 1), np.float16)},
    q.scheme,
  )
  signed = np.arange(16) - 16 * (np.arange(16) > 7)
  np.testing.assert_array_equal(quant.dequantize(every).T, list(itertools.product(signed, repeat=2)))


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_is_off_by_half_a_scale_at_most(name):
  w = weights((256, 64)).astype(np.float32)
  q = held(name, w)
  scale = np.asarray(q.parts["scale"], np.float32).T
  largest = {"glm_int8": 127, "glm_int4": 7}[name]
  # and the quotient's rounding, half of 2^-10 of it, and the scale's at the ends
  assert np.all(np.abs(quant.dequantize(q) - w) <= scale * (0.5 + largest * 2.0**-10))


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_other_types_are_held_as_those_of_half_precision(name):
  """Which has a thousandth of them on the other side of a half, or under another scale."""
  w = np.random.default_rng(2).standard_normal((256, 64)).astype(np.float32) * 0.02
  half = w.astype(np.float16)
  jax.tree.map(np.testing.assert_array_equal, held(name, w).parts, held(name, half).parts)
  weight, scale = published(half.T, int(name[-1]))
  np.testing.assert_array_equal(held(name, w).parts["value"], weight)
  unrounded = w.T / scale.astype(np.float32)[:, None]  # as if it were not rounded first
  assert np.any(np.round(unrounded) != np.round(half.T / scale[:, None]))


@pytest.mark.parametrize("name", NAMES)
def test_columns_of_nothing_one_value_and_tiny_numbers(name):
  w = np.zeros((4, 4), np.float32)
  w[:, 1], w[:, 2], w[0, 3] = 0.5, -0.25, 1e-30
  found = np.asarray(quant.dequantize(held(name, w)))
  assert np.isfinite(found).all() and not found[:, [0, 3]].any()
  np.testing.assert_allclose(found[:, 1:3], w[:, 1:3], rtol=2e-3)


@pytest.mark.parametrize("name", NAMES)
def test_stacked_weights_are_held_as_each_alone(name):
  w = weights((3, 16, 8))
  q = held(name, w)
  assert q.shape == (3, 16, 8)
  for i in range(3):
    jax.tree.map(np.testing.assert_array_equal, q[i].parts, held(name, w[i]).parts)
    np.testing.assert_array_equal(quant.dequantize(q)[i], quant.dequantize(q[i]))


@pytest.mark.parametrize(
  ("rows", "columns", "dtype"), [(1, 512, "bfloat16"), (5, 31, "float32"), (40, 512, "float32")]
)
@pytest.mark.parametrize("name", NAMES)
def test_the_product_is_that_of_the_weight_that_is_held(name, rows, columns, dtype):
  q, x = held(name, weights((64, columns))), jnp.asarray(weights((rows, 64), 2), dtype)
  expected = np.asarray(x, np.float64) @ np.asarray(quant.dequantize(q), np.float64)
  found = jax.jit(quantized.product)(x, q)
  assert found.dtype == jnp.float32 and found.shape == (rows, columns)
  assert np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max()
