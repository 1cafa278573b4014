"""Weights and activations of 8 bits, multiplied as integers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxllm.errors import QuantError
from jaxllm.ops.device import current_device
from jaxllm.quant.int8 import LARGEST, Int8, integers

MOST = (2**31 - 1) // LARGEST**2
"""So many products of two numbers are sure to fit an int32: 133,144."""


def check_sum(w: jax.Array, terms: int) -> None:
  """Raise QuantError where the sum of so many products may not fit."""
  if terms > MOST:
    raise QuantError(
      f"found the shape {tuple(w.shape)}, a sum of {terms} products, expected at most {MOST}, which an int32 holds; leave it "
      "out by a rule"
    )


def per_token(x_CD: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(n int8 [C, D], scale float32 [C, 1]) of rows: n = round(x 127 / max |x|) in [-127, 127], scale = max |x| / 127.

  A row of max |x| up to 6e-36 counts as zeros (`int8.integers`).
  """
  x_CD = x_CD.astype(jnp.float32)
  n_CD, scale_C1 = integers(x_CD, jnp.max(jnp.abs(x_CD), axis=-1, keepdims=True))
  return n_CD.astype(jnp.int8), scale_C1


def dot(n_CD: jax.Array, value_FD: jax.Array) -> jax.Array:
  """n value^T of int8, exact, int32 [C, F]; one row as two on a CPU, where XLA has a faster product for them.

  Two cores with AVX-512 VNNI, 1024 x 2816, ms for 1, 8, 128 and 1024 rows, quantizing them included, the least of readings in
  turns beside other work: 0.28, 0.41, 2.8 and 31; float32 0.40, 0.86, 4.7 and 60; torch's bfloat16 0.48, 0.58, 2.2 and 26.
  Unsigned numbers, int16 and int32 have no such product: 2.2 ms or more for 8 rows.
  """
  rows = len(n_CD)
  if rows == 1 and current_device().platform == "cpu":
    n_CD = jnp.broadcast_to(n_CD, (2, n_CD.shape[1]))
  y_CF = jax.lax.dot_general(n_CD, value_FD, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
  return y_CF[:rows]


@dataclasses.dataclass(frozen=True)
class W8A8:
  """y = scale_token scale_column sum_d n_d m_d: rows quantized as they come (`per_token`), weights by column (`Int8`).

  The sum is of integers in an int32 and so exact, whatever the order, rows a batch or devices are.
  Raises QuantError for a weight of more than 133,144 rows.
  Source: the vector-wise quantization of Dettmers et al. (2022), LLM.int8(), section 2.1.
  """

  converts: ClassVar[bool] = False

  def quantize(self, w: jax.Array) -> dict[str, jax.Array]:
    """The parts of w [..., in, out]."""
    check_sum(w, w.shape[-2])
    return Int8().quantize(w)

  def shape(self, parts: Mapping[str, jax.Array]) -> tuple[int, ...]:
    """[..., in, out] of the weight."""
    return Int8().shape(parts)

  def dequantize(self, parts: Mapping[str, jax.Array]) -> jax.Array:
    """The weight, float32 [..., in, out]."""
    return Int8().dequantize(parts)

  def product(self, x_CD: jax.Array, parts: Mapping[str, jax.Array]) -> jax.Array:
    """x w with x quantized by row, float32 [C, F]."""
    n_CD, scale_C1 = per_token(x_CD)
    return dot(n_CD, parts["value"]).astype(jnp.float32) * parts["scale"].T * scale_C1  # rows may be 1e38
