"""Weights as integers of 4 or 3 bits, a scale a group of each column."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxllm.errors import ConfigError, QuantError, check_choice
from jaxllm.ops.rows import unpacked
from jaxllm.quant import packing

FIELDS = {4: (("value", 4),), 3: (("value", 2), ("high", 1))}
"""The parts that hold a number, from its lowest bits on, with how many are in each: 3 bits are not a divisor of a byte's 8."""

SCALE = jnp.bfloat16
"""It has the range of float32, as weights may be tiny; n is rounded with the scale as it is held."""

LEAST = 2.0**-125
"""Above it, 2.4e-38, half of a scale is a normal number, which float32 does not flush to 0."""


def check_group(group: Any, owner: str) -> None:
  """Raise ConfigError for a size of groups that is not a positive integer."""
  if not isinstance(group, int) or isinstance(group, bool) or group < 1:
    raise ConfigError(f"{owner}.group: found {group!r}, expected an integer of at least 1")


def in_groups(w: jax.Array, group: int) -> jax.Array:
  """w [..., in, out] as float32 [..., out, in / group, group]; QuantError where group does not divide in."""
  *leading, D, F = w.shape
  if D % group:
    near = max(n for n in range(1, min(group, D) + 1) if D % n == 0)
    raise QuantError(
      f"found the shape {tuple(w.shape)}, whose {D} rows groups of {group} do not divide; take group={near}, or leave it out "
      "by a rule"
    )
  return jnp.swapaxes(w, -1, -2).astype(jnp.float32).reshape(*leading, F, D // group, group)


def held(scale: jax.Array) -> jax.Array:
  """The scale as it is held, 1 up to LEAST: such a group counts as zeros."""
  scale = scale.astype(SCALE)
  return jnp.where(scale > LEAST, scale, 1)


@dataclasses.dataclass(frozen=True)
class Groups:
  """w ~ scale (n - zero) with a scale for each `group` weights of a column, one after the other along in.

  Symmetric: n - zero = round(w / scale) in [-m, m], scale = max |w| / m, m = 2^(bits - 1) - 1 (7 or 3); zero is 2^(bits - 1)
  for all.  Not symmetric: n in [0, 2^bits - 1], scale = (max w - min w) / (2^bits - 1) over a range that is made to hold 0,
  zero = round(-min w / scale), a byte a group: 0 is exact.
  Every weight is off by scale / 2 at most; not symmetric, by 2^bits / 256 of a scale more at the ends of the range, as scales
  are bfloat16.  Bits an element, all counted: bits + 16 / group, and 8 / group more where not symmetric (4.125 and 4.1875).
  A group whose scale would be 2.4e-38 or less counts as zeros, with a scale of 1.
  Columns share bytes: two of 4 bits, and of 3 bits four have their lower two in a byte and eight their third.
  In `product` a weight is rounded to the type of the rows that it meets: within 2^-8 for bfloat16, which is exact in neither.
  Raises ConfigError for other settings, and QuantError for a weight whose in `group` does not divide, or whose out 2 (4 bits)
  or 8 (3 bits) do not.
  Source: round-to-nearest of Frantar et al. (2022), GPTQ, section 4 (not symmetric); Dettmers et al. (2022), section 2.1.
  """

  bits: int = 4
  group: int = 128
  symmetric: bool = True
  converts: ClassVar[str] = "columns"

  def __post_init__(self):
    check_choice(self, "bits", (4, 3))
    check_choice(self, "symmetric", (True, False))
    check_group(self.group, "Groups")

  @property
  def step(self) -> int:
    """How many columns of the weight fill bytes."""
    return max(8 // bits for _, bits in FIELDS[self.bits])

  def quantize(self, w: jax.Array) -> dict[str, jax.Array]:
    """The parts of w [..., in, out]."""
    if w.shape[-1] % self.step:
      raise QuantError(
        f"found the shape {tuple(w.shape)}, expected a multiple of {self.step} columns, which share bytes of {self.bits} bits "
        "each; leave it out by a rule, or give it another scheme"
      )
    w_FGg = in_groups(w, self.group)
    top, middle = 2**self.bits - 1, 2 ** (self.bits - 1)
    if self.symmetric:
      scale_FG = held(jnp.max(jnp.abs(w_FGg), axis=-1) / (middle - 1))
      zero_FG, least = jnp.full_like(scale_FG, middle), 1
    else:
      low_FG, high_FG = jnp.minimum(jnp.min(w_FGg, axis=-1), 0), jnp.maximum(jnp.max(w_FGg, axis=-1), 0)
      scale_FG = held((high_FG - low_FG) / top)
      zero_FG, least = jnp.clip(jnp.round(-low_FG / scale_FG.astype(jnp.float32)), 0, top), 0
    n = jnp.round(w_FGg / scale_FG.astype(jnp.float32)[..., None]) + zero_FG.astype(jnp.float32)[..., None]
    n_FD = jnp.clip(n, least, top).astype(jnp.uint8).reshape(*w_FGg.shape[:-2], -1)
    parts = {"scale": scale_FG} if self.symmetric else {"scale": scale_FG, "zero": zero_FG.astype(jnp.uint8)}
    for name, bits in FIELDS[self.bits]:
      parts[name] = packing.pack(n_FD & (2**bits - 1), bits)
      n_FD = n_FD >> bits
    return parts

  def shape(self, parts: Mapping[str, jax.Array]) -> tuple[int, ...]:
    """[..., in, out] of the weight."""
    *leading, F, _ = parts["scale"].shape
    return (*leading, parts["value"].shape[-1], F)

  def dequantize(self, parts: Mapping[str, jax.Array]) -> jax.Array:
    """The weight, float32 [..., in, out]."""
    *leading, D, F = self.shape(parts)
    w_FD = jnp.stack([self._rows(parts, k) for k in range(self.step)], axis=-2).reshape(*leading, F, D)
    return jnp.swapaxes(w_FD, -1, -2)

  def product(self, x_CD: jax.Array, parts: Mapping[str, jax.Array]) -> jax.Array:
    """x w, float32 [C, F], for each of the columns that share a byte a product of its own: nothing is put in order but y.

    Bytes are so read once a product, from a cache: of one row by 1024 x 2816, all columns in one product take 14 times as long
    (4.2 ms for 0.28, as XLA writes the numbers down first), and bytes that are multiplied as they are 0.21 ms.
    """
    one = lambda k: unpacked((x_CD, self._rows(parts, k)))
    return jnp.stack([one(k) for k in range(self.step)], axis=1).reshape(-1, len(x_CD)).T

  def _rows(self, parts: Mapping[str, jax.Array], k: int) -> jax.Array:
    """Columns k, k + step, ... of the weight as rows, float32."""
    n_FD, at = 0, 0
    for name, bits in FIELDS[self.bits]:
      n_FD, at = n_FD | packing.rows(parts[name], bits, k, self.step) << at, at + bits
    cut = lambda part_FG: part_FG[..., k :: self.step, :, None].astype(jnp.float32)
    zero = 2.0 ** (self.bits - 1) if self.symmetric else cut(parts["zero"])
    n_FGg = n_FD.astype(jnp.float32).reshape(*n_FD.shape[:-1], -1, self.group)
    return ((n_FGg - zero) * cut(parts["scale"])).reshape(n_FD.shape)
