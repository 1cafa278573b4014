"""Exact rotation angles at every position, without a table and without float64.

An angle pos * inv_freq is needed modulo 2 pi only.  The host turns f = inv_freq / (2 pi) (turns a position) into 64-bit
fixed point, hi * 2**-32 + lo * 2**-64; on the device the turns of a position are an integer product modulo 2**32:

  phase = pos * hi + mulhi(pos, lo)   (mod 2**32),   angle = 2 pi * phase / 2**32

The two top bits of the phase (after rounding) choose the quadrant, and what is left is an angle in [-pi/4, pi/4), where
float32 is good to half a unit in the last place.  cos and sin are within 1e-7 of the truth for positions 0 to 2**31 - 1
(1.1e-7 on a GPU, which rounds otherwise);
a float32 product pos * inv_freq is off by 2e-2 at a million, and a float64 one by 1.2e-7 at 2**31.

`cos_sin_of` does the same for an angle that is a float32 number, which is an integer of 24 bits times a power of two.
"""

from __future__ import annotations

import decimal
import itertools

import jax
import jax.numpy as jnp
import numpy as np

_FRACTION_BITS = 64
_CONSTANT_BITS = 192
_LIMB = 2**32 - 1


def _inverse_two_pi() -> int:
  """floor(2**192 / (2 pi)), from Machin's formula pi = 16 atan(1/5) - 4 atan(1/239) at 80 digits."""
  with decimal.localcontext() as context:
    context.prec = 80

    def atan_inverse(n: int) -> decimal.Decimal:
      total, power, k = decimal.Decimal(0), decimal.Decimal(1) / n, 1
      while abs(power) > decimal.Decimal(10) ** -80:
        total += power / k if k % 4 == 1 else -power / k
        power, k = power / (n * n), k + 2
      return total

    pi = 16 * atan_inverse(5) - 4 * atan_inverse(239)
    return int(decimal.Decimal(2) ** _CONSTANT_BITS / (2 * pi))


_INVERSE_TWO_PI = _inverse_two_pi()


def words(inv_freq: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """inv_freq / (2 pi) modulo 1 as two uint32 words (hi, lo) of the same shape.

  A float64 is an integer of 53 bits times a power of two, so the quotient is one product of integers, shifted: exact to
  2**-64 turns.  Integers are 32-bit limbs here, the least first.  inv_freq is finite and not negative.
  """
  mantissa, exponent = np.frexp(np.asarray(inv_freq, np.float64))
  integer = np.ldexp(mantissa, 53).astype(np.uint64)
  product = np.zeros((_CONSTANT_BITS // 32 + 5, *integer.shape), np.uint64)  # the last three stay 0
  for i, half in enumerate((integer & _LIMB, integer >> 32)):
    for j in range(_CONSTANT_BITS // 32):
      part = half * (_INVERSE_TWO_PI >> 32 * j & _LIMB)
      product[i + j] += part & _LIMB
      product[i + j + 1] += part >> 32
  for carry, limb in itertools.pairwise(product):
    limb += carry >> 32
    carry &= _LIMB
  shift = _CONSTANT_BITS + 53 - _FRACTION_BITS - exponent
  shift = np.clip(shift, 0, 32 * (len(product) - 3)).astype(np.uint64)
  first, bits = (shift >> 5).astype(np.intp), shift & 31
  a, b, c = (np.take_along_axis(product, (first + k)[None], axis=0)[0] for k in range(3))
  lo, hi = ((word >> bits & _LIMB).astype(np.uint32) for word in (a | b << 32, b | c << 32))
  return hi, lo


def _mulhi(a: jax.Array, b: jax.Array) -> jax.Array:
  """High 32 bits of the 64-bit product of two uint32 arrays, by 16-bit halves."""
  a1, a0 = a >> 16, a & 0xFFFF
  b1, b0 = b >> 16, b & 0xFFFF
  middle = a1 * b0 + ((a0 * b0) >> 16)  # at most (2**16 - 1)**2 + 2**16 - 2: no overflow
  return a1 * b1 + (middle >> 16) + ((a0 * b1 + (middle & 0xFFFF)) >> 16)


def phases(pos: jax.Array, hi: jax.Array, lo: jax.Array) -> jax.Array:
  """Turns of each position in units of 2**-32, uint32 [..., R/2]; pos [...] is int32 and not negative."""
  pos = jnp.asarray(pos).astype(jnp.uint32)[..., None]
  hi, lo = (jnp.expand_dims(word, range(pos.ndim - word.ndim)) for word in (hi, lo))
  return pos * hi + _mulhi(pos, lo)


def cos_sin(pos: jax.Array, hi: jax.Array, lo: jax.Array) -> tuple[jax.Array, jax.Array]:
  """cos and sin of pos * inv_freq, float32 [..., R/2], for the words (hi, lo) of inv_freq.

  Words that broadcast against pos[..., None] give every position frequencies of its own.
  """
  return _cos_sin(phases(pos, hi, lo))


_UNITS = words(np.ldexp(1.0, np.arange(256) - 150))
"""The words of the last bit of a float32 of every exponent field, 2 ** (field - 150): what its 24-bit integer counts."""


def cos_sin_of(angle: jax.Array) -> tuple[jax.Array, jax.Array]:
  """cos and sin of float32 angles (radians, finite and not negative), to 1e-7 of the truth however large they are.

  From the bits of the angle, so that no compiler can fuse the product that it was rounded from with what follows.
  """
  bits = jax.lax.bitcast_convert_type(angle, jnp.uint32)
  integer, field = (bits & 0x7FFFFF) | 0x800000, bits >> 23  # of 0 one bit too many, whose turns are none
  hi, lo = (jnp.asarray(word).at[field].get(mode="promise_in_bounds") for word in _UNITS)
  return _cos_sin(integer * hi + _mulhi(integer, lo))


def _cos_sin(phase: jax.Array) -> tuple[jax.Array, jax.Array]:
  """cos and sin of turns in units of 2**-32."""
  quadrant = (phase + jnp.uint32(2**29)) >> 30
  rest = jax.lax.bitcast_convert_type(phase - (quadrant << 30), jnp.int32)
  angle = rest.astype(jnp.float32) * jnp.float32(2 * np.pi / 2**32)  # in [-pi/4, pi/4)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  odd = (quadrant & 1) == 1
  x, y = jnp.where(odd, sin, cos), jnp.where(odd, cos, sin)
  return (
    jnp.where((quadrant == 1) | (quadrant == 2), -x, x),
    jnp.where((quadrant == 2) | (quadrant == 3), -y, y),
  )
