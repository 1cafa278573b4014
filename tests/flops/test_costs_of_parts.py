"""experiments.step_cost: the products of a run that trains a part of its parameters, beside sums made by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from experiments.step_cost import count_of
from jaxllm import flops, quant, tree
from jaxllm.config import ModelConfig
from jaxllm.nn.shapes import expected_shapes
from jaxllm.train import lora
from jaxllm.train.step import TrainConfig

T, R = 16, 3
CFG = ModelConfig(
  vocab_size=61, embed_dim=64, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=128
)
PARTS = flops.forward(CFG, T)
FORWARD = sum(PARTS.values())
MATRICES = {
  path: shape for path, shape in expected_shapes(CFG).items() if len(shape) == 2 and path != "embed"
}
READ_FIRST = [f"layers/0/attn/{name}/w" for name in "qkv"]
"""Matrices that read the embedding, which has no gradient where it is not trained."""


def structs(form=None):
  params = tree.unflatten({p: jax.ShapeDtypeStruct(s, jnp.float32) for p, s in expected_shapes(CFG).items()})
  if form == "int4":
    params = quant.apply(params, quant.SCHEMES["nf4"](double_quant=True))
  if form is not None:
    params = jax.eval_shape(lambda p: lora.apply(p, rank=R, alpha=2.0, key=jax.random.key(0)), params)
  return params


def step_of(params, **config):
  return count_of(CFG, TrainConfig(4, 2, T, **config), 1, params).step


def product(path):
  return 2 * T * MATRICES[path][0] * MATRICES[path][1]


def test_all_are_three_times_the_forward_pass():
  cost = count_of(CFG, TrainConfig(4, 2, T), 1, structs())
  assert cost.step is None and cost.model == 3 * FORWARD / T
  everything = ((".+", True),)
  assert step_of(structs(), trained=everything) == 3 * FORWARD  # counted, it is the formula


@pytest.mark.parametrize("form", ["float32", "int4"])
def test_factors_of_lora(form):
  """Of a frozen weight there is no gradient, and before the first factors none of activations; of attention there are both."""
  inner = [path for path in MATRICES if path != "head"]
  assert sum(map(product, MATRICES)) + PARTS["attention"] == FORWARD
  frozen = sum(2 * product(path) for path in MATRICES) - sum(map(product, READ_FIRST))
  low = lambda path: (2 * T * R * MATRICES[path][0], 2 * T * R * MATRICES[path][1])
  factors = sum(3 * sum(low(path)) for path in inner) - sum(low(path)[0] for path in READ_FIRST)
  assert step_of(structs(form)) == frozen + 3 * PARTS["attention"] + factors
  assert step_of(structs(form), remat="full") == frozen + 3 * PARTS["attention"] + factors


def test_what_comes_before_the_part_that_is_trained_has_no_gradient():
  """The last layer's down projection: its own gradient, and the head's for what it reads."""
  config = dict(trained=(("layers/2/mlp/down/w", True), (".+", False)))
  assert step_of(structs(), **config) == FORWARD + product("layers/2/mlp/down/w") + product("head")


def test_utilisation_is_of_these_and_of_what_remat_does_again():
  config = TrainConfig(4, 2, T, remat="full")
  cost = count_of(CFG, config, 1, structs("float32"))
  assert cost.model == cost.step / T and cost.hardware == cost.model + (FORWARD - PARTS["head"]) / T
  scanned = dataclasses.replace(config, remat="none")
  stacked = jax.eval_shape(lambda p: tree.stack_layers(p, 1), structs())
  stacked = jax.eval_shape(lambda p: lora.apply(p, rank=R, alpha=2.0, key=jax.random.key(0)), stacked)
  first = sum(product(path) + 2 * T * R * MATRICES[path][0] for path in READ_FIRST)
  assert count_of(CFG, scanned, 1, stacked).step == cost.step + first  # one body for all layers
