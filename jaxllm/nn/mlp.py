"""The feed-forward layer."""

from __future__ import annotations

import flax.linen as nn
import jax

from jaxllm.config import ModelConfig
from jaxllm.nn.layers import Linear, weight
from jaxllm.ops.constrain import constrain


class FeedForward(nn.Module):
  """down(cfg.mlp(p, gate(x), up(x))), with the inputs that cfg.mlp names and its own parameters p, if it has any."""

  cfg: ModelConfig

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    cfg = self.cfg
    inputs = [constrain(Linear(cfg, cfg.mlp_dim, name=name)(x_BTD), "BTF") for name in cfg.mlp.inputs]
    p = {name: weight(self, name, shape, init) for name, (shape, init) in cfg.mlp.params().items()}
    # the backward pass recomputes the activation: that is faster than to store and read what its derivative needs
    hidden_BTF = jax.checkpoint(cfg.mlp)(p, *inputs)
    return constrain(Linear(cfg, cfg.embed_dim, name="down")(hidden_BTF), "BTD")
