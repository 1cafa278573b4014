"""Small modules that bind parameters to pure functions."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxllm.ops.einsum import einsum


def weight(module: nn.Module, name: str, shape: tuple[int, ...], init) -> Any:
  """The stored parameter if there is one, else a new one.

  `self.param` compares stored shapes and so refuses leaves that hold their weight in another form.
  """
  if module.has_variable("params", name):
    return module.get_variable("params", name)
  return module.param(name, init, shape, jnp.float32)


class Linear(nn.Module):
  """y = x w, w [in, out], computed in `dtype` and accumulated in float32."""

  features: int
  dtype: str
  init_scale: float = 1.0

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    init = nn.initializers.variance_scaling(self.init_scale**2, "fan_in", "normal")
    w = weight(self, "w", (x.shape[-1], self.features), init)
    # two-dimensional operands: a CPU's matrix product is slower with more
    out = einsum("CD,DF->CF", x.reshape(-1, x.shape[-1]), w.astype(self.dtype), out_dtype=self.dtype)
    return out.reshape(*x.shape[:-1], self.features)


class Norm(nn.Module):
  """A normalisation value (`jaxllm.norm`) with its parameters."""

  kind: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    p = {
      name: weight(self, name, shape, init) for name, (shape, init) in self.kind.params(x.shape[-1]).items()
    }
    return self.kind(p, x)
