"""Weights as indices of 4 bits into a table of 16 levels (NF4, FP4), with a scale a block of each column."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import ConfigError, QuantError, check_choice
from jaxllm.leaf import QTensor
from jaxllm.ops.device import current_device
from jaxllm.ops.quantized import product
from jaxllm.ops.rows import unpacked
from jaxllm.quant import dynamic
from jaxllm.quant.rounding import quotient, reciprocal

NF4 = (
  *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
  *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
  *(
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
  ),
)
"""Quantiles of the normal distribution, 7 below and 8 above an exact 0, over the largest: QLoRA, appendix E."""

_E2M1 = (0, 0.0625, 8, 12, 4, 6, 2, 3)
FP4 = tuple(sign * magnitude / 12 for sign in (1, -1) for magnitude in _E2M1)
"""A sign, two bits of exponent and one of mantissa, over the largest, in the order of their bits, as bitsandbytes has them."""

TABLES = {"nf4": np.array(NF4, np.float32), "fp4": np.array(FP4, np.float32)}

NESTED = 256
"""The scales that have one scale of their own, with double_quant."""


@dataclasses.dataclass(frozen=True)
class Codebook:
  """w ~ absmax t[n], n the index of the level nearest to w / absmax, absmax = max |w| of `block` weights of a column.

  levels: "nf4" or "fp4", whose 16 levels t are in [-1, 1].  A byte holds two weights that follow each other along `in`, the
  first in its high bits: value uint8 [out, in / 2], scale float32 [out, in / block], which are bitsandbytes' bytes and absmax
  of the matrix [out, in].
  double_quant: absmax ~ d[m] s + mean, with d the levels of `dynamic`, s a scale for 256 absmax in the order of [out, in /
  block], and mean that of all of them: 4 + 8 / 64 + 32 / (64 256) = 4.127 bits a weight for 4.5, and 32 / in for the place in
  that order at which a column begins, as columns are also read one by one.
  Raises ConfigError for other settings, and QuantError for a weight whose `in` the block does not divide.

  In `product` levels are found by 15 selects (ms for 1 / 8 / 128 rows by 1024 x 2816, two cores of an EPYC with AVX-512: 0.76 /
  1.2 / 5.8; by gathers 0.93 / 1.3 / 5.8, by sums over 16 masks 2.2 / 2.6 / 10.7, and float32 weights 0.15 / 0.6 / 4.4).
  Source: Dettmers et al. (2023), QLoRA, section 3 and appendix E.
  """

  levels: str = "nf4"
  block: int = 64
  double_quant: bool = False

  def __post_init__(self):
    check_choice(self, "levels", TABLES)
    check_choice(self, "double_quant", (True, False))
    if type(self.block) is not int or self.block < 2 or self.block % 2:
      raise ConfigError(f"Codebook.block: found {self.block!r}, expected an even integer of 2 or more")

  @property
  def converts(self) -> bool | str:
    """By columns, as `leaf.Scheme` has it; with double_quant `product` comes to that when it has the scales."""
    return False if self.double_quant else "columns"

  def quantize(self, w: jax.Array) -> dict[str, jax.Array]:
    """The parts of w [..., in, out]."""
    *leading, D, F = w.shape
    if D % self.block:
      near = max((n for n in range(2, min(D, self.block) + 1, 2) if D % n == 0), default=None)
      hint = "" if near is None else f"take block={near}, or "
      raise QuantError(
        f"found the shape {tuple(w.shape)}, expected a multiple of the block, {self.block}, as its rows; {hint}leave it out by "
        "a rule"
      )
    w_FQk = jnp.swapaxes(w, -1, -2).astype(jnp.float32).reshape(*leading, F, D // self.block, self.block)
    absmax_FQ = jnp.max(jnp.abs(w_FQk), axis=-1)
    x_FQk = jnp.clip(w_FQk * reciprocal(absmax_FQ)[..., None], -1, 1)
    table = TABLES[self.levels]
    order = np.argsort(table, kind="stable")  # FP4 is in the order of its bits
    above = (x_FQk > t for t in (table[order][:-1] + table[order][1:]) / np.float32(2))
    n_FQk = jnp.asarray(order, jnp.uint8)[sum(over.astype(jnp.uint8) for over in above)]
    n_FD = n_FQk.reshape(*leading, F, D)
    return {"value": n_FD[..., 0::2] << 4 | n_FD[..., 1::2]} | self._hold(absmax_FQ)

  def shape(self, parts: Mapping[str, jax.Array]) -> tuple[int, ...]:
    """[..., in, out] of the weight."""
    *leading, F, B = parts["value"].shape
    return (*leading, 2 * B, F)

  def dequantize(self, parts: Mapping[str, jax.Array]) -> jax.Array:
    """The weight, float32 [..., in, out]."""
    even_FB, odd_FB = self._floats(parts)
    return jnp.swapaxes(jnp.stack([even_FB, odd_FB], axis=-1).reshape(*even_FB.shape[:-1], -1), -1, -2)

  def product(self, x_CD: jax.Array, parts: Mapping[str, jax.Array]) -> jax.Array:
    """x w, float32 [C, F]: of double_quant, by the scales of all columns that are not."""
    if self.double_quant:
      plain = {"value": parts["value"], "scale": self._scale(parts)}
      return product(x_CD, QTensor(plain, dataclasses.replace(self, double_quant=False)))
    return unpacked(*zip((x_CD[:, 0::2], x_CD[:, 1::2]), self._floats(parts), strict=True)).T

  def _floats(self, parts: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The weights of even and of odd rows of w, each float32 [..., F, B]: those in high and in low bits."""
    value_FB, scale_FQ = parts["value"], self._scale(parts)
    n_FQb = value_FB.reshape(*scale_FQ.shape, -1)
    floats = (self._level(n_FQb, shift) * scale_FQ[..., None] for shift in (4, 0))
    return tuple(x.reshape(value_FB.shape) for x in floats)

  def _level(self, byte: jax.Array, shift: int) -> jax.Array:
    """t[byte >> shift & 15]: on a CPU, which gathers one number at a time, and on a TPU by selects.

    (One H100, 4096 x 11008, one row: 28 microseconds by the table, 53 by selects.)
    """
    if current_device().platform not in ("cpu", "tpu"):
      return jnp.take(jnp.asarray(TABLES[self.levels]), byte >> shift & 15, mode="clip")
    levels = list(TABLES[self.levels])
    for bit in range(shift, shift + 4):
      is_set = byte & np.uint8(1 << bit) != 0
      levels = [jnp.where(is_set, b, a) for a, b in zip(levels[0::2], levels[1::2], strict=True)]
    return levels[0]

  def _hold(self, absmax_FQ: jax.Array) -> dict[str, jax.Array]:
    if not self.double_quant:
      return {"scale": absmax_FQ}
    *leading, F, Q = absmax_FQ.shape
    flat = absmax_FQ.reshape(*leading, F * Q)
    mean = _mean(flat)
    n, nested = dynamic.quantize(flat - mean, NESTED)
    start = jnp.broadcast_to(jnp.arange(0, F * Q, Q, dtype=jnp.int32)[:, None], (*leading, F, 1))
    return {
      "scale": n.reshape(*leading, F, Q),
      "start": start,
      "nested_scale": nested[..., None, :],
      "mean_scale": mean[..., None],
    }

  def _scale(self, parts: Mapping[str, jax.Array]) -> jax.Array:
    """absmax, float32 [..., F, Q]."""
    n_FQ = parts["scale"]
    if not self.double_quant:
      return n_FQ
    block_FQ = (parts["start"] + jax.lax.broadcasted_iota(jnp.int32, n_FQ.shape, n_FQ.ndim - 1)) // NESTED
    nested_FQ = jnp.take_along_axis(parts["nested_scale"], block_FQ, axis=-1, mode="clip")
    return jnp.asarray(dynamic.LEVELS)[n_FQ] * nested_FQ + parts["mean_scale"]


def _mean(x: jax.Array) -> jax.Array:
  """The mean [..., 1] of numbers that are not negative, by halves: so it is the same number on every mesh."""
  size = x.shape[-1]
  while x.shape[-1] > 1:
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, x.shape[-1] % 2)])
    x = x[..., 0::2] + x[..., 1::2]
  return quotient(x, size)
