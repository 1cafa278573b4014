"""Arithmetic to the last bit, where XLA's is not."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def half(x: jax.Array) -> jax.Array:
  """x rounded to half precision, float32: XLA's own quotients of float16 are not rounded to the nearest on a CPU.

  The barrier is for the rounding, which XLA may leave out between two conversions.
  """
  return jax.lax.optimization_barrier(x.astype(jnp.float16)).astype(jnp.float32)


def quotient(x: jax.Array, divisor: float) -> jax.Array:
  """x / divisor of numbers that are not negative: by a constant, XLA multiplies with its reciprocal, which rounds twice."""
  return x / jnp.where(x > 0, jnp.asarray(divisor, x.dtype), 1)


def reciprocal(x: jax.Array) -> jax.Array:
  """1 / x of numbers that are not negative, and 0 for 0."""
  return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1), 0)
