"""Weights of 4 and 3 bits by groups: the definitions written out, packed bytes, the edges of the range, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantization_table import equal, nearest

from jaxllm import quant
from jaxllm.ops import quantized

NAMES = ("int4", "int4_asym", "int3", "int3_asym")
SHAPES = ((48, 32), (3, 16, 8))
GROUP = 8


def weights(shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 0.3 + 0.05


def held(name, w, group=GROUP):
  scheme = quant.SCHEMES[name](group=group)
  return quant.QTensor(jax.jit(scheme.quantize)(jnp.asarray(w)), scheme)


def bfloat16(x):
  return np.asarray(jnp.asarray(x, jnp.float32).astype(jnp.bfloat16), np.float64)


def reference(name, w):
  """(w / scale, scale, zero), float64 [..., out, groups, GROUP] and [..., out, groups, 1], by the definitions."""
  bits = int(name[3])
  w = np.swapaxes(w, -1, -2).astype(np.float64)
  w = w.reshape(*w.shape[:-1], -1, GROUP)
  over = dict(axis=-1, keepdims=True)
  if "asym" not in name:
    scale = bfloat16(np.abs(w).max(**over) / (2 ** (bits - 1) - 1))
    return w / scale, scale, np.full_like(scale, 2 ** (bits - 1))
  low, high = np.minimum(w.min(**over), 0), np.maximum(w.max(**over), 0)
  scale = bfloat16((high - low) / (2**bits - 1))
  return w / scale, scale, np.round(-low / scale)


def numbers(q):
  """Every n [..., out, groups, GROUP], unpacked a bit at a time as the docstring has them."""
  value, out = np.asarray(q.parts["value"], int), q.shape[-1]
  f = np.arange(out)
  if q.scheme.bits == 4:
    n = value[..., f // 2, :] >> (4 * (f % 2))[:, None] & 15
  else:
    high = np.asarray(q.parts["high"], int)
    n = (
      value[..., f // 4, :] >> (2 * (f % 4))[:, None] & 3
      | (high[..., f // 8, :] >> (f % 8)[:, None] & 1) << 2
    )
  return n.reshape(*n.shape[:-1], -1, GROUP)


@pytest.mark.core
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_numbers_scales_and_zeros_are_those_of_the_definition(name, shape):
  w = weights(shape)
  q, (exact, scale, zero), bits = held(name, w), reference(name, w), int(name[3])
  assert q.shape == shape and q.dtype == jnp.uint8 and q.size == w.size
  equal(f"definition: {name}, scales", np.asarray(q.parts["scale"], np.float64), scale[..., 0])
  n = numbers(q)
  if "asym" in name:
    equal(f"definition: {name}, zero points", np.asarray(q.parts["zero"], np.float64), zero[..., 0])
    expected = np.clip(exact + zero, 0, 2**bits - 1)
    assert n.min() == 0 and n.max() == 2**bits - 1
  else:
    expected = exact + zero
    assert n.min() == 1 and n.max() == 2**bits - 1  # the magnitude of -8, or -4, has no counterpart
  nearest(f"definition: {name}, numbers", n, expected)
  found = np.swapaxes(quant.dequantize(q), -1, -2).reshape(n.shape)
  np.testing.assert_allclose(found, (n - zero) * scale, rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_every_weight_is_off_by_half_a_scale_at_most(name, shape):
  w = weights(shape, 1)
  q, bits = held(name, w), int(name[3])
  scale = np.repeat(np.asarray(q.parts["scale"], np.float32), GROUP, axis=-1)
  # the last term is at most 2^bits / 256 (test_ranges); of these weights scales are off by half of what they may be
  most = 0.5 + 1e-5 + ("asym" in name) * 2**bits / 512
  assert np.all(np.abs(np.swapaxes(quant.dequantize(q) - w, -1, -2)) <= most * scale)


@pytest.mark.parametrize(
  ("name", "group", "bits"),
  [
    ("int4", 128, 4.125),
    ("int4_asym", 128, 4.1875),
    ("int3", 128, 3.125),
    ("int3", 16, 4),
    ("int3_asym", 64, 3.375),
  ],
)
def test_bits_are_those_of_all_bytes_that_are_held(name, group, bits):
  q = held(name, weights((256, 32)), group)
  assert 8 * q.nbytes == 8 * sum(x.nbytes for x in jax.tree.leaves(q)) == bits * 256 * 32
  (row,) = quant.report({"layers": {"0": {"mlp": {"up": {"w": q}}}}})
  assert row["bits"] == bits and row["bytes"] == q.nbytes


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_the_product_is_that_of_the_weight_that_is_held(name, dtype, rows):
  q, x = held(name, weights((48, 64))), jnp.asarray(weights((rows, 48), 2), dtype)
  expected = np.asarray(x, np.float64) @ np.asarray(quant.dequantize(q), np.float64)
  found = jax.jit(lambda x, q: q.scheme.product(x, q.parts))(x, q)
  # in bfloat16 each weight is rounded, by 2^-8 at most; the sum of 48 has a root of them
  assert found.dtype == jnp.float32
  assert np.abs(found - expected).max() <= (2e-6 if dtype == "float32" else 2**-8) * np.abs(expected).max()


@pytest.mark.parametrize("rows", [1, 16, 17])
@pytest.mark.parametrize("columns", [8, pytest.param(64, marks=pytest.mark.slow), 312, 1536])
@pytest.mark.parametrize("name", ["int4", "int3_asym"])
def test_pieces_are_the_whole_product(name, columns, rows):
  q, x = held(name, weights((48, columns))), weights((rows, 48), 2)
  expected = x.astype(np.float64) @ np.asarray(quant.dequantize(q), np.float64)
  found = jax.jit(quantized.product)(x, q)
  assert found.shape == (rows, columns) and np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max()


@pytest.mark.parametrize("name", NAMES)
def test_groups_of_nothing_one_value_one_sign_and_tiny_numbers(name):
  w = np.zeros((GROUP, 8), np.float32)
  w[:, 1], w[:, 2], w[:, 3], w[0, 4] = 0.5, -0.25, np.arange(1, 9), 1e-38
  w[:, 5], w[:, 6] = [-3, 1, 0, 2, 0, 1, -1, 0], np.array([-3, 1, 0, 2, 0, 1, -1, 0]) * 1e30
  q = held(name, w)
  found, scale = np.asarray(quant.dequantize(q)), np.asarray(q.parts["scale"], np.float32)[:, 0]
  assert np.isfinite(found).all() and not found[:, 0].any() and not found[w == 0].any()
  assert scale[0] == 1 and np.all(np.abs(found - w) <= scale * (0.5 + 1e-5 + ("asym" in name) / 32))
  if "asym" in name:  # a group of one sign has the whole range, and ends at 0
    assert q.parts["zero"][:4, 0].tolist() == [0, 0, 2 ** int(name[3]) - 1, 0]
  np.testing.assert_allclose(found[:, 1], 0.5, rtol=2**-8)


def test_a_scale_without_the_range_of_float32_would_lose_small_weights():
  """As bfloat16, the scale of weights of 1e-7 is one; float16, with the same bytes, has 0 there."""
  w = weights((GROUP, 8)) * 1e-8
  assert np.abs(quant.dequantize(held("int4", w)) - w).max() <= np.abs(w).max() / 12
  assert np.float16(np.abs(w).max() / 7) == 0
