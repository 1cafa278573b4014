"""Rows and weights of 8 bits: integers as defined, exact sums, and bitsandbytes' numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import MODELS
from model_cases import params as params_of
from quantization_table import close, equal

from jaxllm import quant
from jaxllm.generate.loop import generate
from jaxllm.nn import Transformer
from jaxllm.ops import quantized
from jaxllm.quant.w8a8 import MOST, W8A8, per_token

SCHEME = quant.SCHEMES["w8a8"]()
CFG = dataclasses.replace(MODELS["rope"], num_layers=1, layers=MODELS["rope"].layers[:1])


def random(shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def held(w, scheme=SCHEME):
  return quant.QTensor(jax.jit(scheme.quantize)(jnp.asarray(w)), scheme)


def integers(x):
  """(n, scale) of rows by the definition, in float32 as it is computed there, n int64."""
  largest = np.abs(x).max(-1, keepdims=True)
  n = np.round(x * (np.float32(127) * (1 / np.maximum(largest, np.float32(1e-36)))))
  return n.astype(np.int64), largest.astype(np.float64) / 127


@pytest.mark.core
@pytest.mark.parametrize("rows", [1, 2, 17])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_product_is_the_exact_sum_of_integers(rows, dtype):
  q, x = held(random((300, 40))), jnp.asarray(random((rows, 300), 1), dtype)
  n, scale = integers(np.asarray(x, np.float32))
  found, of = jax.jit(per_token)(x)
  np.testing.assert_array_equal(found, n)
  np.testing.assert_allclose(of, scale, rtol=1e-6)
  y = (n @ np.asarray(q.parts["value"], np.int64).T) * scale * np.asarray(q.parts["scale"], np.float64).T
  np.testing.assert_allclose(jax.jit(quantized.product)(x, q), y, rtol=1e-6, atol=0)


def test_the_weight_is_held_as_int8_holds_it():
  w = random((24, 40))
  jax.tree.map(np.testing.assert_array_equal, held(w).parts, held(w, quant.SCHEMES["int8"]()).parts)
  assert held(w).shape == w.shape
  np.testing.assert_array_equal(quant.dequantize(held(w)), quant.dequantize(held(w, quant.SCHEMES["int8"]())))


def test_a_row_does_not_depend_on_those_beside_it_and_its_scale_goes_through():
  q, x = held(random((64, 48))), random((5, 64), 1)
  product = jax.jit(quantized.product)
  all_rows = np.asarray(product(x, q))
  for i in range(5):
    np.testing.assert_array_equal(product(x[i : i + 1], q), all_rows[i : i + 1])
  np.testing.assert_array_equal(product(x * 4, q), all_rows * 4)


def test_rows_of_zeros_tiny_numbers_and_no_numbers():
  q = held(np.ones((3, 8), np.float32))
  x = np.array([[0, 0, 0], [1e-38, 0, 0], [1e30, -1e30, 1e30], [1, np.nan, 0], [1, np.inf, 0]], np.float32)
  found = np.asarray(jax.jit(quantized.product)(x, q))
  assert not found[0].any() and np.all(np.abs(found[1]) <= 1e-38)
  np.testing.assert_allclose(found[2], 1e30, rtol=1e-6)
  assert not np.isfinite(found[3:]).any()  # what was no number is none after it


def test_sums_are_of_32_bits():
  """300 x 127 x 127, which int8 products return as 44; and 133,144 of them, the most that are sure to fit."""
  ones = held(np.ones((300, 1), np.float32))
  n = jnp.full((1, 300), 127, jnp.int8)
  assert (n @ ones.parts["value"].T).tolist() == [[44]]
  np.testing.assert_allclose(quantized.product(jnp.ones((1, 300)), ones), [[300]], rtol=1e-6)
  assert MOST == 133144 and MOST * 127**2 < 2**31 <= (MOST + 1) * 127**2
  most = held(np.ones((MOST, 1), np.float32))
  np.testing.assert_allclose(quantized.product(jnp.ones((2, MOST)), most), MOST, rtol=1e-6)


@dataclasses.dataclass(frozen=True)
class Floats(W8A8):
  """The same formula, its integers multiplied as floats, which hold sums of up to 1,040 products exactly."""

  def product(self, x_CD, parts):
    x_CD = x_CD.astype(jnp.float32)
    largest_C1 = jnp.max(jnp.abs(x_CD), axis=1, keepdims=True)
    n_CD = jnp.round(x_CD * (127 / largest_C1))
    y_CF = jnp.dot(n_CD, parts["value"].astype(jnp.float32).T, precision="highest")
    return y_CF * (largest_C1 / 127) * parts["scale"].T


def trees(cfg, *schemes):
  params = params_of(cfg)
  return [quant.apply(params, scheme, rules=[("head", True)]) for scheme in schemes]


@pytest.mark.core
def test_logits_are_those_of_the_formula_in_floats():
  apply, ids = jax.jit(Transformer(CFG).apply), np.array([[5, 9, 2, 7, 1]])
  held_by = trees(CFG, SCHEME, Floats(), quant.SCHEMES["int8"]())
  found, expected, int8 = (np.asarray(apply({"params": p}, ids)[0]) for p in held_by)
  assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
  assert 1e-4 < np.linalg.norm(found - int8) / np.linalg.norm(int8) < 0.1


@pytest.mark.slow
def test_text_is_that_of_the_formula_in_floats():
  prompts = [[5, 9, 2, 7, 1], [3, 3, 8]]
  text = lambda p: generate(Transformer(CFG), p, prompts, max_new_tokens=8, stop_ids=()).tokens
  found, expected = map(text, trees(CFG, SCHEME, Floats()))
  assert found == expected


def test_numbers_are_those_of_bitsandbytes():
  torch = pytest.importorskip("torch")
  functional = pytest.importorskip("bitsandbytes.functional")
  x = random((64, 512)) * 3
  n, largest, _ = functional.int8_vectorwise_quant(torch.tensor(x))
  found, scale = jax.jit(per_token)(x)
  row = "bitsandbytes: w8a8, int8_vectorwise_quant, "
  equal(row + "numbers", found, n.numpy())
  close(row + "scales", scale[:, 0], largest.numpy() / 127, 1e-6)
