"""The dynamic type of 8 bits: seven decades of numbers in [-1, 1], the finer the larger they are."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.quant.rounding import reciprocal


def _levels() -> np.ndarray:
  """0, 1 and +-10^(i - 6) c for i in 0 ... 6, c the centres of 2^i equal parts of [0.1, 1]; sorted, float32 [256].

  To the bit as torch.linspace in float32 has them, from both ends by one rounding of a product and a sum.
  """
  low, out = np.float32(0.1), [0.0, 1.0]
  for i in range(7):
    j = np.arange(2**i + 1)
    step = np.float64((np.float32(1) - low) / np.float32(2**i))
    edges = np.where(j < len(j) // 2, np.float64(low) + step * j, 1 - step * (2**i - j)).astype(np.float32)
    centres = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (i - 6))
    out += [*centres, *-centres]
  return np.sort(np.array(out, np.float32))


LEVELS = _levels()
"""Source: Dettmers (2016), 8-bit approximations for parallelism in deep learning; Dettmers et al. (2022), 8-bit optimizers."""


def quantize(x: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
  """Indices n uint8 [..., N] and absmax [..., ceil(N / block)] with x ~ LEVELS[n] absmax, the nearest level.

  absmax = max |x| of each block of the last axis, whose last may be shorter.  Each number is off by absmax / 142 at most, and
  those near 0 by far less.
  """
  *leading, size = x.shape
  x_Qb = jnp.pad(x, [(0, 0)] * len(leading) + [(0, -size % block)]).reshape(*leading, -1, block)
  absmax_Q1 = jnp.max(jnp.abs(x_Qb), axis=-1, keepdims=True)
  thresholds = (LEVELS[:-1] + LEVELS[1:]) / np.float32(2)
  n_Qb = jnp.searchsorted(thresholds, x_Qb * reciprocal(absmax_Q1)).astype(jnp.uint8)
  return n_Qb.reshape(*leading, -1)[..., :size], absmax_Q1[..., 0]
