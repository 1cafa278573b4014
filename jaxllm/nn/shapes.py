"""The parameters that a config has, without making them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp

from jaxllm import tree
from jaxllm.config import ModelConfig
from jaxllm.nn.transformer import Transformer


@functools.lru_cache(maxsize=64)
def expected_shapes(cfg: ModelConfig) -> Mapping[str, tuple[int, ...]]:
  """{path: logical shape} of the parameters of `Transformer(cfg)`, from `jax.eval_shape` of its initialisation.

  Layers of one kind have equal parameters, so a model with one of each kind is enough, however deep it is.
  """
  kinds = tuple(dict.fromkeys(cfg.layers))
  small = Transformer(dataclasses.replace(cfg, layers=kinds, num_layers=len(kinds)))
  init = lambda: small.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  params = dict(jax.eval_shape(init)["params"])
  layers = params.pop("layers")
  params["layers"] = {str(i): layers[str(kinds.index(cfg.layer(i)))] for i in range(cfg.num_layers)}
  return MappingProxyType({path: tuple(leaf.shape) for path, leaf in tree.flatten(params).items()})
