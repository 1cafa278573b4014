"""Normalisation layers as values: pure functions of their parameters.  Statistics are float32 whatever the input is."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.errors import ConfigError, check_positive


@dataclasses.dataclass(frozen=True)
class RMSNorm:
  """x / sqrt(mean(x^2) + eps) * scale.  Source: Zhang and Sennrich (2019); eps inside the root as in Llama."""

  eps: float = 1e-6

  def __post_init__(self):
    check_positive(self, eps=self.eps)

  def params(self, dim: int) -> dict:
    """{name: (shape, initializer)}"""
    return {"scale": ((dim,), jax.nn.initializers.ones)}

  def __call__(self, p, x: jax.Array) -> jax.Array:
    """x [..., D] normalised over its last axis, in the type of x."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
    return (x32 * _row(p["scale"], x)).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class LayerNorm:
  """(x - mean) / sqrt(var + eps) * scale + bias.  Source: Ba, Kiros and Hinton (2016).

  The variance is the mean of squared deviations (two passes): E[x^2] - E[x]^2 in float32 is off by 866 at mean 1e4, std 1.
  """

  eps: float = 1e-5

  def __post_init__(self):
    check_positive(self, eps=self.eps)

  def params(self, dim: int) -> dict:
    """{name: (shape, initializer)}"""
    return {"scale": ((dim,), jax.nn.initializers.ones), "bias": ((dim,), jax.nn.initializers.zeros)}

  def __call__(self, p, x: jax.Array) -> jax.Array:
    """x [..., D] normalised over its last axis, in the type of x."""
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
    return (x32 * _row(p["scale"], x) + _row(p["bias"], x)).astype(x.dtype)


def _row(p_D: jax.Array, x: jax.Array) -> jax.Array:
  return jnp.expand_dims(p_D, range(x.ndim - 1))


NORMS = {"rms": RMSNorm, "layer": LayerNorm}


@dataclasses.dataclass(frozen=True)
class QkNorm:
  """Queries and keys normalised before their inner product, which bounds it.

  `over` is what one statistic and its weights cover: "head" (each head's H coordinates, weights [H] shared by all heads: Qwen
  3, Gemma 3), "each" (the same, with weights [N, H] of its own for each head: StableLM, Cohere), "all" (all heads at once,
  weights [N H]: OLMo 2).  `place` is "before" or "after" the rotation by positions (Hunyuan, nanochat; Llama 4 with
  RMSNorm(scale=None)).  Source: Henry et al. (2020); Dehghani et al. (2023), section 2.
  """

  norm: Any = RMSNorm()
  over: str = "head"
  place: str = "before"

  def __post_init__(self):
    for name, allowed in (("over", ("head", "each", "all")), ("place", ("before", "after"))):
      if getattr(self, name) not in allowed:
        raise ConfigError(
          f"QkNorm.{name}: found {getattr(self, name)!r}, expected one of {', '.join(allowed)}"
        )

  def params(self, heads: int, head_dim: int) -> dict:
    """{name: (shape, initializer)}"""
    inner = self.norm.params(heads * head_dim if self.over == "all" else head_dim)
    if self.over != "each":
      return inner
    return {name: ((heads, *shape), init) for name, (shape, init) in inner.items()}

  def __call__(self, p, x_BTNH: jax.Array) -> jax.Array:
    """x [B, T, N, H] normalised, in the type of x."""
    if self.over == "all":
      return self.norm(p, x_BTNH.reshape(*x_BTNH.shape[:2], -1)).reshape(x_BTNH.shape)
    return jax.vmap(self.norm, in_axes=(0 if self.over == "each" else None, 2), out_axes=2)(p, x_BTNH)
