"""LLM.int8(): products of integers, but for features that are outliers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxllm.errors import ConfigError
from jaxllm.leaf import QTensor
from jaxllm.ops.quantized import product
from jaxllm.quant.int8 import Int8
from jaxllm.quant.w8a8 import W8A8, dot, per_token


@dataclasses.dataclass(frozen=True)
class LlmInt8(W8A8):
  """y = sum over outlier features of x_d w_d, in the type of x, + `W8A8`'s product of the other features.

  A feature d is an outlier where |x_d| >= threshold in any of the rows that are multiplied at once: what a row gives so depends
  on those beside it, and a model is not causal within a call: later tokens decide, too, which features of a token are rounded.
  Maxima of rows leave out values that are as large; an outlier's w_d are scale n, as they are held.
  outliers: None for as many as there are (where there is one, all of w takes part in a product of floats, of x that is 0
  elsewhere), or at most so many, those with the largest |x_d|, of which alone w is read; the rest are as any other feature.
  Raises ConfigError for a threshold that is not above 0 (infinity: no outliers) or an `outliers` below 1.
  Source: Dettmers et al. (2022), LLM.int8(), section 3; maxima as in bitsandbytes.
  """

  threshold: float = 6.0
  outliers: int | None = None

  def __post_init__(self):
    number = isinstance(self.threshold, (int, float)) and not isinstance(self.threshold, bool)
    if not number or not self.threshold > 0:
      raise ConfigError(f"LlmInt8.threshold: found {self.threshold!r}, expected a number above 0")
    if self.outliers is not None and (type(self.outliers) is not int or self.outliers < 1):
      raise ConfigError(
        f"LlmInt8.outliers: found {self.outliers!r}, expected None or an integer of at least 1"
      )

  def product(self, x_CD: jax.Array, parts: Mapping[str, jax.Array]) -> jax.Array:
    """x w, float32 [C, F]."""
    size_CD = jnp.abs(x_CD.astype(jnp.float32))
    largest_D = jnp.max(size_CD, axis=0)
    out_1D = (largest_D >= self.threshold)[None]
    if self.outliers is not None:
      _, index_M = jax.lax.top_k(largest_D, min(self.outliers, largest_D.size))
      out_1D &= jnp.zeros_like(out_1D).at[0, index_M].set(True)
    n_CD, scale_C1 = per_token(jnp.where(out_1D & (size_CD >= self.threshold), 0, x_CD))
    y_CF = dot(jnp.where(out_1D, 0, n_CD), parts["value"]).astype(jnp.float32) * scale_C1 * parts["scale"].T
    out_CD = jnp.where(out_1D, x_CD, 0)
    if self.outliers is None:
      floats = lambda: product(out_CD, QTensor(dict(parts), Int8()))
      return y_CF + jax.lax.cond(jnp.any(out_1D), floats, lambda: jnp.zeros_like(y_CF))
    few = {"value": parts["value"][:, index_M], "scale": parts["scale"]}
    return y_CF + Int8().product(out_CD[:, index_M], few)
