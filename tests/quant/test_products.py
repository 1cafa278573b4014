"""Products with quantized weights on a CPU: in pieces, and nowhere is there a float copy of a weight."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import MODELS
from model_cases import params as params_of
from quantization_table import measured

from jaxllm import quant
from jaxllm.generate import loop
from jaxllm.nn import Transformer
from jaxllm.ops import quantized
from jaxllm.ops.einsum import einsum

WIDE = dataclasses.replace(
  MODELS["rope"], embed_dim=64, mlp_dim=192, num_layers=1, layers=MODELS["rope"].layers[:1]
)
SHAPES = ("64,192", "192,64")


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 40])
@pytest.mark.parametrize("columns", [31, 64, 1536])
@pytest.mark.parametrize("name", ["int8", "int8_tensor", "int8_asym"])
def test_pieces_are_the_whole_product(name, columns, rows):
  """Of one row, of rows one at a time, of tiles of columns, and of a width that has no divisor for tiles."""
  rng, scheme = np.random.default_rng(0), quant.SCHEMES[name]()
  w = rng.standard_normal((48, columns)).astype(np.float32) + 0.1
  q = quant.QTensor(scheme.quantize(jnp.asarray(w)), scheme)
  x = rng.standard_normal((rows, 48)).astype(np.float32)
  expected = x.astype(np.float64) @ np.asarray(quant.dequantize(q), np.float64)
  found = jax.jit(quantized.product)(x, q)
  assert found.shape == (rows, columns) and found.dtype == jnp.float32
  assert np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max()
  half = jax.jit(functools.partial(einsum, "BTD,DF->BTF", out_dtype=jnp.bfloat16))(x[:, None], q)
  assert half.shape == (rows, 1, columns) and half.dtype == jnp.bfloat16


def compiled(monkeypatch, params):
  """The optimized programs of prompts and of decoding, as text."""
  texts = []
  for name in ("prefill", "decode"):
    own = getattr(loop, name)

    def spied(*args, own=own, **kwargs):
      texts.append(own.lower(*args, **kwargs).compile().as_text())
      return own(*args, **kwargs)

    monkeypatch.setattr(loop, name, spied)
  jax.clear_caches()
  prompts = [[5, 9, 2] * 8]
  loop.generate(Transformer(WIDE), params, prompts, max_new_tokens=2, stop_ids=(), chunk=1)
  assert len(texts) == 2
  return texts


def copies(text):
  """The float arrays of a weight's shape in a program."""
  return [shape for shape in SHAPES if re.search(rf"(f32|bf16|f64)\[{shape}\]", text)]


def in_a_loop(scheme, rows, w):
  """The optimized program of 3 products one after the other with w and with another weight back, as decoding has them."""
  q, back = (quant.QTensor(scheme.quantize(x), scheme) for x in (w, w.T))
  step = lambda i, x: quantized.product(quantized.product(x, q), back) * 1e-3
  run = jax.jit(lambda x, q, back: jax.lax.fori_loop(0, 3, step, x))
  text = run.lower(jnp.ones((rows, 64)), q, back).compile().as_text()
  return re.sub(
    r"(?ms)^%fused.*?^}", "", text
  )  # what is computed within a loop of the machine is in no memory


@dataclasses.dataclass(frozen=True)
class Whole(quant.SCHEMES["w8a8"]):
  """What the others must not do."""

  def product(self, x_CD, parts):
    return jnp.einsum("CD,DF->CF", x_CD, self.dequantize(parts))


LOOPED = [
  *((name, {}) for name in ("int8", "w8a8", "llm_int8", "glm_int8", "glm_int4")),
  *((name, dict(group=32)) for name in ("int4", "int4_asym", "int3", "int3_asym", "zeroquant")),
  ("nf4", dict(block=32)),
  ("nf4", dict(block=32, double_quant=True)),
]


@pytest.mark.core
@pytest.mark.parametrize("rows", [1, 4, 40])
@pytest.mark.parametrize(("name", "options"), LOOPED)
def test_no_scheme_makes_a_float_copy_of_a_weight_in_a_loop(monkeypatch, name, options, rows):
  """Nor one of its numbers where they are packed; the search finds them in a scheme that does."""
  monkeypatch.setattr(quantized, "TILE", 32)
  monkeypatch.setattr(quantized, "PACKED", 32)
  text = in_a_loop(
    quant.SCHEMES[name](**options),
    rows,
    jnp.asarray(np.random.default_rng(0).standard_normal((64, 192)), "float32"),
  )
  assert copies(text) == []
  if name[:4] in ("int4", "int3"):
    rows_of_values = 192 * (4 if "4" in name else 2) // 8
    assert f"u8[{rows_of_values},64]" in text and not re.search(r"\[(64,192|192,64)\]", text)
  if name in ("nf4", "glm_int4"):
    assert re.search(r"[su]8\[192,32\]", text) and not re.search(r"f32\[(192,32|64,96)\]", text)


def test_the_search_finds_a_float_copy_in_a_loop():
  assert copies(in_a_loop(Whole(), 4, jnp.ones((64, 192)))) != []


@pytest.mark.core
def test_no_float_copy_of_a_weight_is_made_by_prompts_or_in_the_loop(monkeypatch):
  params = params_of(WIDE)
  assert all(
    set(copies(text)) == set(SHAPES) for text in compiled(monkeypatch, params)
  )  # the search finds floats
  small = quant.apply(params, quant.SCHEMES["int8"]())
  monkeypatch.undo()
  monkeypatch.setattr(quantized, "TILE", 32)  # as these weights are no larger than a tile is
  for text in compiled(monkeypatch, small):
    assert "s8[192,64]" in text and "s8[64,192]" in text and copies(text) == []


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", ["int8", "int8_asym"])
def test_long_columns_are_converted_within_the_product_too(name, rows):
  """XLA converts 4096 numbers and more, 16 KiB of floats, before a product; it takes less memory than one copy in bytes."""
  D, F = 8192, 64
  w = jax.random.normal(jax.random.key(0), (D, F))
  scheme = quant.SCHEMES[name]()
  held = quant.QTensor(scheme.quantize(w), scheme)
  x = jax.random.normal(jax.random.key(1), (rows, D))
  compiled = jax.jit(quantized.product).lower(x, held).compile()
  temporary = compiled.memory_analysis().temp_size_in_bytes
  assert temporary < D * F
  row = f"{name}, {D} x {F}, rows: {rows}"
  measured("products", row, temporary_bytes=temporary, a_float_copy=4 * D * F)
  np.testing.assert_allclose(compiled(x, held), x @ quant.dequantize(held), rtol=1e-4, atol=1e-2)
