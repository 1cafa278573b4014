"""Normalisation layers as values: pure functions of their parameters.  Statistics are float32 or wider for any input."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.errors import ConfigError, check_choice, check_positive

SCALES = ("w", "1+w", None)


@dataclasses.dataclass(frozen=True)
class RMSNorm:
  """x / sqrt(mean(x^2) + eps) * g, with eps inside the root as in Llama (the authors' code divides by rms + eps).

  scale: g = w, g = 1 + w with w from 0 (Gemma), or no g (None: what Llama 4 calls an L2 norm of queries and keys).
  multiply_in: "float32" multiplies by g, then casts to the type of x (Gemma); "input" casts, then multiplies in the type
  of x (Llama, T5), which in bfloat16 is another number.
  fraction: below 1 it is pRMSNorm: the mean is of the first int(fraction * D) coordinates only, the authors' rounding.

  Raises ConfigError for a bad field, and on use where the fraction leaves no coordinate.
  Source: Zhang and Sennrich (2019), and their rmsnorm_torch.py for pRMSNorm.
  """

  eps: float = 1e-6
  scale: str | None = "w"
  multiply_in: str = "float32"
  fraction: float = 1.0

  def __post_init__(self):
    check_positive(self, eps=self.eps, fraction=self.fraction)
    check_choice(self, "scale", SCALES)
    check_choice(self, "multiply_in", ("float32", "input"))
    if self.fraction > 1:
      raise ConfigError(f"RMSNorm.fraction: found {self.fraction}, expected at most 1")

  def params(self, dim: int) -> dict:
    """{name: (shape, initializer)}"""
    return _gain_params(self.scale, dim)

  def __call__(self, p, x: jax.Array) -> jax.Array:
    """x [..., D] normalised over its last axis, in the type of x."""
    measured = int(self.fraction * x.shape[-1])
    if not measured:
      raise ConfigError(
        f"RMSNorm.fraction: found {self.fraction}, which is less than one of {x.shape[-1]} coordinates"
      )
    wide = _wide(x)
    wide = wide * _inverse_root(wide[..., :measured], -1, self.eps)
    if self.scale is None:
      return wide.astype(x.dtype)
    gain = _gain(self.scale, p, wide)
    if self.multiply_in == "float32":
      return (wide * gain).astype(x.dtype)
    # Rounded by reduce_precision as well as by the cast: compiled, XLA may drop a cast down that is followed by one up.
    # The exponent stays wide, as reduce_precision would flush what float16 keeps as subnormal numbers.
    mantissa = int(jnp.finfo(x.dtype).nmant)
    wide = jax.lax.reduce_precision(wide, int(jnp.finfo(wide.dtype).nexp), mantissa)
    return wide.astype(x.dtype) * gain.astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class LayerNorm:
  """(x - mean) / sqrt(var + eps) * g + b, over the coordinates of each token; var is the biased variance.

  scale: g = w, g = 1 + w with w from 0 (Nemotron's LayerNorm1P, which adds in the type of its weights), or no g (None);
  bias: whether there is a b.  OLMo 1 has neither, Cohere no b.
  The variance is the mean of squared deviations (two passes): at mean 1e4, std 1 the float32 result is 5e-7 off, where
  torch's is 2e-3 off and E[x^2] - E[x]^2 would be off by 866.

  Raises ConfigError for a bad field.  Source: Ba, Kiros and Hinton (2016).
  """

  eps: float = 1e-5
  scale: str | None = "w"
  bias: bool = True

  def __post_init__(self):
    check_positive(self, eps=self.eps)
    check_choice(self, "scale", SCALES)
    check_choice(self, "bias", (True, False))

  def params(self, dim: int) -> dict:
    """{name: (shape, initializer)}"""
    bias = {"bias": ((dim,), jax.nn.initializers.zeros)} if self.bias else {}
    return _gain_params(self.scale, dim) | bias

  def __call__(self, p, x: jax.Array) -> jax.Array:
    """x [..., D] normalised over its last axis, in the type of x."""
    wide = _standardised(_wide(x), -1, self.eps)
    if self.scale is not None:
      wide = wide * _gain(self.scale, p, wide)
    if self.bias:
      wide = wide + _row(p["bias"], wide)
    return wide.astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class L2Norm:
  """x / max(||x||_2, eps), without parameters: torch.nn.functional.normalize.

  Not what Llama 4 calls an L2 norm, which divides by the root of the *mean* square: that is RMSNorm(scale=None).
  Raises ConfigError for a bad eps.  Source: torch.nn.functional.normalize.
  """

  eps: float = 1e-12

  def __post_init__(self):
    check_positive(self, eps=self.eps)

  def params(self, dim: int) -> dict:
    """{name: (shape, initializer)}"""
    return {}

  def __call__(self, p, x: jax.Array) -> jax.Array:
    """x [..., D] with rows of length 1, in the type of x."""
    wide = _wide(x)
    length = jnp.sum(jnp.square(wide), axis=-1, keepdims=True)
    # the maximum under the root, as the gradient of a root at 0 is infinite; and above 0 where eps^2 is too small a number
    floor = max(self.eps**2, float(jnp.finfo(wide.dtype).tiny))
    return (wide * jax.lax.rsqrt(jnp.maximum(length, floor))).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class BatchNorm:
  """(x - mean) / sqrt(var + eps) * w + b, with mean and variance of each coordinate over all tokens of the batch.

  For comparison only, and not in NORMS: a token's output depends on later tokens (no causal decoder), on the batch it is
  in, and on padding, and a single token has no variance.  Training statistics; there are no running ones.
  Source: Ioffe and Szegedy (2015).
  """

  eps: float = 1e-5

  def __post_init__(self):
    check_positive(self, eps=self.eps)

  def params(self, dim: int) -> dict:
    """{name: (shape, initializer)}"""
    return LayerNorm(self.eps).params(dim)

  def __call__(self, p, x: jax.Array) -> jax.Array:
    """x [..., D] normalised over all axes but its last, in the type of x."""
    wide = _standardised(_wide(x), tuple(range(x.ndim - 1)), self.eps)
    return (wide * _row(p["scale"], wide) + _row(p["bias"], wide)).astype(x.dtype)


def _wide(x: jax.Array) -> jax.Array:
  """float32 at least: squares overflow in float16, and a sum in bfloat16 has two digits."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _inverse_root(x: jax.Array, axis, eps: float) -> jax.Array:
  return jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=axis, keepdims=True) + eps)


def _standardised(x: jax.Array, axis, eps: float) -> jax.Array:
  x = x - jnp.mean(x, axis=axis, keepdims=True)
  # what rounding left of the mean: of 1e4 it is 1e-3.  It is 0 but for rounding, and so is its gradient
  x = x - jax.lax.stop_gradient(jnp.mean(x, axis=axis, keepdims=True))
  return x * _inverse_root(x, axis, eps)


def _gain_params(scale: str | None, dim: int) -> dict:
  if scale is None:
    return {}
  init = jax.nn.initializers.zeros if scale == "1+w" else jax.nn.initializers.ones
  return {"scale": ((dim,), init)}


def _gain(scale: str, p, x: jax.Array) -> jax.Array:
  w = _row(p["scale"], x)
  return 1 + w if scale == "1+w" else w


def _row(p_D: jax.Array, x: jax.Array) -> jax.Array:
  return jnp.expand_dims(p_D, range(x.ndim - 1)).astype(x.dtype)


NORMS = {"rms": RMSNorm, "layer": LayerNorm, "l2": L2Norm}


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
    check_choice(self, "over", ("head", "each", "all"))
    check_choice(self, "place", ("before", "after"))

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
