"""Weights as integers of 8 bits, multiplied in the type of what they meet."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxllm.errors import check_choice
from jaxllm.ops.rows import multiply

LARGEST = 127
"""-128 is left out: it has no counterpart, |-128| is not an int8, and a symmetric range keeps 0 at 0."""

TINY = 6e-36
"""A maximum or a range up to it counts as 0: above it, half of a 254th is a normal number, which is not flushed to 0."""


def integers(x: jax.Array, largest: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(n, scale), float32: n = round(x 127 / largest) and scale = largest / 127; n = 0 and scale = 1 up to TINY.

  largest: max |x| of what shares a scale, so that n is in [-127, 127], or NaN or infinity, as is then the scale.
  The quotient goes by the reciprocal, as torch divides constants: numbers between two integers go as bitsandbytes' do.  Above
  2^126 a reciprocal is subnormal, 127 of them are not: a power of two takes large ones there.
  """
  none = largest <= TINY
  power = jnp.where(largest > 2.0**100, 2.0**-64, 1.0)
  inverse = LARGEST * (1 / (jnp.where(none, 1, largest) * power)) * power
  return jnp.round(x * jnp.where(none, 0, inverse)), jnp.where(none, 1, largest / LARGEST)


@dataclasses.dataclass(frozen=True)
class Int8:
  """w ~ scale n, n = round(w 127 / max |w|) in [-127, 127], scale = max |w| / 127 of a column (or of the whole matrix).

  Not symmetric: w ~ scale (n - zero), scale = (max w - min w) / 254 over a range that is made to hold 0, zero = -127 -
  round(min w / scale): 0 is exact, and a column of one sign takes the whole range.  Every weight is off by scale / 2 at most,
  of max |w| (or of max w - min w) from 6e-36 to 2^126; below, a column counts as zeros, and its scale is 1.
  per: "column" (one scale for each of w's out) or "tensor".  The products x n are exact in bfloat16 and float32 as far as n
  is; the scale, outside of them, is applied once an output: no float copy of w has to be made.
  Raises ConfigError for another `per`.
  Source: Dettmers et al. (2022), LLM.int8(), section 2.1; Jacob et al. (2018), section 2.1 (the zero point).
  """

  per: str = "column"
  symmetric: bool = True
  converts: ClassVar[bool] = True

  def __post_init__(self):
    check_choice(self, "per", ("column", "tensor"))
    check_choice(self, "symmetric", (True, False))

  def quantize(self, w: jax.Array) -> dict[str, jax.Array]:
    """The parts of w [..., in, out]."""
    w_FD = jnp.swapaxes(w, -1, -2).astype(jnp.float32)
    over = dict(axis=-1 if self.per == "column" else (-1, -2), keepdims=True)
    if self.symmetric:
      n, scale = integers(w_FD, jnp.max(jnp.abs(w_FD), **over))
      parts = {"scale": scale}
    else:
      low, high = jnp.minimum(jnp.min(w_FD, **over), 0), jnp.maximum(jnp.max(w_FD, **over), 0)
      scale = jnp.where(high - low > TINY, (high - low) / (2 * LARGEST), 1)
      zero = -LARGEST - jnp.round(low / scale)
      n = jnp.clip(jnp.round(w_FD / scale) + zero, -LARGEST, LARGEST)
      parts = {"scale": scale, "zero": zero.astype(jnp.int8)}
    return {"value": n.astype(jnp.int8)} | parts

  def shape(self, parts: Mapping[str, jax.Array]) -> tuple[int, ...]:
    """[..., in, out] of the weight."""
    *leading, F, D = parts["value"].shape
    return (*leading, D, F)

  def dequantize(self, parts: Mapping[str, jax.Array]) -> jax.Array:
    """The weight, float32 [..., in, out]."""
    n = parts["value"].astype(jnp.float32)
    if not self.symmetric:
      n -= parts["zero"].astype(jnp.float32)
    return jnp.swapaxes(n * parts["scale"], -1, -2)

  def product(self, x_CD: jax.Array, parts: Mapping[str, jax.Array]) -> jax.Array:
    """(x n - zero sum x) scale, float32 [C, F]."""
    y_CF = multiply(x_CD, parts["value"])
    if not self.symmetric:
      sum_C1 = jnp.sum(x_CD.astype(jnp.float32), axis=1, keepdims=True)
      y_CF -= sum_C1 * parts["zero"].astype(jnp.float32).swapaxes(0, 1)
    return y_CF * parts["scale"].swapaxes(0, 1)
