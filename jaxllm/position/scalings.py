"""RoPE scalings that treat each frequency by its wavelength, and those that published checkpoints bring their own numbers for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from jaxllm.errors import ConfigError, check_positive
from jaxllm.position.rope import Rope, ScaledRope, base_power, correction_range, ntk_power, ramp


@dataclasses.dataclass(frozen=True)
class NtkByPartsRope(ScaledRope):
  """NTK-by-parts: low frequencies interpolated, middle ones by the NTK base, high ones kept.

  Two ramps over the turns r that a pair makes in the trained length: from PI to NTK-aware as r rises through `beta_turns`, then to
  plain RoPE as it rises through `gamma_turns`.  Its successor YaRN has one ramp, from PI to plain RoPE, and a temperature.
  Source: bloc97 (2023), "NTK-by-parts", with the defaults of the YaRN authors' code.
  """

  beta_turns: tuple[float, float] = (0.75, 1.25)
  gamma_turns: tuple[float, float] = (2.0, 16.0)

  needs_original_length: ClassVar[bool] = True

  def __post_init__(self):
    super().__post_init__()
    for name in ("beta_turns", "gamma_turns"):
      slow, fast = _pair(self, name)
      check_positive(self, **{name: slow})
      if not slow < fast < math.inf:
        raise ConfigError(
          f"NtkByPartsRope.{name}: found {(slow, fast)!r}, expected (slow, fast), slow < fast"
        )

  def frequencies(self, rotary_dim: int, seq_len: int | None = None) -> tuple[np.ndarray, float]:
    plain = base_power(self.base, rotary_dim)

    def slow_part(turns: tuple[float, float]) -> np.ndarray:
      slow, fast = turns
      return ramp(*correction_range(self.base, self.original_length, rotary_dim, fast, slow), rotary_dim)

    interpolated = slow_part(self.beta_turns)
    low = plain / self.factor * interpolated + ntk_power(self.base, self.factor, rotary_dim) * (
      1 - interpolated
    )
    stretched = slow_part(self.gamma_turns)
    return low * stretched + plain * (1 - stretched), 1.0


@dataclasses.dataclass(frozen=True)
class Llama3Rope(ScaledRope):
  """Llama 3.1's scaling: wavelengths below L0 / high_freq_factor kept, above L0 / low_freq_factor divided by factor.

  Between them, with w = 2 pi / inv_freq and s = (L0 / w - low) / (high - low): inv_freq' = inv_freq (s + (1 - s) / factor).
  Source: Meta (2024), Llama 3.1's reference code; transformers' `llama3`.
  """

  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0

  needs_original_length: ClassVar[bool] = True

  def __post_init__(self):
    super().__post_init__()
    check_positive(self, low_freq_factor=self.low_freq_factor, high_freq_factor=self.high_freq_factor)
    if self.high_freq_factor <= self.low_freq_factor:
      raise ConfigError(
        f"Llama3Rope.high_freq_factor: found {self.high_freq_factor!r}, expected more than low_freq_factor = "
        f"{self.low_freq_factor!r}"
      )

  def frequencies(self, rotary_dim: int, seq_len: int | None = None) -> tuple[np.ndarray, float]:
    plain = base_power(self.base, rotary_dim)
    turns = self.original_length * plain / (2 * math.pi)
    kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
    kept = np.clip(kept, 0, 1)
    return plain * (kept + (1 - kept) / self.factor), 1.0


@dataclasses.dataclass(frozen=True)
class LongRope(ScaledRope):
  """LongRoPE: inv_freq_i / short_factor_i up to the trained length L0, inv_freq_i / long_factor_i for longer contexts.

  scale = attention_factor, else sqrt(1 + ln(factor) / ln(L0)) (1 for factor <= 1), for both.  The length is that of each
  query's own context, position + 1, so decoding across L0 gives what a full forward pass gives; the key cache therefore holds
  unrotated keys.  (transformers takes one list for a whole call, by its longest row.)  The factors come with a checkpoint, or
  from a search.  Source: Ding et al. (2024); transformers' `longrope`.
  """

  short_factor: tuple[float, ...] | None = None
  long_factor: tuple[float, ...] | None = None
  attention_factor: float | None = None

  needs_raw_keys: ClassVar[bool] = True
  needs_original_length: ClassVar[bool] = True

  def __post_init__(self):
    super().__post_init__()
    for name in ("short_factor", "long_factor"):
      values = getattr(self, name)
      if not isinstance(values, (tuple, list)) or not values:
        raise ConfigError(f"LongRope.{name}: found {values!r}, expected one number a pair of coordinates")
      object.__setattr__(self, name, tuple(values))  # JSON has lists
      for value in values:
        check_positive(self, **{name: value})
    if self.attention_factor is not None:
      check_positive(self, attention_factor=self.attention_factor)
    if self.original_length < 2:
      raise ConfigError("LongRope.original_length: found 1, expected at least 2, as its logarithm divides")

  def frequencies(self, rotary_dim: int, seq_len: int | None = None) -> tuple[np.ndarray, float]:
    name = "long_factor" if seq_len is not None and seq_len > self.original_length else "short_factor"
    factors = np.asarray(getattr(self, name), np.float64)
    if len(factors) != rotary_dim // 2:
      raise ConfigError(
        f"LongRope.{name}: found {len(factors)} numbers, expected {rotary_dim // 2}, one a pair of rotary_dim"
      )
    scale = self.attention_factor
    if scale is None:
      scale = (
        math.sqrt(1 + math.log(self.factor) / math.log(self.original_length)) if self.factor > 1 else 1.0
      )
    return base_power(self.base, rotary_dim) / factors, float(scale)

  def seq_lens(self, max_len: int | None) -> tuple[int, Sequence[int | None]]:
    return self.original_length, (self.original_length, self.original_length + 1)


@dataclasses.dataclass(frozen=True)
class ProportionalRope(ScaledRope):
  """Partial rotation by frequency: the first `proportion` of the pairs turn, the others stand still, all spread over R.

  inv_freq_i = base ** (-2 i / R) / factor for i < floor(proportion R / 2), else 0.  Unlike `rotary_dim`, which takes the first
  coordinates as a smaller head, the pairs here are those of the whole head.  Source: transformers' `proportional` (Gemma 4).
  """

  proportion: float = 1.0

  def __post_init__(self):
    super().__post_init__()
    check_positive(self, proportion=self.proportion)
    if self.proportion > 1:
      raise ConfigError(
        f"ProportionalRope.proportion: found {self.proportion!r}, expected a number of at most 1"
      )

  def frequencies(self, rotary_dim: int, seq_len: int | None = None) -> tuple[np.ndarray, float]:
    turned = np.arange(rotary_dim // 2) < int(self.proportion * rotary_dim // 2)
    return np.where(turned, base_power(self.base, rotary_dim) / self.factor, 0.0), 1.0


def _pair(owner: Rope, name: str) -> tuple[float, float]:
  """The two numbers of a field, which becomes a tuple (JSON has lists)."""
  value = getattr(owner, name)
  if not isinstance(value, (tuple, list)) or len(value) != 2:
    raise ConfigError(f"{type(owner).__name__}.{name}: found {value!r}, expected two numbers")
  object.__setattr__(owner, name, tuple(value))
  return tuple(value)
