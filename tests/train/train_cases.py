"""A model so small that twenty steps take a second, and a text to train it on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.config import Layer, ModelConfig
from jaxllm.nn import Transformer
from jaxllm.position import Rope
from jaxllm.train import data, step
from jaxllm.train.loop import Watch, fit
from jaxllm.train.step import TrainConfig

LENGTH, BATCH = 8, 4
CFG = ModelConfig(
  vocab_size=256,
  embed_dim=16,
  num_layers=2,
  num_heads=2,
  num_kv_heads=1,
  head_dim=8,
  mlp_dim=24,
  layers=(Layer(Rope()),),
)
TEXT = np.frombuffer(
  b"so we beat on, boats against the current, borne back ceaselessly into the past. " * 8, np.uint8
)


def config(steps, **kwargs):
  return TrainConfig(steps=steps, batch_size=BATCH, length=LENGTH, **kwargs)


def train(directory, steps, seed=3, cfg=CFG, on_step=None, check_stop=None, stop=False, **kwargs):
  """`fit` of the small model: (state, steps at which it began)."""
  starts = []

  class Told(Watch):
    def start(self, step):
      starts.append(step)

    def step(self, step, metrics):
      if on_step is not None:
        on_step(step, metrics["loss"])

  class Asked:
    def __bool__(self):
      return bool(stop)

    def check(self):
      if check_stop is not None:
        check_stop()

  state = fit(
    Transformer(cfg),
    config(steps, **kwargs),
    data.Stretches(TEXT, seed, BATCH, LENGTH),
    seed,
    directory,
    Told(),
    Asked(),
  )
  return state, starts


@functools.cache
def compiled_step(model, config, *args, **kwargs):
  """`make_step`, traced once for all tests."""
  return step.make_step(model, config, *args, **kwargs)


@functools.cache
def _first_state(model, config, seed):
  return jax.tree.map(np.asarray, step.init_state(model, config, seed))


def first_state(model, config, seed, params=None, mesh=None, rules=None):
  """`init_state`, computed once; a step gives up the arrays that it gets."""
  return jax.tree.map(jnp.array, _first_state(model, config, seed))


def bytes_of(state):
  """{path: (dtype, shape, bytes)} of every leaf, optimizer included."""
  found = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    array = np.asarray(leaf)
    found[jax.tree_util.keystr(path)] = (array.dtype, array.shape, array.tobytes())
  return found
