"""bitsandbytes on a CPU: NF4, FP4 and double quantization bit by bit, and rows of int8."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantization_table import equal

from jaxllm import quant
from jaxllm.quant import dynamic
from jaxllm.quant.codebook import NESTED, TABLES
from jaxllm.quant.w8a8 import per_token

torch = pytest.importorskip("torch")
bnb = pytest.importorskip("bitsandbytes.functional")

SHAPE = (192, 512)  # [out, in]: rows of the matrix as torch has it, which 128 divides


def normal():
  return np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)


def scaled():
  """Rows from 1e-4 to 1e4."""
  return normal() * np.exp(np.random.default_rng(1).uniform(-9, 9, (SHAPE[0], 1))).astype(np.float32)


def between(name, block):
  """Weights at the thresholds between two levels but the one at 0, and up to four numbers beside them."""
  rng, levels = np.random.default_rng(2), np.unique(TABLES[name])
  thresholds = (levels[:-1] + levels[1:]) / np.float32(2)
  absmax = np.exp(rng.uniform(-8, 8, (SHAPE[0], SHAPE[1] // block, 1))).astype(np.float32)
  w = rng.choice(thresholds, (*absmax.shape[:2], block)) * absmax
  for _ in range(4):
    w = np.where(
      rng.random(w.shape) < 0.4,
      w,
      np.nextafter(w, np.sign(rng.random(w.shape) - 0.5).astype(np.float32) * 1e9),
    )
  w[..., :1] = absmax
  return w.reshape(SHAPE).astype(np.float32)


def ours(name, w_FD, **options):
  """The parts and the weight [out, in] that they hold."""
  scheme = quant.SCHEMES[name](**options)
  parts = jax.jit(scheme.quantize)(jnp.asarray(w_FD.T))
  return {key: np.asarray(x) for key, x in parts.items()}, np.asarray(scheme.dequantize(parts)).T


def theirs(name, w_FD, block, nested=False):
  packed, state = bnb.quantize_4bit(
    torch.tensor(w_FD), blocksize=block, quant_type=name, compress_statistics=nested
  )
  return packed.numpy(), state, bnb.dequantize_4bit(packed, state, quant_type=name).numpy()


@pytest.mark.parametrize("kind", ["normal", "scaled", "between"])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_bytes_absmax_and_weights_are_theirs_bit_by_bit(name, block, kind):
  w = between(name, block) if kind == "between" else {"normal": normal, "scaled": scaled}[kind]()
  (parts, found), (packed, state, expected) = ours(name, w, block=block), theirs(name, w, block)
  row = f"bitsandbytes: {name}, block {block}, "
  equal(row + "packed bytes", parts["value"].reshape(-1), packed.reshape(-1))
  equal(row + "absmax", parts["scale"].reshape(-1), state.absmax.numpy())
  equal(row + "weights", found, expected)
  equal(f"bitsandbytes: {name}, levels", TABLES[name], state.code.numpy())


def test_the_other_order_of_nibbles_would_not_be_theirs():
  value = ours("nf4", normal())[0]["value"].reshape(-1)
  packed = theirs("nf4", normal(), 64)[0].reshape(-1)
  assert np.mean(value == packed) == 1 and np.mean((value << 4 | value >> 4) == packed) < 0.1


def looked_up(x):
  """The codes of numbers in [-1, 1] in a table of 65,536 places, as the CPU kernel of 0.50.2 has them."""
  place = ((x + np.float32(1)) * np.float32(0.5) * np.float32(65535) + np.float32(0.5)).astype(int)
  at = (np.arange(65536) / np.float32(65535) * np.float32(2) - np.float32(1)).astype(np.float32)
  return np.searchsorted((dynamic.LEVELS[:-1] + dynamic.LEVELS[1:]) / np.float32(2), at)[place]


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_double_quantization_is_theirs_bit_by_bit(name, block):
  """The nearest level, as their GPUs and their search on other types have it; on a CPU float32 goes through a table.

  The weights are multiples of 1 / 256, of which the sum is exact in any order.
  """
  w = np.round(normal() * 256) / np.float32(256)
  w[5, :256], w[-3:] = 0, 0  # blocks of nothing, at the end, too, count in the mean
  parts, found = ours(name, w, block=block, double_quant=True)
  packed, state, expected = theirs(name, w, block, nested=True)
  row = f"bitsandbytes: {name}, double, block {block}, "
  equal("bitsandbytes: levels of 8 bits", dynamic.LEVELS, state.state2.code.numpy())
  equal(row + "packed bytes", parts["value"].reshape(-1), packed.reshape(-1))
  equal(row + "mean of absmax", parts["mean_scale"].reshape(()), state.offset.numpy())
  equal(row + "absmax of absmax", parts["nested_scale"][0], state.state2.absmax.numpy())
  absmax = theirs(name, w, block)[1].absmax - state.offset
  searched, _ = torch.ops.bitsandbytes.quantize_blockwise(absmax.double(), state.state2.code, NESTED)
  scale = parts["scale"].reshape(-1)
  equal(row + "8-bit absmax", scale, searched.numpy())

  tabled = state.absmax.numpy()
  nested = np.repeat(parts["nested_scale"][0], NESTED)[: scale.size]
  np.testing.assert_array_equal(tabled, looked_up(absmax.numpy() * (1 / nested)))
  equal(row + "8-bit absmax by their table", scale, tabled, most=0.01 * scale.size)
  assert np.abs(scale.astype(int) - tabled).max() <= 1
  same = np.repeat(scale == tabled, block).reshape(SHAPE)
  np.testing.assert_allclose(found[same], expected[same], rtol=3e-7)


def halfway():
  """Weights halfway between two of the 255 numbers of their row, and up to two numbers beside them."""
  rng = np.random.default_rng(3)
  absmax = np.exp(rng.uniform(-8, 8, (SHAPE[0], 1))).astype(np.float32)
  w = ((rng.integers(-127, 127, SHAPE) + 0.5) * (absmax.astype(np.float64) / 127)).astype(np.float32)
  for _ in range(2):
    w = np.where(
      rng.random(SHAPE) < 0.5, w, np.nextafter(w, rng.choice([-1e9, 1e9], SHAPE).astype(np.float32))
    )
  w[:, :1] = absmax
  return w


@pytest.mark.parametrize("make", [normal, scaled, halfway])
def test_int8_has_their_rows_bit_by_bit(make):
  """They multiply by 127 (1 / absmax); a quotient by the scale goes the other way for a tenth of those that are halfway."""
  w = make()
  parts, found = ours("int8", w)
  rows, stats, outliers = bnb.int8_vectorwise_quant(torch.tensor(w))
  assert outliers is None
  equal("bitsandbytes: int8, numbers, those halfway too", parts["value"], rows.numpy())
  np.testing.assert_allclose(parts["scale"][:, 0] * 127, stats.numpy(), rtol=2e-7)
  np.testing.assert_allclose(found, bnb.int8_vectorwise_dequant(rows, stats).numpy(), rtol=3e-7)
  n, _ = jax.jit(per_token)(w)
  equal("bitsandbytes: int8, rows of activations", n, rows.numpy())
  quotient = np.round(w / (np.abs(w).max(1, keepdims=True) / np.float32(127)))
  if make is halfway:
    assert 0.05 < np.mean(quotient != rows.numpy()) < 0.2
