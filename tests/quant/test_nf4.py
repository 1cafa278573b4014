"""NF4 and FP4: levels from their definitions, every byte, nearest levels, published errors, double quantization, products."""

import itertools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantization_table import about, measured

from jaxllm import quant
from jaxllm.ops import quantized
from jaxllm.quant import dynamic
from jaxllm.quant.codebook import TABLES

NAMES = ("nf4", "fp4")
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)

# Mean errors |w - w'| and |w - w'| / |w| of a normal matrix of 1024 x 1024, of test_functional.py of bitsandbytes, and how far
# those of one matrix scatter.  Its later bound is the mean + 7 sigma; sigmas are of 100 matrices through bitsandbytes 0.50.2
# (0.000071 for nf4 in blocks of 64, where its table has 0.000074).
PUBLISHED = {
  "nf4": {
    32: (0.067745, 0.000065, 0.189700, 0.000279),
    64: (0.072792, 0.000071, 0.203299, 0.000301),
    128: (0.076835, 0.000082, 0.215252, 0.000341),
    256: (0.080326, 0.000109, 0.226044, 0.000397),
    512: (0.083535, 0.000149, 0.236021, 0.000486),
    1024: (0.086603, 0.000187, 0.245365, 0.000577),
    2048: (0.089592, 0.000254, 0.254146, 0.000748),
    4096: (0.092537, 0.000355, 0.262457, 0.000966),
  },
  "fp4": {
    32: (0.088918, 0.000100, 0.242380, 0.000285),
    64: (0.096545, 0.000109, 0.260130, 0.000337),
    128: (0.102947, 0.000128, 0.275734, 0.000380),
    256: (0.108685, 0.000168, 0.289842, 0.000440),
    512: (0.114087, 0.000226, 0.302852, 0.000552),
    1024: (0.119312, 0.000302, 0.314982, 0.000677),
    2048: (0.124460, 0.000415, 0.326402, 0.000886),
    4096: (0.129573, 0.000592, 0.337228, 0.001186),
  },
}


def weights(shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def held(name, w, **options):
  scheme = quant.SCHEMES[name](**options)
  return quant.QTensor(jax.jit(scheme.quantize)(jnp.asarray(w)), scheme)


def indices(q):
  """[..., out, in] of four bits each, the high ones of a byte first."""
  byte = np.asarray(q.parts["value"])
  return np.stack([byte >> 4, byte & 15], axis=-1).reshape(*byte.shape[:-1], -1)


def test_levels_of_nf4_are_quantiles_of_the_normal_distribution():
  quantile, offset = statistics.NormalDist().inv_cdf, (31 / 32 + 29 / 30) / 2
  above = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
  below = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
  expected = np.sort([*below, 0, *above]) / max(above)
  assert (
    np.abs(TABLES["nf4"] - expected).max() < 2e-7
  )  # the published digits come from an offset of seven digits
  assert TABLES["nf4"][7] == 0 and len(set(TABLES["nf4"])) == 16


def test_levels_of_fp4_are_small_floats():
  """A sign, exponents of 4, 2 and 8 by their bits, a mantissa of 1 or 1.5; without an exponent 0 or 1 / 16; over 12."""
  for sign, exponent, half in itertools.product((0, 1), range(4), (0, 1)):
    size = half / 16 if exponent == 0 else 2.0 ** (4 - exponent) * (1 + half / 2)
    found = TABLES["fp4"][8 * sign + 2 * exponent + half]
    assert found == np.float32((-1) ** sign * size / 12)


@pytest.mark.core
@pytest.mark.parametrize("name", NAMES)
def test_every_byte_holds_two_levels_the_first_in_its_high_bits(name):
  table = TABLES[name]
  pairs = np.array(list(itertools.product(range(16), repeat=2)))  # of all bytes
  ends = np.full((256, 2), np.argmax(table))  # so that every column has an absmax of 1
  n = np.concatenate([pairs, ends], axis=1)
  q = held(name, table[n].T, block=4)
  byte = np.arange(256)
  if name == "fp4":  # -0 is 0
    byte = np.where(byte >> 4 == 8, byte & 15, byte)
    byte = np.where(byte & 15 == 8, byte & 240, byte)
  np.testing.assert_array_equal(q.parts["value"][:, 0], byte)
  np.testing.assert_array_equal(q.parts["scale"], np.ones((256, 1)))
  every = quant.QTensor(
    {"value": np.arange(256, dtype=np.uint8)[:, None], "scale": np.ones((256, 1), np.float32)}, q.scheme
  )
  every = quant.QTensor(every.parts, quant.SCHEMES[name](block=2))
  np.testing.assert_array_equal(quant.dequantize(every).T, table[pairs])


@pytest.mark.core
@pytest.mark.parametrize("shape", [(256, 48), (2, 128, 24)])
@pytest.mark.parametrize("name", NAMES)
def test_weights_are_held_by_the_nearest_level_of_their_block(name, shape):
  w = weights(shape)
  q = held(name, w)
  *leading, D, F = shape
  blocks = np.swapaxes(w, -1, -2).astype(np.float64).reshape(*leading, F, D // 64, 64)
  absmax = np.abs(blocks).max(-1, keepdims=True)
  np.testing.assert_array_equal(q.parts["scale"], absmax[..., 0].astype(np.float32))
  distance = np.abs(blocks[..., None] - absmax[..., None] * TABLES[name].astype(np.float64))
  found = np.take_along_axis(distance, indices(q).reshape(blocks.shape)[..., None].astype(int), -1)[..., 0]
  assert np.all(found <= distance.min(-1) + 1e-7 * absmax)
  expected = np.swapaxes(
    (TABLES[name][indices(q).reshape(blocks.shape)] * absmax.astype(np.float32)).reshape(*leading, F, D),
    -1,
    -2,
  )
  np.testing.assert_array_equal(quant.dequantize(q), expected)
  assert q.shape == shape and q.size == w.size and q.dtype == jnp.uint8


@pytest.fixture(scope="module")
def normal():
  return weights((4096, 256), 1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
  "block", [n if n in (64, 256, 4096) else pytest.param(n, marks=pytest.mark.slow) for n in BLOCKS]
)
def test_errors_are_within_those_that_bitsandbytes_publishes(name, block, normal):
  row = f"{name}, block {block}"
  about("errors", row)
  off = np.abs(quant.dequantize(held(name, normal, block=block)) - normal)
  mean, sigma, relative, relative_sigma = PUBLISHED[name][block]
  found, found_relative = off.mean(), (off / (np.abs(normal) + 1e-8)).mean()
  assert abs(found - mean) < 7 * sigma and abs(found_relative - relative) < 7 * relative_sigma
  most = {"at most": mean + 7 * sigma, "at most of it": relative + 7 * relative_sigma}
  measured("errors", row, **{"mean |error|": found, "mean |error / w|": found_relative}, **most)


def int4(w, block, symmetric):
  """Round to nearest in 15 or 16 steps, in float64."""
  x = w.T.astype(np.float64).reshape(w.shape[1], -1, block)
  if symmetric:
    scale = np.abs(x).max(-1, keepdims=True) / 7
    return (np.round(x / scale) * scale).reshape(w.T.shape).T
  low, high = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
  scale = (high - low) / 15
  zero = np.round(-low / scale)
  return ((np.clip(np.round(x / scale) + zero, 0, 15) - zero) * scale).reshape(w.T.shape).T


@pytest.mark.core
def test_nf4_is_nearer_than_int4_and_int4_than_fp4_but_not_in_squares(normal):
  """Of asymmetric int4 the squares are smaller at a block of 64, and larger at 128 and 256."""
  mae, mse = {}, {}
  for block in (64, 128, 256):
    of = {name: quant.dequantize(held(name, normal, block=block)) for name in NAMES}
    of |= {"int4": int4(normal, block, True), "int4_asym": int4(normal, block, False)}
    for name in ("nf4", "int4", "int4_asym", "fp4"):
      off, row = of[name] - normal, f"{block}, {name}"
      about("int4", row)
      mae[name, block], mse[name, block] = np.abs(off).mean(), np.square(off).mean()
      measured("int4", row, **{"mean |error|": mae[name, block], "mean error^2": mse[name, block]})
    assert mae["nf4", block] < mae["int4", block] < mae["fp4", block] or block > 64
  assert mse["int4_asym", 64] < mse["nf4", 64] < mse["int4", 64]
  assert all(mse["nf4", block] < mse["int4_asym", block] for block in (128, 256))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_blocks_of_nothing_one_value_and_tiny_numbers(name, double_quant):
  w = np.zeros((64, 6), np.float32)
  w[:, 1], w[:, 2], w[:, 3], w[0, 4], w[:, 5] = 0.5, -0.25, 1e-30, 1e-38, np.linspace(-1, 1, 64)
  q = held(name, w, double_quant=double_quant)
  found = np.asarray(quant.dequantize(q))
  assert np.isfinite(found).all() and not found[:, 0].any()
  if not double_quant:
    np.testing.assert_array_equal(found[:, 1:3], w[:, 1:3])
    assert found[0, 5] == -1 and found[-1, 5] == 1
  flat = held(name, np.full((64, 4), 0.5, np.float32), double_quant=double_quant)  # all absmax are their mean
  np.testing.assert_array_equal(quant.dequantize(flat), 0.5)


def test_the_dynamic_type_has_seven_decades_with_twice_the_numbers_each():
  levels = dynamic.LEVELS
  assert (
    len(set(levels.tolist())) == 256
    and levels[127] == 0
    and levels[-1] == 1
    and levels[0] == np.float32(-0.99296875)
  )
  decade = np.floor(np.log10(levels[128:-1].astype(np.float64))).astype(int)
  assert [int(np.sum(decade == d)) for d in range(-7, 0)] == [1, 2, 4, 8, 16, 32, 64]
  np.testing.assert_array_equal(levels[:127], -levels[128:-1][::-1])


def test_scales_of_8_bits_are_the_nearest_and_cost_an_eighth_of_a_bit():
  w = weights((1024, 512), 2) * np.exp(weights((1, 512), 3))
  plain, double = held("nf4", w), held("nf4", w, double_quant=True)
  np.testing.assert_array_equal(plain.parts["value"], double.parts["value"])
  absmax = np.asarray(plain.parts["scale"], np.float64).reshape(
    -1, 256
  )  # 256 that follow each other, of 16 columns
  mean = float(double.parts["mean_scale"][0, 0])
  assert mean == pytest.approx(absmax.mean(), rel=1e-6)
  nested = np.abs(np.float32(absmax) - np.float32(mean)).max(1, keepdims=True)
  np.testing.assert_array_equal(double.parts["nested_scale"][0], nested[:, 0])
  levels = nested * dynamic.LEVELS.astype(np.float64) + mean
  n = np.asarray(double.parts["scale"]).reshape(-1, 256)
  off = np.abs(np.take_along_axis(levels, n.astype(int), 1) - absmax)
  assert np.all(off <= np.abs(levels[:, None] - absmax[:, :, None]).min(-1) + 2e-7 * (nested + mean))
  places = 32 / 1024 + 32 / w.size  # where each column begins, and the mean
  assert (
    8 * double.nbytes / w.size == 4 + 8 / 64 + 32 / (64 * 256) + places and 8 * plain.nbytes / w.size == 4.5
  )
  error = lambda q: np.linalg.norm(quant.dequantize(q) - w) / np.linalg.norm(w)
  assert abs(error(double) / error(plain) - 1) < 0.01


@pytest.mark.parametrize("columns", [3, 44, 300])
def test_scales_that_have_one_in_common_may_be_of_columns_apart(columns):
  """44 columns of 44 blocks are 1936 scales: the scale of a scale changes within columns, and the last has fewer."""
  w = weights((44 * 8, columns), 4) * np.exp(weights((1, columns), 5))
  q = held("nf4", w, block=8, double_quant=True)
  plain = np.asarray(held("nf4", w, block=8).parts["scale"])
  flat = plain.reshape(-1) - np.float32(q.parts["mean_scale"][0, 0])
  nested = [np.abs(flat[i : i + 256]).max() for i in range(0, flat.size, 256)]
  np.testing.assert_array_equal(q.parts["nested_scale"][0], nested)
  found = np.asarray(q.scheme._scale(q.parts))
  expected = dynamic.LEVELS[np.asarray(q.parts["scale"]).reshape(-1)] * np.repeat(nested, 256)[
    : flat.size
  ].astype(np.float32)
  np.testing.assert_allclose(found.reshape(-1), expected + np.float32(q.parts["mean_scale"][0, 0]), rtol=1e-6)
  some = {
    name: part if part.shape[0] == 1 else part[1:3] for name, part in q.parts.items()
  }  # columns read apart
  np.testing.assert_array_equal(q.scheme.dequantize(some), quant.dequantize(q)[:, 1:3])


@pytest.mark.parametrize("options", [{}, {"double_quant": True}])
def test_stacked_weights_are_held_as_each_alone(options):
  w = weights((3, 64, 16), 6)
  q = held("nf4", w, block=16, **options)
  for i in range(3):
    alone = held("nf4", w[i], block=16, **options)
    jax.tree.map(np.testing.assert_array_equal, q[i].parts, alone.parts)
    np.testing.assert_array_equal(quant.dequantize(q)[i], quant.dequantize(alone))


@pytest.mark.parametrize(
  ("rows", "columns", "dtype"), [(1, 512, "bfloat16"), (5, 31, "float32"), (40, 512, "float32")]
)
@pytest.mark.parametrize(("name", "options"), [("nf4", {}), ("fp4", {}), ("nf4", {"double_quant": True})])
def test_the_product_is_that_of_the_weight_that_is_held(name, options, rows, columns, dtype):
  q, x = held(name, weights((128, columns)), **options), jnp.asarray(weights((rows, 128), 7), dtype)
  expected = np.asarray(x, np.float64) @ np.asarray(quant.dequantize(q), np.float64)
  found = jax.jit(quantized.product)(x, q)
  assert found.dtype == jnp.float32 and found.shape == (rows, columns)
  assert np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max()
