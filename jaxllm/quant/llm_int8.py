"""LLM.int8(): products of integers, but for features that are outliers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import ConfigError, QuantError
from jaxllm.leaf import QTensor
from jaxllm.ops.quantized import product
from jaxllm.quant.int8 import Int8
from jaxllm.quant.w8a8 import W8A8, dot, per_token


@dataclasses.dataclass(frozen=True)
class LlmInt8(W8A8):
  """y = sum over outlier features of x_d w_d, as floats, + `W8A8`'s product of the other features.

  A feature d is an outlier where |x_d| >= threshold in any of the rows that are multiplied at once: what a row gives so depends
  on those beside it, and a model is not causal within a call: later tokens decide, too, which features of a token are rounded.
  Maxima of rows leave out values that are as large; an outlier's w_d are scale n, as they are held.
  outliers: None for as many as there are (where there is one, all of w takes part in a product of floats, of x that is 0
  elsewhere), or at most so many, those with the largest |x_d|, of which alone w is read; the rest are as any other feature.
  features: numbers of features that are outliers whatever x is, as in tuple(np.flatnonzero(np.abs(x).max(0) >= 6).tolist()): in
  large models they are the same ones for all tokens (section 4).  Their w_d are held as float16 in "kept" [out, features],
  beside the integers, 8 (1 + 2 features / in) bits a weight, whose scales leave them out.

  Less than a fifth of `W8A8`'s error is what `features` come to, whose rows of w are in 16 bits, as the paper has them of any
  feature that comes to be an outlier; by default rows of w are integers, as in bitsandbytes, and it is a fifth to a quarter: of
  normal w of 1024 rows and 16 x with three features twenty times as large, 0.13 to 0.195 with those three as `features`, and
  0.19 to 0.25 by default (six draws, test_llm_int8).
  Raises ConfigError for a threshold that is not above 0 (infinity: no outliers but `features`), an `outliers` below 1, and
  features that are no tuple of different integers of 0 or more; QuantError for a weight that has no such row.
  Source: Dettmers et al. (2022), LLM.int8(), section 3; maxima as in bitsandbytes.
  """

  threshold: float = 6.0
  outliers: int | None = None
  features: tuple[int, ...] = ()

  def __post_init__(self):
    number = isinstance(self.threshold, (int, float)) and not isinstance(self.threshold, bool)
    if not number or not self.threshold > 0:
      raise ConfigError(f"LlmInt8.threshold: found {self.threshold!r}, expected a number above 0")
    if self.outliers is not None and (type(self.outliers) is not int or self.outliers < 1):
      raise ConfigError(
        f"LlmInt8.outliers: found {self.outliers!r}, expected None or an integer of at least 1"
      )
    of = self.features
    if type(of) is not tuple or not all(type(d) is int and d >= 0 for d in of) or len(set(of)) < len(of):
      raise ConfigError(
        f"LlmInt8.features: found {of!r}, expected a tuple of different integers of 0 or more"
      )

  def quantize(self, w: jax.Array) -> dict[str, jax.Array]:
    """The parts of w [..., in, out]."""
    if not self.features:
      return super().quantize(w)
    if max(self.features) >= w.shape[-2]:
      raise QuantError(
        f"found the shape {tuple(w.shape)}, expected a row for each of features, the largest {max(self.features)}; give "
        "weights of other rows another scheme by a rule"
      )
    kept_FM = jnp.swapaxes(w[..., self._index, :], -1, -2).astype(jnp.float16)
    return super().quantize(w.at[..., self._index, :].set(0)) | {"kept": kept_FM}

  def dequantize(self, parts: Mapping[str, jax.Array]) -> jax.Array:
    """The weight, float32 [..., in, out]."""
    w = super().dequantize(parts)
    if not self.features:
      return w
    return w.at[..., self._index, :].set(jnp.swapaxes(parts["kept"], -1, -2).astype(jnp.float32))

  def product(self, x_CD: jax.Array, parts: Mapping[str, jax.Array]) -> jax.Array:
    """x w, float32 [C, F]."""
    if self.features:
      x_CM, kept_FM = (x.astype(jnp.float32) for x in (x_CD[:, self._index], parts["kept"]))
      others = {name: parts[name] for name in ("value", "scale")}
      y_CF = dataclasses.replace(self, features=()).product(x_CD.at[:, self._index].set(0), others)
      return y_CF + jnp.dot(x_CM, kept_FM.T, preferred_element_type=jnp.float32)
    size_CD = jnp.abs(x_CD.astype(jnp.float32))
    largest_D = jnp.max(size_CD, axis=0)
    out_1D = (largest_D >= self.threshold)[None]
    if self.outliers is not None:
      _, index_M = jax.lax.top_k(largest_D, min(self.outliers, largest_D.size))
      out_1D &= jnp.zeros_like(out_1D).at[0, index_M].set(True)
    n_CD, scale_C1 = per_token(jnp.where(out_1D & (size_CD >= self.threshold), 0, x_CD))
    y_CF = dot(jnp.where(out_1D, 0, n_CD), parts["value"]).astype(jnp.float32) * parts["scale"].T * scale_C1
    out_CD = jnp.where(out_1D, x_CD, 0)
    if self.outliers is None:
      floats = lambda: product(out_CD, QTensor(dict(parts), Int8()))
      return y_CF + jax.lax.cond(jnp.any(out_1D), floats, lambda: jnp.zeros_like(y_CF))
    few = {"value": parts["value"][:, index_M], "scale": parts["scale"]}
    return y_CF + Int8().product(out_CD[:, index_M], few)

  @property
  def _index(self) -> np.ndarray:
    return np.array(self.features)
