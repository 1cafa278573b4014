"""Rotary position embedding and its scalings: each scaling overrides `frequencies`, and nothing else."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import ConfigError, check_positive
from jaxllm.ops.einsum import einsum
from jaxllm.position.base import Params, Position, inner_products
from jaxllm.position.tables import Table

LAYOUTS = ("half", "interleaved")


def base_power(base: float, rotary_dim: int) -> np.ndarray:
  """base ** (-2 i / rotary_dim) for i = 0 .. rotary_dim / 2 - 1, float64."""
  return float(base) ** (-np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)


@dataclasses.dataclass(frozen=True)
class Rope(Position):
  """RoPE: pairs of each query and key turned by pos * inv_freq_i, inv_freq_i = base ** (-2 i / R).

  (R_m q) . (R_n k) depends on n - m only.  `layout` says which coordinates pair up: "half" (i, i + R/2), as in GPT-NeoX and
  Hugging Face's Llama, or "interleaved" (2i, 2i + 1), as in the paper; they are equal up to a permutation of the rows of the
  query and key projections.  `rotary_dim` (None: the whole head) counts from the first coordinate; the rest is untouched.
  `original_length` is the trained length, which some scalings need.  Source: Su et al. (2021), section 3.
  """

  base: float = 10000.0
  rotary_dim: int | None = None
  layout: str = "half"
  original_length: int | None = None

  needs_original_length: ClassVar[bool] = False
  rotary_multiple: ClassVar[int] = 2
  """What rotary_dim is a multiple of."""

  def __post_init__(self):
    check_positive(self, base=self.base)
    name = type(self).__name__
    if self.base <= 1:
      raise ConfigError(f"{name}.base: found {self.base!r}, expected a number above 1")
    if self.layout not in LAYOUTS:
      raise ConfigError(f"{name}.layout: found {self.layout!r}, expected one of {', '.join(LAYOUTS)}")
    rotary_dim = self.rotary_dim
    if rotary_dim is not None and (not isinstance(rotary_dim, int) or rotary_dim < 2 or rotary_dim % 2):
      raise ConfigError(
        f"{name}.rotary_dim: found {rotary_dim!r}, expected an even integer of at least 2, or None"
      )
    length = self.original_length
    if length is None and self.needs_original_length:
      raise ConfigError(f"{name}.original_length: found None, expected the length the model was trained at")
    if length is not None and (not isinstance(length, int) or isinstance(length, bool) or length < 1):
      raise ConfigError(
        f"{name}.original_length: found {length!r}, expected an integer of at least 1, or None"
      )

  def frequencies(self, rotary_dim: int, seq_len: int | None = None) -> tuple[np.ndarray, float]:
    return base_power(self.base, rotary_dim), 1.0

  def seq_lens(self, max_len: int | None) -> tuple[int, Sequence[int | None]]:
    """(start, lengths): the distinct lengths whose frequencies differ; row j serves the query at position start + j - 1."""
    return 0, (None,)

  def rows(
    self,
    rotary_dim: int,
    max_len: int | None = None,
    seq_len: int | None = None,
    frequencies: Callable[[int, int | None], tuple[np.ndarray, float]] | None = None,
  ) -> tuple[int, list[tuple[np.ndarray, float]]]:
    """(start, rows) of this method's Table: a row for each of `seq_lens`, or the one of a pinned length.

    frequencies: another function in place of the method's own.
    """
    start, lengths = (0, (seq_len,)) if seq_len is not None else self.seq_lens(max_len)
    return start, [(frequencies or self.frequencies)(rotary_dim, length) for length in lengths]

  @property
  def program(self) -> str | None:
    """The class whose hooks turn queries and keys otherwise than RoPE; None where the frequencies are all that differs."""
    hooks = {"rotate_q", "rotate_k", "scores", "far_scores"}
    owner = next(cls for cls in type(self).__mro__ if hooks & set(vars(cls)))
    return None if owner is Rope else owner.__name__

  def reach(self, max_len: int | None) -> int | None:
    """The longest context that the lengths of `seq_lens` serve; None is any."""
    return None

  def rotate_q(self, q_BTNH: jax.Array, pos_BT: jax.Array, table: Table) -> jax.Array:
    return rotate(q_BTNH, *table.cos_sin(pos_BT), self.layout)

  def rotate_k(self, k_BSKH: jax.Array, pos_BS: jax.Array, table: Table) -> jax.Array:
    return rotate(k_BSKH, *table.cos_sin(pos_BS), self.layout)

  def scores(self, q_BTNH, k_BSKH, q_pos_BT, k_pos_BS, table: Table, p: Params) -> jax.Array:
    if table.rows == 1:
      return super().scores(q_BTNH, k_BSKH, q_pos_BT, k_pos_BS, table, p)
    if table.rows == 2:
      return self._two_row_scores(q_BTNH, k_BSKH, q_pos_BT, k_pos_BS, table)
    return self._row_wise_scores(q_BTNH, k_BSKH, q_pos_BT, k_pos_BS, table)

  def _two_row_scores(self, q_BTNH, k_BSKH, q_pos_BT, k_pos_BS, table: Table) -> jax.Array:
    """Both rows for all queries, and each query's own of the two: two inner products instead of a rotation a query."""
    first, second = (
      inner_products(
        rotate(q_BTNH, *one.cos_sin(q_pos_BT), self.layout),
        rotate(k_BSKH, *one.cos_sin(k_pos_BS), self.layout),
      )
      for one in (table.only(0), table.only(1))
    )
    # the context of position p has p + 1 tokens; as p >= start nothing leaves int32
    return jnp.where((q_pos_BT >= table.start)[:, None, None, :, None], second, first)

  def _row_wise_scores(self, q_BTNH, k_BSKH, q_pos_BT, k_pos_BS, table: Table) -> jax.Array:
    """Every query turns itself and all its keys by the frequencies of its own length: one query row at a time."""
    K = k_BSKH.shape[2]

    def one_row(q_row):
      q_BNH, q_pos_B = q_row
      B, N, H = q_BNH.shape
      row = table.row(q_pos_B)  # leaves [B or 1, R/2]
      # the scale of the key is on the query too: one row of work, and like its own on the turned coordinates only
      cos, sin = (x * row.scale[:, None] ** 2 for x in row.turns(q_pos_B))
      q_BNH = rotate(q_BNH[:, None], cos[:, None], sin[:, None], self.layout)[:, 0]
      k_rotated = rotate(k_BSKH, *row.at(np.s_[:, None]).turns(k_pos_BS), self.layout)
      return einsum("BKGH,BSKH->BKGS", q_BNH.reshape(B, K, N // K, H), k_rotated)

    rows = (jnp.moveaxis(q_BTNH, 1, 0), jnp.moveaxis(q_pos_BT, 1, 0))
    return jnp.moveaxis(jax.lax.map(one_row, rows), 0, 3)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, layout: str) -> jax.Array:
  """Turn the first 2 * cos.shape[-1] coordinates of x [B, T, heads, H] by angles [B or 1, T, R/2], in float32."""
  rotary_dim = 2 * cos.shape[-1]
  if rotary_dim > x.shape[-1]:
    raise ConfigError(f"rotary_dim: found {rotary_dim}, expected at most head_dim = {x.shape[-1]}")
  turned, rest = x[..., :rotary_dim].astype(jnp.float32), x[..., rotary_dim:]
  # with the two coordinates of a pair on an axis of their own, a turn is x cos + swap(x) (-sin, sin): no concatenation, which
  # compilers for CPUs turn into a branch an element
  shape, axis = ((2, rotary_dim // 2), -2) if layout == "half" else ((rotary_dim // 2, 2), -1)
  pairs = turned.reshape(*x.shape[:-1], *shape)
  cos, sin = (jnp.stack(both, axis)[..., None, :, :] for both in ((cos, cos), (-sin, sin)))
  out = (pairs * cos + jnp.flip(pairs, axis) * sin).reshape(turned.shape).astype(x.dtype)
  return jnp.concatenate([out, rest], axis=-1) if rest.shape[-1] else out


@dataclasses.dataclass(frozen=True)
class ScaledRope(Rope):
  """RoPE stretched by `factor`, the multiple of the trained length that the context is to reach."""

  factor: float = 1.0

  def __post_init__(self):
    super().__post_init__()
    check_positive(self, factor=self.factor)


@dataclasses.dataclass(frozen=True)
class PiRope(ScaledRope):
  """Position interpolation: inv_freq_i / factor, which is positions divided by factor.  Source: Chen et al. (2023)."""

  def frequencies(self, rotary_dim: int, seq_len: int | None = None) -> tuple[np.ndarray, float]:
    return base_power(self.base, rotary_dim) / self.factor, 1.0


@dataclasses.dataclass(frozen=True)
class NtkOldRope(ScaledRope):
  """NTK by base conversion: base' = base * factor.  The last frequency falls by factor ** ((R - 2) / R) only.

  Source: kexue.fm/archives/9675 (a base-beta code covers factor times as many numbers when beta grows by factor ** (2 / R)).
  """

  def frequencies(self, rotary_dim: int, seq_len: int | None = None) -> tuple[np.ndarray, float]:
    return base_power(self.base * self.factor, rotary_dim), 1.0


@dataclasses.dataclass(frozen=True)
class NtkRope(ScaledRope):
  """NTK-aware RoPE: raise the base, so that only the low frequencies stretch.

  base' = base * factor ** (R / (R - 2)): the first frequency is unchanged and the last is divided by exactly `factor`.
  Source: bloc97 (2023), "NTK-Aware Scaled RoPE".
  """

  def frequencies(self, rotary_dim: int, seq_len: int | None = None) -> tuple[np.ndarray, float]:
    return ntk_power(self.base, self.factor, rotary_dim), 1.0


def ntk_power(base: float, factor: float, rotary_dim: int) -> np.ndarray:
  """Frequencies of base * factor ** (R / (R - 2)), written so that the last is exactly base_power / factor."""
  return base_power(base, rotary_dim) * ntk_ratio(factor, rotary_dim)


def ntk_ratio(factor: float, rotary_dim: int) -> np.ndarray:
  """factor ** (-2 i / (R - 2)): what NTK-aware scaling multiplies each frequency by, 1 to 1 / factor."""
  i = np.arange(rotary_dim // 2, dtype=np.float64)
  # a single pair has no lower frequency to stretch instead: its exponent is 0
  return float(factor) ** (-2 * i / max(rotary_dim - 2, 1))


@dataclasses.dataclass(frozen=True)
class NtkFixedRope(ScaledRope):
  """NTK-RoPE-fixed: inv_freq_i * factor ** (-2 (i + 1) / R), each digit's base raised from the first one on.

  Source: kexue.fm/archives/9706.
  """

  def frequencies(self, rotary_dim: int, seq_len: int | None = None) -> tuple[np.ndarray, float]:
    digit = np.arange(1, rotary_dim // 2 + 1, dtype=np.float64)
    return base_power(self.base, rotary_dim) * self.factor ** (-2 * digit / rotary_dim), 1.0


@dataclasses.dataclass(frozen=True)
class NtkMixedRope(ScaledRope):
  """NTK-RoPE-mixed: inv_freq_i * exp(-a (i + 1) ** exponent), a = ln(factor) / (R / 2) ** exponent.

  exponent 1 is ntk_fixed and 0 is pi; 0.625 is the author's choice.  Source: kexue.fm/archives/9706.
  """

  exponent: float = 0.625

  def __post_init__(self):
    super().__post_init__()
    if not 0 <= self.exponent <= 1:
      raise ConfigError(f"NtkMixedRope.exponent: found {self.exponent!r}, expected a number from 0 to 1")

  def frequencies(self, rotary_dim: int, seq_len: int | None = None) -> tuple[np.ndarray, float]:
    fraction = np.arange(1, rotary_dim // 2 + 1, dtype=np.float64) / (rotary_dim // 2)
    return base_power(self.base, rotary_dim) * self.factor ** -(fraction**self.exponent), 1.0


@dataclasses.dataclass(frozen=True)
class DynamicNtkRope(ScaledRope):
  """Dynamic NTK: NTK-aware with factor' = factor * L / L0 - (factor - 1), L = max(seq_len, L0), L0 = original_length.

  Up to L0 it is plain RoPE.  Here L is the length of each query's own context, position + 1, so a decoded token sees what a
  full forward pass shows it; the key cache therefore holds unrotated keys.  Source: emozilla (2023), "Dynamically scaled
  RoPE"; transformers' `dynamic`, which recomputes the whole sequence under one length instead.
  """

  needs_raw_keys: ClassVar[bool] = True
  needs_original_length: ClassVar[bool] = True

  def frequencies(self, rotary_dim: int, seq_len: int | None = None) -> tuple[np.ndarray, float]:
    if seq_len is None or seq_len <= self.original_length:
      return base_power(self.base, rotary_dim), 1.0
    factor = self.factor * seq_len / self.original_length - (self.factor - 1)
    return ntk_power(self.base, factor, rotary_dim), 1.0

  def seq_lens(self, max_len: int | None) -> tuple[int, Sequence[int | None]]:
    if max_len is None:
      raise ConfigError(
        "dynamic_ntk: its frequencies depend on the length; give max_len, or seq_len to pin one"
      )
    return self.original_length, range(self.original_length, self.reach(max_len) + 1)

  def reach(self, max_len: int | None) -> int | None:
    return max(max_len, self.original_length)


@dataclasses.dataclass(frozen=True)
class YarnRope(ScaledRope):
  """YaRN: high frequencies kept, low ones interpolated, a ramp between, and an attention temperature on cos and sin.

  c(r) = R ln(L0 / (2 pi r)) / (2 ln base) is the pair that turns r times in the trained length L0.
  ramp_i = clip((i - low) / (high - low), 0, 1), low = c(beta_fast), high = c(beta_slow), floored and ceiled if `truncate`;
  inv_freq'_i = inv_freq_i * (ramp_i / factor + 1 - ramp_i).  scale = attention_factor, else g(mscale) / g(mscale_all_dim)
  where both are given, else g(1), with g(m) = 0.1 m ln(factor) + 1 (1 for factor <= 1).
  As published, an L0 so short that high < 0 (with beta_slow 1, up to 5 tokens) leaves every frequency as it is.
  Source: Peng et al. (2023), sections 3.2-3.4; fields as in the authors' and DeepSeek's configurations.
  """

  beta_fast: float = 32.0
  beta_slow: float = 1.0
  mscale: float | None = None
  mscale_all_dim: float | None = None
  attention_factor: float | None = None
  truncate: bool = True

  needs_original_length: ClassVar[bool] = True

  def __post_init__(self):
    super().__post_init__()
    check_positive(self, beta_fast=self.beta_fast, beta_slow=self.beta_slow)
    if self.beta_fast <= self.beta_slow:
      raise ConfigError(
        f"YarnRope.beta_fast: found {self.beta_fast!r}, expected more than beta_slow = {self.beta_slow!r}"
      )
    if self.attention_factor is not None:
      check_positive(self, attention_factor=self.attention_factor)
    for name in ("mscale", "mscale_all_dim"):
      if getattr(self, name):  # 0 is "not given" in published configurations, as None is
        check_positive(self, **{name: getattr(self, name)})

  def attention_scale(self) -> float:
    """The temperature that multiplies cos and sin, so the scores get its square."""

    def g(m: float) -> float:
      return 0.1 * m * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    if self.attention_factor is not None:
      return float(self.attention_factor)
    if self.mscale and self.mscale_all_dim:
      return g(self.mscale) / g(self.mscale_all_dim)
    return g(1.0)

  def frequencies(self, rotary_dim: int, seq_len: int | None = None) -> tuple[np.ndarray, float]:
    turns = (self.original_length, rotary_dim, self.beta_fast, self.beta_slow)
    interpolated = ramp(*correction_range(self.base, *turns, self.truncate), rotary_dim)
    stretch = interpolated / self.factor + (1 - interpolated)
    return base_power(self.base, rotary_dim) * stretch, self.attention_scale()


def correction_range(
  base: float,
  original_length: int,
  rotary_dim: int,
  beta_fast: float,
  beta_slow: float,
  truncate: bool = True,
) -> tuple[float, float]:
  """(low, high): the pairs that turn beta_fast and beta_slow times in the trained length, kept within [0, R - 1]."""
  low, high = (
    rotary_dim * math.log(original_length / (2 * math.pi * turns)) / (2 * math.log(base))
    for turns in (beta_fast, beta_slow)
  )
  if truncate:
    low, high = math.floor(low), math.ceil(high)
  return max(low, 0), min(high, rotary_dim - 1)  # R - 1, not R / 2 - 1: as published


def ramp(low: float, high: float, rotary_dim: int) -> np.ndarray:
  """clip((i - low) / (high - low), 0, 1) for every pair i, float64 [R / 2]: 0 for high frequencies, 1 for low ones."""
  high = high + 0.001 if low == high else high  # as published: no division by zero
  return np.clip((np.arange(rotary_dim // 2, dtype=np.float64) - low) / (high - low), 0, 1)
