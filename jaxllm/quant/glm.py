"""Weights as GLM-130B and ChatGLM hold them: integers of 8 or 4 bits, a scale in half precision for each row [out]."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxllm.errors import QuantError, check_choice
from jaxllm.ops.rows import multiply, unpacked
from jaxllm.quant.rounding import half


@dataclasses.dataclass(frozen=True)
class GlmRows:
  """w ~ scale n, n = round(w / scale), scale = max |w| / (2^(bits - 1) - 1) of a column, all in half precision.

  bits: 8, or 4: byte i then holds n[2 i] << 4 | n[2 i + 1] & 15, read with arithmetic shifts.  value int8 [out, in] or [out,
  in / 2] and scale float16 [out, 1] are the published weight and weight_scale.  Weights are rounded to half precision first,
  as its checkpoints are in it.  Every weight is off by scale / 2 at most, and by the quotient's rounding.  A scale below 6e-5,
  which half precision has few digits for, may be so small that n is past its range: it ends at 127 or 7, where the published
  code wraps to a negative number, and at -128 or -8.
  Raises ConfigError for other bits, and QuantError for an odd `in` in 4 bits.
  Source: Zeng et al. (2022), GLM-130B (INT4 quantization); the quantization of GLM-130B's and ChatGLM-6B's code.
  """

  bits: int = 8

  def __post_init__(self):
    check_choice(self, "bits", (8, 4))

  @property
  def converts(self) -> bool | str:
    """As `leaf.Scheme` has it."""
    return True if self.bits == 8 else "columns"

  def quantize(self, w: jax.Array) -> dict[str, jax.Array]:
    """The parts of w [..., in, out]."""
    if self.bits == 4 and w.shape[-2] % 2:
      raise QuantError(
        f"found the shape {tuple(w.shape)}, expected an even number of rows; leave it out by a rule"
      )
    largest = 2 ** (self.bits - 1) - 1
    w_FD = half(jnp.swapaxes(w, -1, -2))
    scale_F1 = half(jnp.max(jnp.abs(w_FD), axis=-1, keepdims=True) / largest)
    scale_F1 = jnp.where(scale_F1 > 0, scale_F1, 1)  # nothing but zeros
    n_FD = jnp.clip(jnp.round(half(w_FD / scale_F1)), -largest - 1, largest).astype(jnp.int8)
    value = n_FD if self.bits == 8 else n_FD[..., 0::2] * 16 | n_FD[..., 1::2] & 15
    return {"value": value, "scale": scale_F1.astype(jnp.float16)}

  def shape(self, parts: Mapping[str, jax.Array]) -> tuple[int, ...]:
    """[..., in, out] of the weight."""
    *leading, F, B = parts["value"].shape
    return (*leading, B * 8 // self.bits, F)

  def dequantize(self, parts: Mapping[str, jax.Array]) -> jax.Array:
    """The weight, float32 [..., in, out]."""
    n_FD = parts["value"]
    if self.bits == 4:
      n_FD = jnp.stack(_halves(n_FD), axis=-1).reshape(*n_FD.shape[:-1], -1)
    return jnp.swapaxes(n_FD.astype(jnp.float32) * parts["scale"].astype(jnp.float32), -1, -2)

  def product(self, x_CD: jax.Array, parts: Mapping[str, jax.Array]) -> jax.Array:
    """(x n) scale, float32 [C, F], with n in the type of x, which is exact."""
    if self.bits == 8:
      y_CF = multiply(x_CD, parts["value"])
    else:
      rows = x_CD[:, 0::2], x_CD[:, 1::2]
      y_CF = unpacked(*zip(rows, _halves(parts["value"]), strict=True)).T
    return y_CF * parts["scale"].astype(jnp.float32).swapaxes(0, 1)


def _halves(byte: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The numbers in the high and in the low bits, with their signs."""
  # an int8 shifted left keeps the bits above its own on some TPUs
  return byte >> 4, (byte & 15 ^ 8) - 8
