"""Quantized trees on a mesh: laid out as their weights would be, whichever comes first, with the same text."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from model_cases import MODELS
from model_cases import params as params_of

from jaxllm import parallel, quant, tree
from jaxllm.errors import ConfigError, QuantError
from jaxllm.generate.loop import generate
from jaxllm.leaf import QTensor
from jaxllm.nn import Transformer
from jaxllm.ops import quantized

MESHES = {"fsdp=2,tensor=2": "fsdp_tensor", "tensor=4": "tensor", "fsdp=8": "fsdp"}
ONE = MODELS["rope"].layers[:1]
CFG = dataclasses.replace(MODELS["rope"], num_layers=2, layers=ONE, vocab_size=30)  # 4 do not divide it
HEAD = [("head", True)]


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def on_mesh(name, axes):
  """Two meshes with one scheme, the other rows in the slow set."""
  usual = name == "int8_asym" and axes != "tensor=4"
  core = [pytest.mark.core] * (axes == "fsdp=2,tensor=2")
  return pytest.param(name, axes, marks=core if usual else pytest.mark.slow)


@pytest.mark.parametrize(
  ("name", "axes"), [on_mesh(name, axes) for name in ("int8", "int8_tensor", "int8_asym") for axes in MESHES]
)
def test_quantized_before_or_after_it_is_the_same_tree_and_text(name, axes):
  scheme, params, rules = quant.SCHEMES[name](), params_of(CFG), MESHES[axes]
  mesh = parallel.make_mesh(axes, jax.devices()[: 8 if "8" in axes else 4])
  alone = quant.apply(params, scheme, HEAD)
  text = lambda params: generate(Transformer(CFG), params, [[5, 9, 2], [1]], max_new_tokens=8, stop_ids=())
  with jax.set_mesh(mesh):
    after = parallel.shard(alone, mesh, parallel.RULES[rules], CFG)
    before = quant.apply(parallel.shard(params, mesh, parallel.RULES[rules], CFG), scheme, HEAD)
    found = text(after)
  same(parallel.unpad(after, CFG), alone)
  same(parallel.unpad(before, CFG), alone)
  assert found.tokens == text(alone).tokens


OPTIONS = {
  **{name: dict(group=8) for name in ("int4", "int4_asym", "int3")},
  **{name: dict(group=16) for name in ("int3_asym", "zeroquant")},
  "nf4": dict(block=8),
  "fp4": dict(block=16, double_quant=True),
  "llm_int8": dict(features=(3, 17)),
}
"""Groups that divide the small widths here, and parts that a scheme has by a field only."""
SLOW = ("int8", "int8_tensor", "int8_asym", "int4_asym", "int3", "w8a8", "nf4", "glm_int8")
MARKS = {"int4": pytest.mark.core} | dict.fromkeys(SLOW, pytest.mark.slow)
WIDE = dataclasses.replace(MODELS["rope"], embed_dim=32, mlp_dim=64, num_layers=1, layers=ONE)


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, ())) for name in quant.SCHEMES])
def test_every_scheme_lies_on_eight_devices_and_has_the_logits_of_one(name):
  """Groups of 16 leave 2 along the model's width, which 4 devices do not divide: those scales are whole."""
  options = OPTIONS.get(name, {})
  scheme, params = quant.SCHEMES[name](**options), params_of(WIDE)
  mesh, ids = parallel.make_mesh("fsdp=4,tensor=2"), np.array([[5, 9, 2, 7, 1, 3, 3, 8]] * 4)
  alone = quant.apply(params, scheme)
  logits = lambda params: np.asarray(jax.jit(Transformer(WIDE).apply)({"params": params}, ids)[0])
  with jax.set_mesh(mesh):
    after = parallel.shard(alone, mesh, parallel.RULES["fsdp_tensor"], WIDE)
    before = quant.apply(parallel.shard(params, mesh, parallel.RULES["fsdp_tensor"], WIDE), scheme)
    found = logits(after)
  same(parallel.unpad(after, WIDE), alone)
  same(parallel.unpad(before, WIDE), alone)
  parts = tree.flatten(after)["layers/0/mlp/up/w"].parts
  spec = {part: tuple(x.sharding.spec) for part, x in parts.items()}
  assert spec["value"] == ("tensor", "fsdp")
  if group := options.get("group", options.get("block")):
    assert spec["scale"] == (("tensor",) if group == 16 else ("tensor", "fsdp"))
  # sums of other orders round otherwise, and an activation may so be rounded to the integer beside: 1 of 127
  exact = name not in ("w8a8", "zeroquant", "llm_int8")
  expected = logits(alone)
  assert np.linalg.norm(found - expected) <= (1e-5 if exact else 1e-2) * np.linalg.norm(expected)


def test_the_mean_of_scales_does_not_depend_on_the_mesh():
  """Padded to 32 tokens it would be of the padding, too, which is refused, and cut before it is that of one device."""
  params, rules = params_of(CFG), parallel.RULES["fsdp_tensor"]
  mesh, scheme = parallel.make_mesh("fsdp=2,tensor=4"), quant.SCHEMES["nf4"](block=8, double_quant=True)
  alone = quant.apply(params, scheme, HEAD)
  placed = parallel.shard(params, mesh, rules, CFG)
  with pytest.raises(
    QuantError, match=r"head: found padding of a mesh .* parallel.unpad\(params, cfg\) first"
  ):
    quant.apply(placed, scheme, HEAD)
  cut = quant.apply(parallel.unpad(placed, CFG), scheme, HEAD)
  same(cut, alone)
  same(parallel.shard(cut, mesh, rules, CFG), parallel.shard(alone, mesh, rules, CFG))
  same(parallel.unpad(parallel.shard(alone, mesh, rules, CFG), CFG), alone)
  padded = np.pad(params["head"], [(0, 0), (0, 2)])  # of one device, so that it is a weight as any other
  wrong = quant.apply(params | {"head": padded}, scheme, HEAD)["head"]
  assert wrong.parts["mean_scale"].item() < 0.95 * alone["head"].parts["mean_scale"].item()


@pytest.mark.slow
@pytest.mark.parametrize("name", quant.SCHEMES)
def test_every_scheme_has_the_text_of_one_device_on_eight(name):
  scheme, params = quant.SCHEMES[name](**OPTIONS.get(name, {})), params_of(WIDE)
  alone, mesh = quant.apply(params, scheme), parallel.make_mesh("fsdp=4,tensor=2")
  text = lambda params: (
    generate(Transformer(WIDE), params, [[5, 9, 2], [1]], max_new_tokens=8, stop_ids=()).tokens
  )
  with jax.set_mesh(mesh):
    found = text(parallel.shard(alone, mesh, parallel.RULES["fsdp_tensor"], WIDE))
  assert found == text(alone)


@pytest.mark.core
@pytest.mark.parametrize("rows", [1, 8, 64])
@pytest.mark.parametrize("spec", [("tensor", None), (None, "tensor")], ids=["out", "in"])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_product_with_a_weight_that_is_cut_moves_rows_alone(name, spec, rows):
  """Each device multiplies with its part: what they send is no larger than the product; pieces would gather the weight."""
  D, F, scheme = 128, 1040, quant.SCHEMES[name](**OPTIONS.get(name, {}))
  w = np.random.default_rng(0).standard_normal((D, F)).astype(np.float32)
  held = jax.jit(lambda w: QTensor(scheme.quantize(w), scheme))(w)
  x = np.random.default_rng(1).standard_normal((rows, D)).astype(np.float32)
  mesh = parallel.make_mesh("tensor=8")
  fits = lambda part: all(axis is None or n % 8 == 0 for axis, n in zip(spec, part.shape, strict=True))
  with jax.set_mesh(mesh):
    put = lambda part: jax.device_put(part, NamedSharding(mesh, P(*spec) if fits(part) else P()))
    parts, x = jax.tree.map(put, held), jax.device_put(x, NamedSharding(mesh, P()))
    out = NamedSharding(mesh, P(None, spec[0]))
    program = jax.jit(quantized.product, out_shardings=out).lower(x, parts).compile()
    found = program(x, parts)
  collective = r"= (.*) (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\("
  sent = [re.findall(r"(\w+)\[([\d,]*)\]", what) for what in re.findall(collective, program.as_text())]
  numbers = sum(math.prod(map(int, dims.split(","))) for what in sent for _, dims in what)
  assert numbers == (0 if spec[0] else rows * F) and {kind for what in sent for kind, _ in what} <= {"f32"}
  expected = np.asarray(x, np.float64) @ np.asarray(quant.dequantize(held), np.float64)
  assert np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max()


def test_bytes_that_a_mesh_would_cut_are_refused():
  params = params_of(CFG)  # 24 columns of 4 bits are 12 bytes
  found = quant.apply(params, quant.SCHEMES["int4"](group=8))
  with pytest.raises(
    ConfigError, match=r"found 12 blocks or bytes of Groups.* expected a multiple of 8, the size of fsdp"
  ):
    parallel.layout(found, parallel.make_mesh("fsdp=8"), parallel.RULES["fsdp"], CFG)


def test_numbers_are_split_as_the_weight_would_be_and_scales_with_them():
  mesh = parallel.make_mesh("fsdp=2,tensor=4")
  found = quant.apply(params_of(CFG), quant.SCHEMES["int8"](), HEAD)
  specs = tree.flatten(parallel.layout(found, mesh, parallel.RULES["fsdp_tensor"], CFG))
  spec = lambda path: {name: tuple(x.sharding.spec) for name, x in specs[path].parts.items()}
  assert spec("layers/0/mlp/up/w") == {"value": ("tensor", "fsdp"), "scale": ("tensor",)}
  assert spec("layers/0/mlp/down/w") == {"value": ("fsdp", "tensor"), "scale": ("fsdp",)}
  assert spec("layers/0/attn/k/w") == {"value": (None, "fsdp"), "scale": ()}  # 2 heads on 4 devices
  assert specs["head"].parts["value"].shape == (32, 24) and specs["head"].parts["scale"].shape == (32, 1)
  total = parallel.bytes_per_device(found, mesh, parallel.RULES["fsdp_tensor"], CFG)
  placed = parallel.shard(found, mesh, parallel.RULES["fsdp_tensor"], CFG)
  assert total == sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(placed))
  assert "int8" in parallel.report(placed) and f"{total:,} on each of 8 devices" in parallel.report(placed)


def test_a_mesh_that_would_cut_what_cannot_be_cut_is_refused():
  @dataclasses.dataclass(frozen=True)
  class Whole:
    """A scheme whose numbers are one block of a column."""

    def shape(self, parts):
      *leading, F, _ = parts["value"].shape
      return (*leading, 24, F)

  w = quant.QTensor({"value": np.zeros((40, 3), np.uint8)}, Whole())
  params = tree.unflatten({"layers/0/mlp/up/w": w})
  with pytest.raises(
    ConfigError, match=r"layers/0/mlp/up/w: found 3 blocks .* multiple of 2, the size of fsdp"
  ):
    parallel.layout(params, parallel.make_mesh("fsdp=2,tensor=4"), parallel.RULES["fsdp_tensor"])
