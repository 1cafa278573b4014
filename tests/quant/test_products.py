"""Products with quantized weights on a CPU: in pieces, and nowhere is there a float copy of a weight."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from model_cases import MODELS
from model_cases import params as params_of
from quantization_table import measured

from jaxllm import parallel, quant
from jaxllm.generate import loop
from jaxllm.nn import Transformer
from jaxllm.ops import quantized
from jaxllm.ops.einsum import einsum

WIDE = dataclasses.replace(
  MODELS["rope"], embed_dim=64, mlp_dim=192, num_layers=1, layers=MODELS["rope"].layers[:1]
)
SHAPES = ("64,192", "192,64")


VARIANTS = [
  *((name, {}) for name in ("int8", "int8_tensor", "int8_asym", "w8a8", "llm_int8", "glm_int8", "glm_int4")),
  ("llm_int8", dict(outliers=4)),
  *((name, dict(group=24)) for name in ("int4", "int4_asym", "int3", "int3_asym", "zeroquant")),
  *((name, dict(block=24)) for name in ("nf4", "fp4")),
  ("nf4", dict(block=24, double_quant=True)),
]
INTEGERS = ("w8a8", "llm_int8", "zeroquant")  # which round rows, too
each_variant = pytest.mark.parametrize(
  ("name", "options"), VARIANTS, ids=["-".join(map(str, (n, *o.values()))) for n, o in VARIANTS]
)


def fitting(scheme, D, F):
  """The largest shape up to [D, F] that the scheme holds: whole groups of a column, and columns that fill bytes."""
  block = getattr(
    scheme, "group", getattr(scheme, "block", 2 if scheme == quant.SCHEMES["glm_int4"]() else 1)
  )
  return D - D % block, F - F % getattr(scheme, "step", 1)


def test_variants_are_all_schemes():
  assert {name for name, _ in VARIANTS} == set(quant.SCHEMES)


@pytest.mark.parametrize("rows", [1, 2, 17])
@pytest.mark.parametrize("columns", [31, pytest.param(64, marks=pytest.mark.slow), 1543])
@pytest.mark.parametrize(("name", "options"), [v for v in VARIANTS if v[0] not in INTEGERS])
def test_pieces_are_the_whole_product(name, options, columns, rows):
  """Of one row, of rows one at a time, of tiles of columns, and of a prime number of them, which leaves a rest."""
  rng, scheme = np.random.default_rng(0), quant.SCHEMES[name](**options)
  D, columns = fitting(scheme, 48, columns)
  w = rng.standard_normal((D, columns)).astype(np.float32) + 0.1
  q = quant.QTensor(scheme.quantize(jnp.asarray(w)), scheme)
  x = rng.standard_normal((rows, D)).astype(np.float32)
  expected = x.astype(np.float64) @ np.asarray(quant.dequantize(q), np.float64)
  found = jax.jit(quantized.product)(x, q)
  assert found.shape == (rows, columns) and found.dtype == jnp.float32
  assert np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max()
  if name == "int8":
    half = jax.jit(functools.partial(einsum, "BTD,DF->BTF", out_dtype=jnp.bfloat16))(x[:, None], q)
    assert half.shape == (rows, 1, columns) and half.dtype == jnp.bfloat16


@pytest.mark.core
@each_variant
def test_no_rows_are_no_rows_of_the_product(name, options):
  """As of an array, and in the gradient, too."""
  scheme = quant.SCHEMES[name](**options)
  q = quant.QTensor(jax.jit(scheme.quantize)(jnp.ones((48, 64))), scheme)
  x = jnp.zeros((0, 3, 48), jnp.bfloat16)
  run = lambda x: einsum("BTD,DF->BTF", x, q)
  assert (run(x).shape, run(x).dtype) == ((0, 3, 64), jnp.float32)
  gradient = jax.grad(lambda x: jnp.sum(run(x)))(x)
  assert (gradient.shape, gradient.dtype) == (x.shape, x.dtype)


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


WIDTHS, LONG = (1032, 5063), (5063, 2063)
MOST = 0.4
"""Of the bytes of a weight as floats: a tile of 512 columns of LONG (0.25), and rows in and out (64 of them, 0.1)."""


def in_a_loop(scheme, rows, shape):
  """(temporary bytes over those of the weight as floats, arrays of at least half as many numbers) of an optimized program.

  It has 3 products one after the other, as decoding has.  The arrays are those that are in memory, which what is computed
  within a fusion is not, and without the weight's own parts.
  """
  D, F = fitting(scheme, *shape)
  weight = jax.eval_shape(scheme.quantize, jax.ShapeDtypeStruct((D, F), jnp.float32))
  step = lambda w, x: jnp.pad(quantized.product(x, w), ((0, 0), (0, max(D - F, 0))))[:, :D] * 1e-3
  run = jax.jit(lambda x, w: jax.lax.fori_loop(0, 3, lambda _, x: step(w, x), x))
  rows = jax.ShapeDtypeStruct((rows, D), jnp.float32)
  program = run.lower(rows, quant.QTensor(weight, scheme)).compile()
  text = re.sub(r"(?ms)^%(fused|wrapped).*?^}", "", program.as_text())
  arrays = set(re.findall(r"\b([a-z]+\d+)\[([\d,]+)\]", text))
  own = {
    (np.dtype(part.dtype).str[1:].replace("i1", "s8").replace("u1", "u8"), part.shape)
    for part in weight.values()
  }
  sized = {(kind, tuple(map(int, dims.split(",")))) for kind, dims in arrays}
  large = {(kind, dims) for kind, dims in sized - own if math.prod(dims) >= D * F / 2}
  return program.memory_analysis().temp_size_in_bytes / (4 * D * F), large


@dataclasses.dataclass(frozen=True)
class Whole(quant.SCHEMES["w8a8"]):
  """What the others must not do."""

  def product(self, x_CD, parts):
    return jnp.einsum("CD,DF->CF", x_CD, self.dequantize(parts))


@pytest.mark.parametrize("rows", [1, 8, pytest.param(64, marks=pytest.mark.core)])
@pytest.mark.parametrize("shape", [WIDTHS, LONG], ids=["wide", "long"])
@each_variant
def test_no_scheme_copies_a_weight(name, options, shape, rows):
  """Neither as floats nor its numbers one a byte where they are packed, of no width, with a loop around the product."""
  share, large = in_a_loop(quant.SCHEMES[name](**options), rows, shape)
  assert share < MOST and not large
  row = ", ".join([name, *(f"{key}={value}" for key, value in options.items())])
  measured("products", row, share_of_a_float_copy=share, large_arrays=len(large), programs=1)


def test_a_scheme_that_copies_is_found():
  share, large = in_a_loop(Whole(), 8, WIDTHS)
  assert share >= 1 and ("f32", WIDTHS[::-1]) in large


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_a_product_in_one_piece_is_found(monkeypatch, name):
  """As XLA makes it of an odd width and of long columns."""
  monkeypatch.setattr(quantized, "_pieces", lambda body, w, axis, most, y: body(0, w, y))
  scheme = quant.SCHEMES[name](**(dict(block=24) if name == "nf4" else {}))
  for rows, shape in ((64, WIDTHS), (1, LONG)):
    share, large = in_a_loop(scheme, rows, shape)
    assert share > MOST and any(kind == "f32" for kind, _ in large)


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
@pytest.mark.parametrize("name", ["int8", "int8_asym", "glm_int8"])
def test_long_columns_are_sums_over_pieces_of_them(name, rows):
  """A prime number, which leaves a rest."""
  D, F = 8191, 64
  w = jax.random.normal(jax.random.key(0), (D, F))
  scheme = quant.SCHEMES[name]()
  held = quant.QTensor(scheme.quantize(w), scheme)
  x = jax.random.normal(jax.random.key(1), (rows, D))
  program = jax.jit(quantized.product).lower(x, held).compile()
  assert program.memory_analysis().temp_size_in_bytes < D * F  # less than one copy in bytes
  np.testing.assert_allclose(program(x, held), x @ quant.dequantize(held), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("rows", [1, 8, 64])
@pytest.mark.parametrize(("name", "options"), [("int8", {}), ("int4", dict(group=24))])
def test_devices_that_all_have_the_whole_weight_copy_none(name, options, rows):
  """A mesh of copies of the model, each with its rows: in pieces as on one device, without a word to the others."""
  scheme, mesh = quant.SCHEMES[name](**options), parallel.make_mesh("data=8")
  D, F = fitting(scheme, 192, 2063)
  w = np.random.default_rng(0).standard_normal((D, F)).astype(np.float32)
  held = jax.device_put(quant.QTensor(scheme.quantize(w), scheme), NamedSharding(mesh, P()))
  x = np.random.default_rng(1).standard_normal((rows, D)).astype(np.float32)
  with jax.set_mesh(mesh):
    x = jax.device_put(x, NamedSharding(mesh, P("data" if rows > 1 else None)))
    program = jax.jit(quantized.product).lower(x, held).compile()
    found = program(x, held)
  assert program.memory_analysis().temp_size_in_bytes < MOST * 4 * D * F
  assert not re.search(r"(all-gather|all-reduce|all-to-all|collective-permute)\(", program.as_text())
  expected = np.asarray(x, np.float64) @ np.asarray(quant.dequantize(held), np.float64)
  assert np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max()
