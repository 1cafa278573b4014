"""One optimizer step and greedy generation as they stand, on parameters that lie on a mesh."""

import dataclasses

import jax
import numpy as np
import pytest
from mesh_cases import CASES, params
from mesh_checks import gradient_error, make_mesh, relative_error, tokens

from jaxllm import parallel
from jaxllm.generate.loop import generate
from jaxllm.nn import Transformer
from jaxllm.train.step import TrainConfig, make_step

CFG = dataclasses.replace(CASES["llama"], num_layers=1)
CONFIG = TrainConfig(steps=10, batch_size=8, length=12, warmup=0.0)


def stepped(cfg, weights, ids):
  """(loss, parameters after one step, first moments)."""
  state = {
    "step": jax.numpy.zeros((), jax.numpy.int32),
    "params": weights,
    "opt": CONFIG.optimizer().init(weights),
  }
  state, loss = make_step(Transformer(cfg), CONFIG)(state, ids)
  adam = next(
    part for part in jax.tree.leaves(state["opt"], is_leaf=lambda x: hasattr(x, "mu")) if hasattr(part, "mu")
  )
  return loss, state["params"], adam.mu


@pytest.mark.parametrize(
  ("rules", "axes"),
  [("fsdp_tensor", "fsdp=2,tensor=4"), pytest.param("tensor", "data=2,tensor=4", marks=pytest.mark.slow)],
)
def test_an_optimizer_step(rules, axes):
  """Gradients (the first moments are a tenth of the clipped ones), and the layout of what comes out."""
  cfg = CFG
  loss, _, moments = stepped(cfg, jax.tree.map(jax.numpy.asarray, params(cfg)), tokens(cfg))
  mesh = make_mesh(axes)
  with jax.set_mesh(mesh):
    placed = parallel.shard(params(cfg), mesh, parallel.RULES[rules], cfg)
    layout = jax.tree.map(lambda x: x.sharding, placed)
    found_loss, found, found_moments = stepped(cfg, placed, parallel.shard_batch(tokens(cfg), mesh))
  assert relative_error(found_loss, loss) <= 1e-5 and gradient_error(found_moments, moments) <= 1e-5
  assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), found, layout))
  moved = jax.tree.map(lambda new, old: float(np.max(np.abs(new - old))), found, params(cfg))
  assert min(jax.tree.leaves(moved)) > 1e-4


@pytest.mark.slow
def test_greedy_generation():
  cfg, prompts = CFG, [[1, 2, 3], [4, 5, 6, 7, 8], [9], [10, 11]]
  call = lambda weights: generate(Transformer(cfg), weights, prompts, max_new_tokens=6, chunk=6).tokens
  expected, mesh = call(params(cfg)), make_mesh("data=2,tensor=4")
  with jax.set_mesh(mesh):
    assert call(parallel.shard(params(cfg), mesh, parallel.RULES["tensor"], cfg)) == expected
