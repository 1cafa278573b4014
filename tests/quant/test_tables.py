"""Quantized embeddings: rows that are looked up, the transpose that a tied head multiplies, and no float copy of either."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import MODELS
from model_cases import params as params_of

from jaxllm import hf, parallel, quant, tree
from jaxllm.errors import QuantError
from jaxllm.generate.loop import generate
from jaxllm.leaf import QTensor, dense
from jaxllm.nn import Transformer
from jaxllm.ops import quantized
from jaxllm.ops.head import Head

INT8 = quant.SCHEMES["int8"]()
ONE = MODELS["rope"].layers[:1]
CFG = dataclasses.replace(MODELS["rope"], num_layers=2, layers=ONE, vocab_size=30, embed_scale=2.0)
TIED = dataclasses.replace(CFG, tie_embeddings=True, embed_gradient=0.1)
WIDE = dataclasses.replace(TIED, embed_dim=64, mlp_dim=48, vocab_size=320)
each_head = pytest.mark.parametrize(
  "cfg", [pytest.param(CFG, marks=pytest.mark.slow, id="head"), pytest.param(TIED, id="tied")]
)
RULES = [("embed", True), ("head", True)]
PROMPTS = [[5, 9, 2, 7, 1], [3, 3, 8]]


def params_for(cfg):
  params = params_of(cfg)
  return {name: leaf for name, leaf in params.items() if name != "head" or not cfg.tie_embeddings}


def quantized_of(cfg, name="int8"):
  rules = [rule for rule in RULES if rule[0] in params_for(cfg)]
  return quant.apply(params_for(cfg), quant.SCHEMES[name](), rules)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(cfg, params):
  return Transformer(cfg).apply({"params": params}, np.array([PROMPTS[0]]))[0]


def dequantized(params):
  return jax.tree.map(quant.dequantize, params, is_leaf=lambda x: isinstance(x, QTensor))


@pytest.mark.core
@pytest.mark.parametrize("name", quant.SCHEMES)
def test_rows_are_those_of_the_whole_table(name):
  """A scale is a row's: where one row is large, the others keep theirs, but under one scale for all."""
  w = np.random.default_rng(0).standard_normal((40, 256)).astype(np.float32)
  w[7] *= 1000
  held = quant.apply({"embed": w}, quant.SCHEMES[name](), [("embed", True)])["embed"]
  assert held.table and held.shape == (40, 256) and held.T.shape == (256, 40) and held.size == w.size
  index = np.array([[3, 39], [7, 0], [3, 3], [-1, -40], [40, 99], [-41, 41]])  # past the ends as of an array
  found = jax.jit(lambda held, index: held[index])(held, index)
  assert found.shape == (6, 2, 256) and found.dtype == jnp.float32
  np.testing.assert_allclose(found, dense(held)[index], rtol=1e-6)
  np.testing.assert_array_equal(dense(held), dense(held.T).T)
  if name != "int8_tensor":
    others = np.delete(np.arange(40), 7)
    assert np.linalg.norm((dense(held) - w)[others]) < 0.5 * np.linalg.norm(w[others])


def test_an_index_of_a_weight_is_one_of_the_axes_before_in_and_out():
  """Of a stack, not of a matrix: parts are [out, in], and their first axis would be the weight's last."""
  w = np.random.default_rng(0).standard_normal((2, 3, 16, 8)).astype(np.float32)
  held = quant.QTensor(jax.jit(INT8.quantize)(w), INT8)
  for index in (1, slice(1, 2), (1, 2), np.array([1, 0])):
    np.testing.assert_array_equal(dense(held[index]), dense(held)[index])
  for bad, index in ((held, (0, 1, 2)), (held, (..., 0)), (held[0, 0], 0), (held[0, 0], slice(1))):
    with pytest.raises(
      QuantError, match=r"found the index .* of a weight \[.*, expected one of the axes before"
    ):
      bad[index]


def table(name="int8"):
  w = np.random.default_rng(0).standard_normal((40, 256)).astype(np.float32)
  return quant.apply({"embed": w}, quant.SCHEMES[name](), [("embed", True)])["embed"]


@pytest.mark.core
@pytest.mark.parametrize("name", ["int8", "int4", "nf4"])
def test_no_indices_are_no_rows(name):
  for shape in ((0,), (2, 0)):
    found = table(name)[np.zeros(shape, int)]
    assert found.shape == (*shape, 256) and found.dtype == jnp.float32


@pytest.mark.core
def test_an_index_of_a_table_is_one_of_its_rows():
  """An integer of any kind; what an array would take another way is refused."""
  held, rows = table(), dense(table())
  for index in (3, -1, np.int8(3), np.array(3, np.uint32), jnp.array([[3], [0]])):
    np.testing.assert_allclose(held[index], rows[index], rtol=1e-6)
  mask = np.arange(40) < 2
  for bad in (mask, True, np.True_, (1, 2), 1.7, np.array([1.0]), slice(1, 3), ..., None, [1, 2]):
    with pytest.raises(
      QuantError, match=r"found the index .* of a table \[40, 256\] .*, expected an integer or"
    ):
      held[bad]


@pytest.mark.parametrize("name", ["int8", "int3_asym", "nf4"])
def test_a_normed_head_is_that_of_the_weight_that_is_held_without_a_copy(name):
  w = np.random.default_rng(0).standard_normal((128, 1056)).astype(np.float32) * np.geomspace(
    0.01, 100, 1056, dtype=np.float32
  )
  scheme, x = quant.SCHEMES[name](), np.random.default_rng(1).standard_normal((3, 128)).astype(np.float32)
  held = quant.QTensor(jax.jit(scheme.quantize)(w), scheme)
  long = np.asarray(dense(held), np.float64)
  run = jax.jit(lambda w, x: Head(w, normed=True)(x)).lower(held, x).compile()
  expected = x.astype(np.float64) @ (long / np.linalg.norm(long, axis=0))
  assert np.abs(run(held, x) - expected).max() <= 2e-6 * np.abs(expected).max()
  assert run.memory_analysis().temp_size_in_bytes < 4 * w.size
  copied = jax.jit(lambda w: jnp.sum(jnp.square(dense(w)), axis=0)).lower(held).compile()
  assert copied.memory_analysis().temp_size_in_bytes >= 4 * w.size


@pytest.mark.core
@pytest.mark.parametrize("name", ["int8", "int8_tensor", "int8_asym"])
@each_head
def test_logits_and_text_are_those_of_the_table_that_is_held(cfg, name):
  found = quantized_of(cfg, name)
  plain = dequantized(found)
  expected, logits = logits_of(cfg, plain), logits_of(cfg, found)
  assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()
  if name == "int8":
    text = lambda params: generate(Transformer(cfg), params, PROMPTS, max_new_tokens=8, stop_ids=()).tokens
    assert text(found) == text(plain)


@each_head
def test_on_a_mesh_it_lies_as_the_table_would_with_the_same_text(tmp_path, cfg):
  """Padded to a vocabulary that divides, cut again where it is saved, and reopened there."""
  params, mesh = quantized_of(cfg), parallel.make_mesh("fsdp=2,tensor=4")
  hf.save(tmp_path / "a", cfg, params)
  _, found = hf.load(tmp_path / "a", mesh=mesh)
  value, scale = (found["embed"].parts[name] for name in ("value", "scale"))
  assert (value.shape, scale.shape) == ((32, 24), (32, 1))
  assert (tuple(value.sharding.spec), tuple(scale.sharding.spec)) == (("tensor", "fsdp"), ("tensor",))
  jax.tree.map(np.testing.assert_array_equal, parallel.unpad(found, cfg)["embed"], params["embed"])
  text = lambda params: generate(Transformer(cfg), params, PROMPTS, max_new_tokens=8, stop_ids=()).tokens
  with jax.set_mesh(mesh):
    assert text(found) == text(params)
  hf.save(tmp_path / "b", cfg, found)
  one, other = (path / "model.safetensors" for path in (tmp_path / "a", tmp_path / "b"))
  assert one.read_bytes() == other.read_bytes()


def program(cfg, params, length):
  """The compiled program that reads `length` tokens and then takes the most likely one three times, as text."""

  def run(params, tokens_BT):
    apply = lambda tokens: Transformer(cfg).apply({"params": params}, tokens, logits="last")[0]
    most_likely = lambda logits: jnp.argmax(logits, -1).astype(jnp.int32)
    first = most_likely(apply(tokens_BT))
    return jax.lax.fori_loop(0, 3, lambda _, token: most_likely(apply(token)), first)

  return jax.jit(run).lower(params, np.zeros((2, length), np.int32)).compile().as_text()


@pytest.mark.parametrize("length", [1, 40])
def test_no_float_copy_of_the_table_is_made_by_lookups_or_a_tied_head(monkeypatch, length):
  monkeypatch.setattr(quantized, "TILE", 64)  # as the table is no larger than a tile is

  def floats(text):
    """The arrays of floats of the table's shape; what is inside of a fusion has no memory."""
    outside = [part for part in text.split("\n\n") if not part.startswith("%fused_computation")]
    return re.findall(r"(?:f32|bf16|f64)\[(?:320,64|64,320)\]", "\n".join(outside))

  assert floats(program(WIDE, params_for(WIDE), length))  # the search finds floats
  text = program(WIDE, quantized_of(WIDE), length)
  assert "s8[320,64]" in text and floats(text) == []


def test_a_scheme_whose_parts_do_not_divide_the_rows_is_refused():
  @dataclasses.dataclass(frozen=True)
  class Fours(quant.Int8):
    """A scale for four rows, and what is left over."""

    def quantize(self, w):
      parts = super().quantize(w)
      return parts | {"scale": parts["scale"][::4]}

  with pytest.raises(
    QuantError, match=r"embed: found a table of 30 rows, expected a number that parts of .*Fours"
  ):
    quant.apply(params_for(CFG), Fours(), [("embed", True)])


def test_rows_that_share_a_part_are_those_of_the_whole_table():
  @dataclasses.dataclass(frozen=True)
  class Pairs(quant.Int8):
    """A scale for two rows of the table."""

    def quantize(self, w):
      parts = super().quantize(w)
      return parts | {"scale": parts["scale"][::2]}

    def dequantize(self, parts):
      return super().dequantize(parts | {"scale": jnp.repeat(parts["scale"], 2, axis=0)})

  held = quant.apply(params_for(CFG), Pairs(), [("embed", True)])["embed"]
  index = jnp.array([3, 29, 0, 2, 3])
  assert held.step == 2
  np.testing.assert_array_equal(held[index], np.asarray(dense(held))[index])


def test_the_report_has_the_table():
  rows = quant.report(quantized_of(TIED), params_for(TIED))
  (row,) = (row for row in rows if row["path"] == "embed")
  assert row["bits"] == 8 + 32 / 24 and 0.001 < row["error"] < 0.02
  assert tree.diff(params_for(TIED), quantized_of(TIED), dtypes=False) == []
