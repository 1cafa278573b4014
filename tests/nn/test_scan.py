"""One compiled body over stacked parameters is the unrolled model; jit is eager."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import MODELS, B, T, params, position, tables, tokens
from model_checks import full, positions, relative_error

from jaxllm.config import Layer
from jaxllm.errors import ConfigError
from jaxllm.nn import Context, Transformer, init_cache
from jaxllm.tree import flatten, stack_layers, unstack_layers

ROPE = MODELS["rope"]
PATTERNS = {
  "one": dataclasses.replace(ROPE, num_layers=2, layers=(Layer(position("rope"), 7),)),
  "two": dataclasses.replace(
    ROPE, num_layers=4, layers=(Layer(position("rope"), 5), Layer(position("alibi")))
  ),
}


@pytest.mark.parametrize("name", [pytest.param("two", marks=pytest.mark.core), "one"])
def test_scan_is_unrolled(name):
  cfg, ids = PATTERNS[name], tokens()
  weights = params(cfg)

  def run(scan):
    def loss(weights, ids):
      logits = Transformer(cfg, scan=scan).apply({"params": weights}, ids)[0]
      return jnp.mean(jax.nn.logsumexp(logits, -1) ** 2), logits

    return jax.jit(jax.value_and_grad(loss, has_aux=True))

  (_, logits), gradient = run(False)(weights, ids)
  (_, scanned_logits), scanned = run(True)(stack_layers(weights, len(cfg.layers)), ids)
  assert relative_error(scanned_logits, logits) <= 1e-6
  expected, found = flatten(gradient), flatten(unstack_layers(scanned))
  assert expected.keys() == found.keys()
  for path in expected:
    assert relative_error(found[path], expected[path]) <= 1e-5, path


def test_scan_has_the_parameters_of_stacked_layers():
  cfg = PATTERNS["two"]
  init = lambda key: Transformer(cfg, scan=True).init(key, tokens())["params"]
  shapes = jax.eval_shape(init, jax.random.key(0))
  stacked = stack_layers(params(cfg), 2)
  assert {p: x.shape for p, x in flatten(shapes).items()} == {p: x.shape for p, x in flatten(stacked).items()}


@pytest.mark.parametrize("name", PATTERNS)
def test_stack_and_unstack(name):
  weights, period = params(PATTERNS[name]), len(PATTERNS[name].layers)
  there_and_back = flatten(unstack_layers(stack_layers(weights, period)))
  assert there_and_back.keys() == flatten(weights).keys()
  for path, leaf in flatten(weights).items():
    np.testing.assert_array_equal(there_and_back[path], leaf)


def test_layers_that_do_not_stack():
  with pytest.raises(ConfigError, match="3 layers do not divide into a pattern of 2"):
    stack_layers(params(ROPE), 2)
  with pytest.raises(ConfigError, match=r"Transformer.scan: .*unstack_layers"):
    Transformer(PATTERNS["one"], scan=True).apply(
      {"params": stack_layers(params(PATTERNS["one"]), 1)}, tokens(), cache=init_cache(PATTERNS["one"], B, T)
    )


def test_jit_is_eager():
  cfg = dataclasses.replace(MODELS["alibi"], num_layers=1, layers=MODELS["alibi"].layers[:1])
  eager, _ = Transformer(cfg).apply(
    {"params": params(cfg)}, tokens(), Context(pos=positions()), rope=tables(cfg)
  )
  assert relative_error(eager, full(cfg, tokens())) <= 1e-6
