"""ZeroQuant: integers within groups, floats between them, as the definition has it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantization_table import equal, nearest

from jaxllm import quant
from jaxllm.ops import quantized


def random(shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def held(w, group):
  scheme = quant.SCHEMES["zeroquant"](group=group)
  return quant.QTensor(jax.jit(scheme.quantize)(jnp.asarray(w)), scheme)


@pytest.mark.core
@pytest.mark.parametrize("shape", [(48, 32), (3, 16, 8)])
def test_numbers_and_scales_are_those_of_the_definition(shape):
  w = random(shape)
  q = held(w, 8)
  groups = np.swapaxes(w, -1, -2).astype(np.float64).reshape(*shape[:-2], shape[-1], -1, 8)
  scale = np.asarray(jnp.asarray(np.abs(groups).max(-1) / 127, jnp.float32).astype(jnp.bfloat16), np.float64)
  equal("definition: zeroquant, scales", np.asarray(q.parts["scale"], np.float64), scale)
  n = np.asarray(q.parts["value"], int).reshape(groups.shape)
  assert np.abs(n).max() == 127
  nearest("definition: zeroquant, numbers", n, groups / scale[..., None])
  expected = np.swapaxes((n * scale[..., None]).reshape(*shape[:-2], shape[-1], -1), -1, -2)
  np.testing.assert_allclose(quant.dequantize(q), expected, rtol=1e-6)
  assert q.shape == shape and 8 * q.nbytes == 10 * w.size


@pytest.mark.parametrize("rows", [1, 2, 40])
@pytest.mark.parametrize("group", [16, 96])
def test_the_product_is_the_exact_sum_of_integers_in_each_group(group, rows):
  q, x = held(random((96, 40)), group), random((rows, 96), 1)
  largest = np.abs(x).max(-1, keepdims=True)
  n = np.round(x * (np.float32(127) / largest)).astype(int).reshape(rows, -1, group)
  sums = np.einsum("cgj,fgj->cfg", n, np.asarray(q.parts["value"], int).reshape(40, -1, group))
  y = (sums * np.asarray(q.parts["scale"], np.float64)).sum(-1) * largest.astype(np.float64) / 127
  found = jax.jit(quantized.product)(x, q)
  assert found.dtype == jnp.float32 and np.abs(found - y).max() <= 1e-6 * np.abs(y).max()


def test_one_group_a_column_is_w8a8_but_for_the_scale_that_is_held():
  w, x = random((64, 8)), random((3, 64), 1)
  w /= np.abs(w).max(0) / 127  # so that the scale of each column is 1, in bfloat16 too
  one, column = held(w, 64), quant.QTensor(quant.SCHEMES["w8a8"]().quantize(w), quant.SCHEMES["w8a8"]())
  np.testing.assert_allclose(quantized.product(x, one), quantized.product(x, column), rtol=1e-6)


def test_groups_hold_a_weight_better_where_its_rows_differ_in_size():
  w = random((256, 16)) * np.where(np.arange(256) < 128, 0.01, 1)[:, None].astype(np.float32)
  error = lambda q: np.linalg.norm((np.asarray(quant.dequantize(q)) - w)[:128])
  column = quant.QTensor(quant.SCHEMES["w8a8"]().quantize(w), quant.SCHEMES["w8a8"]())
  assert error(held(w, 128)) < 0.05 * error(column)


def test_groups_and_rows_of_zeros_and_no_numbers():
  w = random((16, 8))
  w[:8] = 0
  q = held(w, 8)
  assert np.all(q.parts["scale"][:, 0] == 1) and not quant.dequantize(q)[:8].any()
  found = np.asarray(quantized.product(np.array([[0] * 16, [1] * 15 + [np.nan]], np.float32), q))
  assert not found[0].any() and not np.isfinite(found[1]).any()
