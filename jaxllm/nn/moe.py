"""The feed-forward layer that is a mixture of experts."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from jaxllm.config import ModelConfig
from jaxllm.experts import Moe
from jaxllm.nn.layers import weight
from jaxllm.ops.constrain import gathered, summed
from jaxllm.ops.experts import experts_on_mesh


class Projection(nn.Module):
  """The parameters of one projection: w of `shape` [..., in, out], and bias [..., out] where cfg.biases has its name."""

  cfg: ModelConfig
  shape: tuple[int, ...]

  @nn.compact
  def __call__(self) -> dict[str, Any]:
    cfg, leading = self.cfg, self.shape[:-2]
    init = cfg.wiring.init(self.name, cfg.num_layers)
    for _ in leading:
      init = _one_by_one(init)
    p = {"w": weight(self, "w", self.shape, init)}
    if self.name in cfg.biases:
      p["bias"] = weight(self, "bias", (*leading, self.shape[-1]), nn.initializers.zeros)
    return p


def _one_by_one(init: nn.initializers.Initializer) -> nn.initializers.Initializer:
  """The initializer of matrices on a first axis, each as `init` has one alone: it takes that axis for a width otherwise."""

  def stacked(key, shape, dtype):
    return jax.vmap(lambda key: init(key, shape[1:], dtype))(jax.random.split(key, shape[0]))

  return stacked


class Experts(nn.Module):
  """The parameters of the experts of `moe`, each of theirs stacked on a first axis."""

  cfg: ModelConfig
  moe: Moe

  @nn.compact
  def __call__(self) -> dict[str, Any]:
    cfg, moe = self.cfg, self.moe
    D, F = cfg.embed_dim, moe.mlp_dim or cfg.mlp_dim
    shapes = dict.fromkeys(moe.expert.inputs, (D, F)) | {"down": (F, D)}
    return {name: Projection(cfg, (moe.num_experts, *shape), name=name)() for name, shape in shapes.items()}


class MoeFeedForward(nn.Module):
  """`ops.experts` with the parameters of a `jaxllm.experts.Moe`: router/w, experts/<gate, up, down>/w, and their biases."""

  cfg: ModelConfig
  moe: Moe
  sequence: bool = False

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    cfg, moe = self.cfg, self.moe
    router = Projection(cfg, (cfg.embed_dim, moe.num_experts), name="router")()
    p = {"router": router} | Experts(cfg, moe, name="experts")()
    route = lambda logits_CE: moe.router(logits_CE, moe.top_k)
    activation = lambda *inputs: moe.expert({}, *inputs)
    out_BTD = experts_on_mesh(gathered(x_BTD, self.sequence), p, route, activation)
    return summed(out_BTD.astype(cfg.dtype), self.sequence)
