"""RoPE scalings by wavelength, and those that published checkpoints bring their own numbers for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from jaxllm.errors import ConfigError, check_positive
from jaxllm.position.rope import ScaledRope, base_power, correction_range, ntk_ratio, ramp


@dataclasses.dataclass(frozen=True)
class NtkByPartsRope(ScaledRope):
  """NTK-by-parts: low frequencies interpolated, middle ones by the NTK base, high ones kept.

  inv_freq'_i = inv_freq_i (g_i (b_i / factor + (1 - b_i) factor ** (-2 i / (R - 2))) + 1 - g_i): b and g are ramps from 0 to 1
  over the pairs that turn from fast down to slow times in the trained length, floored and ceiled as in YaRN.  b, over
  `beta_turns` = (slow, fast), leads from NTK-aware to PI, and g, over `gamma_turns`, from plain RoPE to these.  The successor,
  YaRN, has one ramp from plain RoPE to PI, and a temperature.
  Source: bloc97 (2023), "NTK-by-parts", with the defaults of the YaRN authors' code.
  """

  beta_turns: tuple[float, float] = (0.75, 1.25)
  gamma_turns: tuple[float, float] = (2.0, 16.0)

  needs_original_length: ClassVar[bool] = True

  def __post_init__(self):
    super().__post_init__()
    for name in ("beta_turns", "gamma_turns"):
      turns = getattr(self, name)
      numbers = isinstance(turns, (tuple, list)) and all(type(x) in (int, float) for x in turns)
      if not numbers or len(turns) != 2 or not 0 < turns[0] < turns[1] < math.inf:
        raise ConfigError(
          f"NtkByPartsRope.{name}: found {turns!r}, expected (slow, fast), two finite numbers with 0 < slow < fast"
        )
      object.__setattr__(self, name, tuple(turns))  # JSON has lists

  def frequencies(self, rotary_dim: int, seq_len: int | None = None) -> tuple[np.ndarray, float]:
    def slow_part(turns: tuple[float, float]) -> np.ndarray:
      slow, fast = turns
      return ramp(*correction_range(self.base, self.original_length, rotary_dim, fast, slow), rotary_dim)

    interpolated, stretched = slow_part(self.beta_turns), slow_part(self.gamma_turns)
    low = interpolated / self.factor + (1 - interpolated) * ntk_ratio(self.factor, rotary_dim)
    return base_power(self.base, rotary_dim) * (stretched * low + (1 - stretched)), 1.0


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
        raise ConfigError(
          f"LongRope.{name}: found {values!r}, expected a list of numbers, one a pair of coordinates"
        )
      object.__setattr__(self, name, tuple(values))  # JSON has lists
      for value in values:
        check_positive(self, **{name: value})
    if self.attention_factor is not None:
      check_positive(self, attention_factor=self.attention_factor)
    if self.original_length < 2:
      raise ConfigError("LongRope.original_length: found 1, expected at least 2 (its logarithm is a divisor)")

  def factors(self, rotary_dim: int, seq_len: int | None) -> np.ndarray:
    """The list of a length, float64 [R/2]; raises ConfigError where it is of another length."""
    name = "long_factor" if seq_len is not None and seq_len > self.original_length else "short_factor"
    factors = np.asarray(getattr(self, name), np.float64)
    if len(factors) != rotary_dim // 2:
      raise ConfigError(
        f"LongRope.{name}: found {len(factors)} numbers, expected {rotary_dim // 2}, one a pair of rotary_dim"
      )
    return factors

  def frequencies(self, rotary_dim: int, seq_len: int | None = None) -> tuple[np.ndarray, float]:
    factors = self.factors(rotary_dim, seq_len)
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
  coordinates as a smaller head, the pairs here are those of the whole head.  Raises ConfigError where no pair would turn.
  Source: transformers' `proportional` (Gemma 4).
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
    turned = int(self.proportion * rotary_dim // 2)
    if turned == 0:
      raise ConfigError(
        f"ProportionalRope.proportion: found {self.proportion!r}, which turns no pair of {rotary_dim} coordinates; "
        f"expected at least {2 / rotary_dim:g}"
      )
    still = np.arange(rotary_dim // 2) >= turned
    return np.where(still, 0.0, base_power(self.base, rotary_dim) / self.factor), 1.0
