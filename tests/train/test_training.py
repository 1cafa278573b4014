"""The optimizer step: its schedule, what decays, what is clipped, and that the loss falls."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import train_cases
from model_cases import MODELS
from model_cases import params as model_params

from jaxllm import tree
from jaxllm.activation import Mlp, Xielu
from jaxllm.errors import ConfigError
from jaxllm.nn import Transformer
from jaxllm.norm import LayerNorm
from jaxllm.train.optimizers import DECAYED
from jaxllm.train.step import TrainConfig, init_state

WIDE = dataclasses.replace(train_cases.CFG, norm=LayerNorm(), mlp=Mlp())


@pytest.mark.core
def test_the_loss_falls(tmp_path):
  losses = {}
  train_cases.train(
    tmp_path, 40, on_step=lambda step, loss: losses.update({step: float(loss)}), learning_rate=0.02
  )
  assert list(losses) == list(range(1, 41))
  assert losses[1] > 5  # ln 256 is 5.5
  assert losses[40] < 0.5 * losses[1]


@pytest.mark.parametrize(
  ("step", "share"), [(0, 0.0), (3, 0.3), (10, 1.0), (105, 0.51), (200, 0.02), (10_000, 0.02)]
)
def test_the_rate_warms_up_and_follows_a_cosine(step, share):
  config = TrainConfig(200, 1, 1, learning_rate=0.5, warmup=0.05, final_ratio=0.02)
  np.testing.assert_allclose(config.schedule()(step), 0.5 * share, rtol=1e-6, atol=0)


def params_of(cfg):
  tokens = np.zeros((1, 1), np.int32)
  shapes = jax.eval_shape(Transformer(cfg).init, jax.random.key(0), tokens)["params"]
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)  # norm weights too


def first_update(config, grads, params):
  """(updates, state) of the optimizer's first step."""
  optimizer = config.optimizer()
  return jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p))(grads, params)


def norm_of(grads):
  return np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(grads)))


def test_weight_decay_acts_on_the_matrices_inside_the_layers_only():
  config = train_cases.config(10, warmup=0.0, learning_rate=0.25, weight_decay=0.5)
  params = params_of(WIDE)
  updates, _ = first_update(config, jax.tree.map(np.zeros_like, params), params)
  updates, params = tree.flatten(updates), tree.flatten(params)
  moved = {path for path in params if np.any(updates[path])}
  names = ("attn/q", "attn/k", "attn/v", "attn/o")
  attention = {f"layers/{i}/{name}/w" for i in range(2) for name in names}
  feed_forward = {path for path in params if "/mlp/" in path and path.endswith("/w")}
  assert len(feed_forward) == 4
  assert moved == attention | feed_forward
  assert {"embed", "head", "final_norm/scale", "layers/0/attn_norm/bias"} <= params.keys() - moved
  for path in moved:
    np.testing.assert_allclose(updates[path], -0.25 * 0.5 * params[path], rtol=1e-6)


def test_every_parameter_of_every_model_has_a_rule_of_decay():
  """Biases, sinks, learned positions and an activation's own numbers too; a path without a rule would stop the training."""
  every = dataclasses.replace(MODELS["rope"], biases=("q", "k", "v", "o", "up", "down", "head"), mlp=Xielu())
  for name, cfg in (MODELS | {"every bias, and xielu": every}).items():
    for path in tree.flatten(model_params(cfg)):
      assert tree.first_match(DECAYED, path) == path.endswith("/w"), (name, path)
  config = train_cases.config(10, warmup=0.0, weight_decay=0.5)
  weights = model_params(every)
  updates, _ = first_update(config, jax.tree.map(np.zeros_like, weights), weights)
  updates = tree.flatten(updates)
  assert not any(np.any(updates[path]) for path in updates if not path.endswith("/w"))
  assert {"head_bias", "layers/0/mlp/alpha_p"} <= updates.keys()


@pytest.mark.parametrize(("norm", "kept"), [(0.5, 0.5), (1.0, 1.0), (40.0, 1.0)])
def test_gradients_are_clipped_by_their_global_norm(norm, kept):
  config = train_cases.config(10)
  params = params_of(WIDE)
  grads = jax.tree.map(lambda leaf: leaf * np.float32(norm / norm_of(params)), params)
  _, state = first_update(config, grads, params)
  first_moment = optax.tree.get(state, "mu")
  for found, grad in zip(jax.tree.leaves(first_moment), jax.tree.leaves(grads), strict=True):
    np.testing.assert_allclose(found, (1 - config.beta1) * grad * (kept / norm), rtol=1e-5, atol=1e-12)


def test_the_state_before_the_first_step_depends_on_the_seed_only():
  model, config = Transformer(train_cases.CFG), train_cases.config(10)
  one, two, other = (train_cases.bytes_of(init_state(model, config, seed)) for seed in (1, 1, 2))
  assert one == two
  assert one["['params']['embed']"] != other["['params']['embed']"]


def test_parameters_are_float32_in_a_bfloat16_model(tmp_path):
  state, _ = train_cases.train(tmp_path, 2, cfg=dataclasses.replace(train_cases.CFG, dtype="bfloat16"))
  assert {leaf.dtype for leaf in jax.tree.leaves(state["params"])} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
  ("field", "value"),
  [("steps", 0), ("batch_size", -1), ("learning_rate", float("nan")), ("clip_norm", 0), ("warmup", 1)],
)
def test_configurations_that_cannot_train_are_refused(field, value):
  with pytest.raises(ConfigError, match=field):
    TrainConfig(**dict(steps=1, batch_size=1, length=1) | {field: value})
