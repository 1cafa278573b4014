"""qwix: its int8 by channel, NF4 and int4 tiles beside ours, and its formulas written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantization_table import close, equal

from jaxllm import quant

qwix = pytest.importorskip("qwix")

TILE = 32


def weights(shape=(256, 96), seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def held(name, w, **options):
  scheme = quant.SCHEMES[name](**options)
  return quant.QTensor(jax.jit(scheme.quantize)(jnp.asarray(w)), scheme)


def theirs(w, kind, tile=None, method="absmax"):
  tiles = None if tile is None else {0: tile}
  return qwix.quantize(
    jnp.asarray(w), kind, channelwise_axes=(1,), tiled_axes=tiles, calibration_method=method
  )


def tiles(w):
  return w.astype(np.float64).reshape(-1, TILE, w.shape[1])


def test_int8_by_channel_is_theirs_over_a_range_to_127():
  """qwix's goes to 127.5, so that its last number is as wide as the others: by 127 / 127.5 of our scale.

  It divides by that scale, so that a weight halfway between two numbers to the last bit may go either way; here none is.
  """
  w = weights()
  q, other = held("int8", w), theirs(w, jnp.int8, method=f"absmax,{127.5 / 127}")
  equal("qwix: int8 by channel, numbers", q.parts["value"].T, other.qvalue)
  close("qwix: int8 by channel, scales", q.parts["scale"].T, other.scale, 2e-7)
  same = qwix.QArray(q.parts["value"].T, q.parts["scale"].T)
  equal("qwix: int8 by channel, weights", quant.dequantize(q), qwix.dequantize(same))
  wide = theirs(w, jnp.int8)
  np.testing.assert_allclose(wide.scale, q.parts["scale"].T * (127 / 127.5), rtol=3e-7)
  error = lambda x: np.linalg.norm(x - w) / np.linalg.norm(w)
  assert error(qwix.dequantize(wide)) == pytest.approx(error(quant.dequantize(q)), rel=0.02)


def test_int8_halfway_between_two_numbers_is_theirs_where_scales_are_exact():
  """Multiples of half a scale, which is a power of two: to the even number."""
  rng = np.random.default_rng(4)
  w = (rng.integers(-254, 255, (256, 96)) / 2).astype(np.float32)
  w[0] = 127
  w *= np.exp2(rng.integers(-9, 9, (1, 96))).astype(np.float32)
  q, other = held("int8", w), theirs(w, jnp.int8, method=f"absmax,{127.5 / 127}")
  np.testing.assert_array_equal(q.parts["value"].T, other.qvalue)
  np.testing.assert_array_equal(q.parts["scale"].T, other.scale)


def test_nf4_tiles_are_theirs_bit_by_bit():
  w = weights()
  q, other = held("nf4", w), theirs(w, "nf4", tile=64)
  equal("qwix: nf4 tiles of 64, absmax", q.parts["scale"].T, other.scale)
  equal("qwix: nf4 tiles of 64, weights", quant.dequantize(q), qwix.dequantize(other))


def test_int4_tiles_of_qwix_are_the_formula():
  """scale = max |w| / 7.5, n = round(w / scale) from -8 to 7; the largest is -7.5 if it is negative, which either rounds to."""
  w = weights(seed=1)
  scale = np.abs(tiles(w)).max(1, keepdims=True) / 7.5
  n = np.clip(np.round(tiles(w) / scale), -8, 7)
  other = theirs(w, jnp.int4, TILE)
  np.testing.assert_allclose(other.scale, scale[:, 0], rtol=2e-7)
  found = tiles(np.asarray(other.qvalue.astype(int)))
  least = tiles(w) / scale < -7.4999
  np.testing.assert_array_equal(found[~least], n[~least])
  assert set(found[least].tolist()) <= {-8, -7}
  np.testing.assert_allclose(qwix.dequantize(other), (found * scale).reshape(w.shape), rtol=3e-7)


@pytest.mark.parametrize("name", ["int4", "int4_asym"])
def test_int4_groups_are_their_tiles_over_the_range_of_ours(name):
  """Of weights whose scales are powers of two, so that these are the same in every type."""
  w = tiles(weights(seed=2))
  exponent = np.exp2(np.random.default_rng(3).integers(-9, 9, (w.shape[0], 1, w.shape[2])))
  if name == "int4":
    w, method = w / np.abs(w).max(1, keepdims=True) * 7 * exponent, f"absmax,{7.5 / 7}"
  else:
    low, high = w.min(1, keepdims=True), w.max(1, keepdims=True)
    w, method = ((w - low) / (high - low) * 15 - np.round(7 - low)) * exponent, "minmax"
  w = w.reshape(-1, 96).astype(np.float32)
  q, other = held(name, w, group=TILE), theirs(w, jnp.int4, TILE, method)
  row = f"qwix: {name} tiles of {TILE}, "
  close(row + "scales", q.parts["scale"].astype(jnp.float32).T, other.scale, 3e-7)
  found, expected = np.asarray(quant.dequantize(q)), np.asarray(qwix.dequantize(other))
  steps = lambda w: np.round(tiles(w) / np.asarray(other.scale)[:, None]).astype(np.int8)
  equal(row + "numbers", steps(found), steps(expected))
  np.testing.assert_allclose(found, expected, rtol=5e-7, atol=1e-9)
