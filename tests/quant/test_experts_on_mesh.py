"""Quantized experts on a mesh: each device multiplies with its part of their numbers and scales."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import MODELS
from model_cases import params as params_of

from jaxllm import parallel, quant
from jaxllm.errors import ConfigError
from jaxllm.leaf import QTensor
from jaxllm.nn import Transformer
from jaxllm.ops.experts import experts_on_mesh
from jaxllm.train import lora

CFG = MODELS["experts"]
IDS = np.arange(24).reshape(4, 6)


@pytest.mark.core
@pytest.mark.parametrize("name", [pytest.param("int8", marks=pytest.mark.slow), "int8_asym"])
def test_experts_are_computed_where_they_lie(name):
  params = quant.apply(params_of(CFG), quant.SCHEMES[name]())
  run = jax.jit(lambda params: Transformer(CFG).apply({"params": params}, IDS)[0])
  expected, mesh = run(params), parallel.make_mesh("fsdp=2,tensor=4")
  with jax.set_mesh(mesh):
    found = run(parallel.shard(params, mesh, parallel.RULES["fsdp_tensor"], CFG))
  assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_gradients_go_through_experts_where_they_lie():
  """Of LoRA's factors on attention, as on one device."""
  params = quant.apply(params_of(CFG), quant.SCHEMES["int8"]())
  params = lora.apply(params, [(r"layers/\d+/attn/[qv]/w", True)], rank=2, alpha=4.0, key=jax.random.key(0))
  run = lambda adapters, params: Transformer(CFG).apply(
    {"params": lora.with_adapters(params, adapters)}, IDS
  )[0]
  gradient = jax.jit(jax.grad(lambda adapters, params: jnp.mean(jnp.square(run(adapters, params)))))
  expected = gradient(lora.adapters(params), params)
  mesh = parallel.make_mesh("fsdp=2,tensor=4")
  with jax.set_mesh(mesh):
    params = parallel.shard(params, mesh, parallel.RULES["fsdp_tensor"], CFG)
    found = gradient(lora.adapters(params), params)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert np.abs(a - b).max() <= 1e-4 * max(np.abs(x).max() for x in jax.tree.leaves(expected))


def test_blocks_that_a_mesh_would_leave_whole_beside_numbers_that_it_cuts_are_refused():
  weight = {"value": np.zeros((5, 24, 20), np.int8), "scale": np.ones((5, 24, 5), np.float32)}
  p = {"router": {"w": np.ones((24, 5), np.float32)}, "down": {"w": QTensor(weight, quant.Int8())}}
  p["up"] = {"w": QTensor({"value": np.zeros((5, 20, 24), np.int8)}, quant.Int8())}
  x_BTD = np.ones((4, 6, 24), np.float32)
  with (
    jax.set_mesh(parallel.make_mesh("tensor=2", jax.devices()[:2])),
    pytest.raises(
      ConfigError, match=r"tensor of the mesh cuts only one of the numbers and the 5 blocks \(scale\)"
    ),
  ):
    jax.jit(lambda x, p: experts_on_mesh(x, p, lambda z: z, lambda x: x))(x_BTD, p)
