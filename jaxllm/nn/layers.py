"""Small modules that bind parameters to pure functions."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxllm.config import ModelConfig
from jaxllm.ops.einsum import PRODUCT, einsum
from jaxllm.ops.sequence import Fan, columns, rows

_WITH_WEIGHTS = jax.checkpoint_policies.save_only_these_names(PRODUCT)
REMATS = {
  "none": None,
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_saveable, _WITH_WEIGHTS
  ),
  "dots_no_batch": _WITH_WEIGHTS,
}
"""What is kept of a layer for its gradient, the rest being computed again: all; its input; also every product; or only those
with weights, without attention's of activations with each other.  On a CPU it saves memory where layers are scanned: XLA orders
unrolled ones as it likes.

Source: Chen et al. (2016), Training Deep Nets with Sublinear Memory Cost; Korthikanti et al. (2022), section 5, for the last.
"""


def weight(module: nn.Module, name: str, shape: tuple[int, ...], init) -> Any:
  """The stored parameter if there is one, else a new one.

  `self.param` compares stored shapes and so refuses leaves that hold their weight in another form (`jaxllm.leaf`).
  """
  if module.has_variable("params", name):
    return module.get_variable("params", name)
  return module.param(name, init, shape, jnp.float32)


class Linear(nn.Module):
  """y = x w + bias, w [in, out] (an array or a `leaf.Matrix`), computed in cfg.dtype and accumulated in float32.

  The module's name decides how w starts (cfg.wiring.init) and whether there is a bias (cfg.biases). sequence: y is for a
  residual stream whose tokens are split (`ops.sequence`).
  """

  cfg: ModelConfig
  features: int
  sequence: bool = False

  @nn.compact
  def __call__(self, x: jax.Array | Fan) -> jax.Array:
    cfg, several = self.cfg, x if isinstance(x, Fan) else None
    x = x if several is None else several.whole
    w = weight(self, "w", (x.shape[-1], self.features), cfg.wiring.init(self.name, cfg.num_layers))
    out = None
    if several is not None:
      out = columns(several, w.astype(cfg.dtype))
    elif self.sequence:
      out = rows(x, w.astype(cfg.dtype), jnp.float32 if self.name in cfg.biases else cfg.dtype)
    if out is not None:
      if self.name in cfg.biases:
        out += weight(self, "bias", (self.features,), nn.initializers.zeros)[None, None]
      return checkpoint_name(out.astype(cfg.dtype), PRODUCT)
    # two-dimensional operands: a CPU's matrix product is slower with more
    x_CD = x.reshape(-1, x.shape[-1])
    if self.name in cfg.biases:
      out = einsum("CD,DF->CF", x_CD, w.astype(cfg.dtype))
      out = (out + weight(self, "bias", (self.features,), nn.initializers.zeros)[None]).astype(cfg.dtype)
    else:
      out = einsum("CD,DF->CF", x_CD, w.astype(cfg.dtype), out_dtype=cfg.dtype)
    return checkpoint_name(out.reshape(*x.shape[:-1], self.features), PRODUCT)


class Norm(nn.Module):
  """A normalisation value (`jaxllm.norm`) with its parameters."""

  kind: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    p = {
      name: weight(self, name, shape, init) for name, (shape, init) in self.kind.params(x.shape[-1]).items()
    }
    return self.kind(p, x)


class HeadNorm(nn.Module):
  """A `norm.QkNorm` with its parameters, for queries or keys [B, T, N, H]."""

  kind: Any

  @nn.compact
  def __call__(self, x_BTNH: jax.Array) -> jax.Array:
    shapes = self.kind.params(*x_BTNH.shape[-2:])
    return self.kind(
      {name: weight(self, name, shape, init) for name, (shape, init) in shapes.items()}, x_BTNH
    )
