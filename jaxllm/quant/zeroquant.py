"""ZeroQuant: weights of 8 bits by groups, activations of 8 bits by token."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxllm.quant.groups import check_group, held, in_groups
from jaxllm.quant.int8 import LARGEST
from jaxllm.quant.w8a8 import check_sum, dot, per_token


@dataclasses.dataclass(frozen=True)
class ZeroQuant:
  """y = scale_token sum_g scale_g sum_{d in g} n_d m_d, g the groups of a column: integers within a group, floats between them.

  m = round(w / scale_g) in [-127, 127], scale_g = max |w| / 127 of `group` weights one after the other along in, as
  `groups.held` (8 + 16 / group bits an element); n and scale_token are those of `w8a8.per_token`.  A group at a time is
  multiplied, so that there is never more than one group's result.  One product of all groups as a batch is slower, and its
  copy of the numbers and results of all groups take as much memory as the weight's floats or more: ms for 1, 8, 64 and 512
  rows by 4096 x 4096, two cores of an EPYC with AVX-512 beside other work: 2.3, 3.3, 14 and 135 one after the other, 33, 6.4,
  39 and 356 at once.
  Raises ConfigError for a group that is no positive integer, QuantError for a weight whose in it does not divide.
  Source: Yao et al. (2022), ZeroQuant, sections 4.1 and 4.2, without its distillation.
  """

  group: int = 128
  converts: ClassVar[bool] = False

  def __post_init__(self):
    check_group(self.group, "ZeroQuant")

  def quantize(self, w: jax.Array) -> dict[str, jax.Array]:
    """The parts of w [..., in, out]."""
    check_sum(w, self.group)
    w_FGg = in_groups(w, self.group)
    scale_FG = held(jnp.max(jnp.abs(w_FGg), axis=-1) / LARGEST)
    # rounded, a scale is less by 1 / 257 at most: 127.5 is out of reach
    n = jnp.round(w_FGg / scale_FG.astype(jnp.float32)[..., None])
    return {"value": n.astype(jnp.int8).reshape(*w_FGg.shape[:-2], -1), "scale": scale_FG}

  def shape(self, parts: Mapping[str, jax.Array]) -> tuple[int, ...]:
    """[..., in, out] of the weight."""
    *leading, F, D = parts["value"].shape
    return (*leading, D, F)

  def dequantize(self, parts: Mapping[str, jax.Array]) -> jax.Array:
    """The weight, float32 [..., in, out]."""
    value, scale = (parts[name].astype(jnp.float32) for name in ("value", "scale"))
    w_FGg = value.reshape(*scale.shape, self.group) * scale[..., None]
    return jnp.swapaxes(w_FGg.reshape(value.shape), -1, -2)

  def product(self, x_CD: jax.Array, parts: Mapping[str, jax.Array]) -> jax.Array:
    """x w with x quantized by row, float32 [C, F]."""
    n_CD, scale_C1 = per_token(x_CD)
    F, G = parts["scale"].shape

    def add(i, y_CF):
      of = lambda n: jax.lax.dynamic_slice_in_dim(n, i * self.group, self.group, 1)
      scale_F1 = jax.lax.dynamic_slice_in_dim(parts["scale"], i, 1, 1).astype(jnp.float32)
      return y_CF + dot(of(n_CD), of(parts["value"])).astype(jnp.float32) * scale_F1.T

    return jax.lax.fori_loop(0, G, add, jnp.zeros((len(x_CD), F), jnp.float32)) * scale_C1
