"""The feed-forward layer."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from jaxllm.config import ModelConfig
from jaxllm.nn.layers import Linear, weight
from jaxllm.ops.constrain import constrain, summed
from jaxllm.ops.sequence import fan


class FeedForward(nn.Module):
  """down(mlp(p, gate(x), up(x))), with the inputs that mlp (None: cfg.mlp) names and its own parameters p, if it has any."""

  cfg: ModelConfig
  mlp: Any = None
  sequence: bool = False

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    cfg, mlp = self.cfg, self.mlp or self.cfg.mlp
    x = fan(x_BTD, self.sequence)
    inputs = [constrain(Linear(cfg, cfg.mlp_dim, name=name)(x), "BTF") for name in mlp.inputs]
    p = {name: weight(self, name, shape, init) for name, (shape, init) in mlp.params().items()}
    # the backward pass recomputes the activation: that is faster than to store and read what its derivative needs
    hidden_BTF = jax.checkpoint(mlp)(p, *inputs)
    return summed(Linear(cfg, cfg.embed_dim, self.sequence, name="down")(hidden_BTF), self.sequence)
