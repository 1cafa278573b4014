"""Normalisation layers as values: pure functions of their parameters.  Statistics are float32 whatever the input is."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxllm.errors import check_positive


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
