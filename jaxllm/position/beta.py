"""RoPE as a number system: positions as digits in base beta."""

from __future__ import annotations

from jaxllm.errors import ConfigError


def rope_beta(base: float, rotary_dim: int) -> float:
  """beta = base ** (2 / R): RoPE's angle of pair m (from 1) at position n is n / beta ** (m - 1).

  Digit m of n in base beta is floor(n / beta ** (m - 1)) mod beta: the same quotient, with a period of beta where the
  angle's cosine and sine have one of 2 pi.  So a longer context is a longer number: it wants more digits (extrapolation,
  whose new digits were never trained), a division of n (interpolation), or a larger base (NTK).
  Source: kexue.fm/archives/9675.
  """
  return base ** (2 / rotary_dim)


def beta_base(n: int, base: int, digits: int | None = None) -> list[int]:
  """The digits of n in an integer `base`, the most significant first: digit m from the right is n // base^(m-1) mod base.

  digits: how many to write, leading zeros included (None: as many as needed, at least one).  Raises ConfigError for a
  base below 2, a negative n, or one that takes more digits.  Source: kexue.fm/archives/9675.
  """
  if not isinstance(base, int) or base < 2:
    raise ConfigError(f"base: found {base!r}, expected an integer of at least 2")
  if n < 0:
    raise ConfigError(f"n: found {n}, expected an integer of at least 0")
  found = [n % base]
  while n := n // base:
    found.append(n % base)
  if digits is not None and len(found) > digits:
    raise ConfigError(f"digits: found {digits}, expected at least {len(found)} in base {base}")
  return [0] * ((digits or 0) - len(found)) + found[::-1]
