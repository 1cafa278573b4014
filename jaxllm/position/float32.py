"""Frequencies as transformers computes them on a CPU: the same float32 operations in the same order, in NumPy.

They are up to a few units in the last place from the exact ones, and an angle is their product with the position: equal logits
at long positions need equal frequencies, bit for bit.  Beside the order of operations, this matters:

  a float64 number in a float32 operation is rounded to float32 first (Python's numbers beside tensors and arrays alike);
  torch has c / x as (1 / x) * c, two roundings;
  its power is not the nearest number to the truth (`sleef`).

Source: transformers' modeling_rope_utils.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from jaxllm.position.rope import DynamicNtkRope, NtkRope, PiRope, Rope, YarnRope, correction_range
from jaxllm.position.scalings import Llama3Rope, LongRope, ProportionalRope
from jaxllm.position.sleef import powf

Frequencies = tuple[np.ndarray, float]


def frequencies(rope: Rope, rotary_dim: int, seq_len: int | None = None) -> Frequencies:
  """(inv_freq [R/2] float32, scale on cos and sin) of a RoPE, as `Rope.frequencies`.

  Of a method that transformers does not have, its float64 frequencies, rounded.
  """
  compute = COMPUTED.get(type(rope).frequencies)
  if compute is None:
    inv_freq, scale = rope.frequencies(rotary_dim, seq_len)
    return inv_freq.astype(np.float32), scale
  return compute(rope, rotary_dim, seq_len)


def base_powers(base: float | np.float32, rotary_dim: int, count: int | None = None) -> np.ndarray:
  """base ** (2 i / R) for i = 0 .. count - 1, float32; all R/2 of them for None."""
  i = np.arange(rotary_dim // 2 if count is None else count, dtype=np.float32)
  return powf(base, 2 * i / np.float32(rotary_dim))


def _inverse(x: np.ndarray, numerator: float = 1.0) -> np.ndarray:
  """numerator / x as torch has it."""
  return (np.float32(1) / x) * np.float32(numerator)


def _rope(rope: Rope, rotary_dim: int, seq_len: int | None) -> Frequencies:
  return _inverse(base_powers(rope.base, rotary_dim)), 1.0


def _pi(rope: PiRope, rotary_dim: int, seq_len: int | None) -> Frequencies:
  return _inverse(base_powers(rope.base, rotary_dim)) / np.float32(rope.factor), 1.0


def _ntk(rope: NtkRope, rotary_dim: int, seq_len: int | None) -> Frequencies:
  base = rope.base * rope.factor ** (rotary_dim / (rotary_dim - 2))
  return _inverse(base_powers(base, rotary_dim)), 1.0


def _proportional(rope: ProportionalRope, rotary_dim: int, seq_len: int | None) -> Frequencies:
  exact, _ = rope.frequencies(rotary_dim, seq_len)  # 0 for what stands still
  turned = _inverse(base_powers(rope.base, rotary_dim, np.count_nonzero(exact))) / np.float32(rope.factor)
  return np.pad(turned, (0, len(exact) - len(turned))), 1.0


def _dynamic(rope: DynamicNtkRope, rotary_dim: int, seq_len: int | None) -> Frequencies:
  factor, L0, exponent = rope.factor, rope.original_length, rotary_dim / max(rotary_dim - 2, 1)
  if seq_len is None or seq_len <= L0:  # from the start, in Python's floats
    base = rope.base * ((factor * L0 / L0) - (factor - 1)) ** exponent
  else:  # within a call, where the length is a tensor
    stretch = np.float32(factor) * np.float32(seq_len) / np.float32(L0) - np.float32(factor - 1)
    base = np.float32(rope.base) * np.float32(
      float(stretch) ** exponent
    )  # one number, whose power is a float64
  return _inverse(base_powers(base, rotary_dim)), 1.0


def _yarn(rope: YarnRope, rotary_dim: int, seq_len: int | None) -> Frequencies:
  powers = base_powers(rope.base, rotary_dim)
  turns = (rope.original_length, rotary_dim, rope.beta_fast, rope.beta_slow)
  low, high = correction_range(rope.base, *turns, rope.truncate)
  high = high + 0.001 if low == high else high
  pair = np.arange(rotary_dim // 2, dtype=np.float32)
  kept = 1 - np.clip((pair - np.float32(low)) / np.float32(high - low), 0, 1)
  slow, fast = _inverse(np.float32(rope.factor) * powers), _inverse(powers)
  return slow * (1 - kept) + fast * kept, rope.attention_scale()


def _longrope(rope: LongRope, rotary_dim: int, seq_len: int | None) -> Frequencies:
  _, scale = rope.frequencies(rotary_dim, seq_len)
  factors = rope.factors(rotary_dim, seq_len).astype(np.float32)
  return _inverse(factors * base_powers(rope.base, rotary_dim)), scale


def _llama3(rope: Llama3Rope, rotary_dim: int, seq_len: int | None) -> Frequencies:
  inv_freq = _inverse(base_powers(rope.base, rotary_dim))
  L0, low, high, factor = rope.original_length, rope.low_freq_factor, rope.high_freq_factor, rope.factor
  wavelength = _inverse(inv_freq, 2 * math.pi)
  is_long = wavelength > np.float32(L0 / low)
  is_short = wavelength < np.float32(L0 / high)
  scaled = np.where(is_long, inv_freq / np.float32(factor), inv_freq)
  kept = (_inverse(wavelength, L0) - np.float32(low)) / np.float32(high - low)
  between = (1 - kept) * scaled / np.float32(factor) + kept * scaled
  return np.where(~is_short & ~is_long, between, scaled), 1.0


COMPUTED: dict[Callable, Callable[[Rope, int, int | None], Frequencies]] = {
  Rope.frequencies: _rope,
  PiRope.frequencies: _pi,
  NtkRope.frequencies: _ntk,
  ProportionalRope.frequencies: _proportional,
  DynamicNtkRope.frequencies: _dynamic,
  YarnRope.frequencies: _yarn,
  LongRope.frequencies: _longrope,
  Llama3Rope.frequencies: _llama3,
}
"""By what computes the float64 frequencies, which methods that turn otherwise (ReRoPE) take from another."""
