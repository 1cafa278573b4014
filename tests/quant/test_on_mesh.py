"""Quantized trees on a mesh: laid out as their weights would be, whichever comes first, with the same text."""

import dataclasses

import jax
import numpy as np
import pytest
from model_cases import MODELS
from model_cases import params as params_of

from jaxllm import parallel, quant, tree
from jaxllm.errors import ConfigError
from jaxllm.generate.loop import generate
from jaxllm.nn import Transformer

MESHES = [
  pytest.param("fsdp=2,tensor=2", "fsdp_tensor", marks=pytest.mark.core),
  ("tensor=4", "tensor"),
  ("fsdp=8", "fsdp"),
]
CFG = dataclasses.replace(MODELS["rope"], vocab_size=30)  # 4 do not divide it
HEAD = [("head", True)]


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.mark.parametrize(("axes", "rules"), MESHES)
@pytest.mark.parametrize("name", ["int8", "int8_tensor", "int8_asym"])
def test_quantized_before_or_after_it_is_the_same_tree_and_text(name, axes, rules):
  scheme, params = quant.SCHEMES[name](), params_of(CFG)
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
