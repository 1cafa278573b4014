"""Numbers of few bits in bytes: those of neighbouring rows share one, so that a byte's neighbours are of one row."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def pack(u_FD: jax.Array, bits: int) -> jax.Array:
  """uint8 [..., F bits / 8, D] of numbers below 2^bits, [..., F, D]: row f is in byte f // n at bit bits (f % n), n = 8 / bits.

  bits divides 8, and n divides F.
  """
  *leading, F, D = u_FD.shape
  n = 8 // bits
  u = u_FD.astype(jnp.uint8).reshape(*leading, F // n, n, D)
  return sum(u[..., k, :] << (bits * k) for k in range(n)).astype(jnp.uint8)


def rows(packed: jax.Array, bits: int, first: int, step: int) -> jax.Array:
  """Rows first, first + step, ... of what `pack` took, uint8 [..., F / step, D]; step is a multiple of 8 / bits."""
  n = 8 // bits
  return (packed[..., first // n :: step // n, :] >> (bits * (first % n))) & (2**bits - 1)
