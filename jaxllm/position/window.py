"""Methods that change the relative position itself beyond a window, so that no distance is unseen."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import ConfigError, check_positive
from jaxllm.ops.attention import MASKED
from jaxllm.position.base import Params, inner_products
from jaxllm.position.rope import Rope, rotate
from jaxllm.position.tables import Table

REACH = 30.0
"""Largest exponent of xPos's factor on a query, |i - middle| |ln zeta| / scale_base.  A key's is clipped at twice that,
which cannot be seen: below, the product is under e^-30; above, the key is later than every query.  Unclipped, it overflows."""


@dataclasses.dataclass(frozen=True)
class WindowRope(Rope):
  """RoPE within `window` tokens of the query and something else beyond: what its subclasses have in common.

  `window` None is a part of original_length.  The cache holds unrotated keys.
  """

  window: int | None = None

  needs_raw_keys: ClassVar[bool] = True
  window_part: ClassVar[int] = 2
  """Where no window is given, it is original_length divided by this."""
  table_rows: ClassVar[int] = 1
  """The rows of its table."""

  def __post_init__(self):
    super().__post_init__()
    name = type(self).__name__
    if self.window is None and self.original_length is None:
      raise ConfigError(
        f"{name}.window: found None, expected an integer (or an original_length to take it from)"
      )
    if self.window is not None and (type(self.window) is not int or self.window < 1):
      raise ConfigError(f"{name}.window: found {self.window!r}, expected an integer of at least 1")

  @property
  def clip(self) -> int:
    """The first relative position that is not RoPE's own."""
    return self.window if self.window is not None else max(1, self.original_length // self.window_part)

  def scores(self, q_BTNH, k_BSKH, q_pos_BT, k_pos_BS, table: Table, p: Params) -> jax.Array:
    if table.rows != self.table_rows:
      expected = "one for" if self.table_rows == 1 else f"the {self.table_rows} of"
      raise ConfigError(
        f"rope: found a table of {table.rows} rows, expected {expected} {type(self).__name__}; make it by rope_tables of a "
        "config with this method, or pin one length with rope_tables(seq_len=...)"
      )
    near = super().scores(q_BTNH, k_BSKH, q_pos_BT, k_pos_BS, table.only(0), p)
    far = self.far_scores(q_BTNH, k_BSKH, q_pos_BT, k_pos_BS, table)
    is_near_BTS = q_pos_BT[:, :, None] - k_pos_BS[:, None, :] < self.clip
    return jnp.where(is_near_BTS[:, None, None], near, far)

  def far_scores(self, q_BTNH, k_BSKH, q_pos_BT, k_pos_BS, table: Table) -> jax.Array:
    """Scores of the keys that are `clip` or more tokens back, float32 [B, K, G, T, S]."""
    raise NotImplementedError

  def turn(self, x: jax.Array, pos: jax.Array, table: Table) -> jax.Array:
    """x [B, T, heads, H] turned by positions [B or 1, T or 1] with the one row of `table`."""
    return rotate(x, *table.cos_sin(pos), self.layout)


@dataclasses.dataclass(frozen=True)
class ReRope(WindowRope):
  """Rectified RoPE: the relative position i - j becomes min(i - j, window).

  score_ij = (R_i q) . (R_j k) where i - j < window, else (R_window q) . k: with rotations that act on q and k both, the far
  branch turns the query by +window and leaves the key.  `window` None is half of original_length.
  Source: kexue.fm/archives/9708.
  """

  def far_scores(self, q_BTNH, k_BSKH, q_pos_BT, k_pos_BS, table: Table) -> jax.Array:
    # cos and sin carry the table's scale; the queries of the far branch carry that of the unturned keys too, which is on the
    # turned coordinates only
    cos, sin = (x * table.scale[0] for x in table.cos_sin(jnp.full((1, 1), self.clip, jnp.int32)))
    return inner_products(rotate(q_BTNH, cos, sin, self.layout), k_BSKH)


@dataclasses.dataclass(frozen=True)
class StepRope(WindowRope):
  """Relative positions that grow by `step` a token beyond the window: w + step (i - j - w).

  The far branch turns queries and keys by positions with frequencies times step, and the query once more by the angle of
  w (1 - step); its table has three rows, for RoPE, for that and for the one angle, all exact at every position.
  """

  table_rows: ClassVar[int] = 3

  @property
  def step(self) -> float:
    """How much the relative position grows a token beyond the window."""
    raise NotImplementedError

  def rows(self, rotary_dim, max_len=None, seq_len=None, frequencies=None):
    inv_freq, scale = (frequencies or self.frequencies)(rotary_dim, seq_len)
    offset = (self.clip * (1 - self.step) * inv_freq) % (2 * math.pi)  # one angle: the row is turned by 1
    return 0, [(inv_freq, scale), (inv_freq * self.step, scale), (offset, 1.0)]

  def far_scores(self, q_BTNH, k_BSKH, q_pos_BT, k_pos_BS, table: Table) -> jax.Array:
    q_far = self.turn(q_BTNH.astype(jnp.float32), q_pos_BT, table.only(1))
    q_far = self.turn(q_far, jnp.ones((1, 1), jnp.int32), table.only(2))
    return inner_products(q_far.astype(q_BTNH.dtype), self.turn(k_BSKH, k_pos_BS, table.only(1)))


@dataclasses.dataclass(frozen=True)
class LeakyReRope(StepRope):
  """Leaky ReRoPE: beyond the window the relative position grows by 1 / leak a token, w + (i - j - w) / leak.

  leak 1 is RoPE and leak infinity ReRoPE; 8 to 64 are published.  `window` None is half of original_length.
  Source: kexue.fm/archives/9708 (there k).
  """

  leak: float = 16.0

  def __post_init__(self):
    super().__post_init__()
    check_positive(self, leak=self.leak)

  @property
  def step(self) -> float:
    return 1.0 / self.leak


@dataclasses.dataclass(frozen=True)
class InvLeakyReRope(StepRope):
  """Inverse leaky ReRoPE, to train with: beyond the window positions grow by 2 factor a token, so a short text covers far ones.

  The step is 2 factor: with `window` None, a quarter of original_length, L0 trained tokens span (1 + 6 factor) / 4 times L0.
  At test time the model runs as plain RoPE, at no extra cost, on contexts up to `factor` times the trained length.
  factor 1/2 is RoPE.  Source: kexue.fm, "Transformer upgrade 13" (leaky ReRoPE with k = 1 / (2 b), b the factor).
  """

  factor: float = 8.0

  window_part: ClassVar[int] = 4

  def __post_init__(self):
    super().__post_init__()
    check_positive(self, factor=self.factor)

  @property
  def step(self) -> float:
    return 2.0 * self.factor


@dataclasses.dataclass(frozen=True)
class SelfExtendRope(WindowRope):
  """Self-Extend: beyond the window the relative position is that of groups of `group` tokens.

  With w the window and G the group it is floor(i / G) - floor(j / G) + w - floor(w / G); group 1 is RoPE.  With L0 =
  original_length, contexts up to (L0 - w) G + w are served, by the paper's rule: no relative position is above L0 there.
  `group` None is the smallest for factor * L0 tokens, ceil((factor L0 - w) / (L0 - w)); `window` None is half of L0.
  Source: Jin et al. (2024), "LLM Maybe LongLM", section 3.
  """

  factor: float = 1.0
  group: int | None = None

  def __post_init__(self):
    super().__post_init__()
    check_positive(self, factor=self.factor)
    if self.group is not None and (type(self.group) is not int or self.group < 1):
      raise ConfigError(
        f"SelfExtendRope.group: found {self.group!r}, expected an integer of at least 1, or None"
      )
    if self.group is None and (self.original_length is None or self.original_length <= self.clip):
      raise ConfigError(
        "SelfExtendRope.group: found None, expected an integer (or an original_length above the window, to choose one by)"
      )

  @property
  def size(self) -> int:
    """Tokens of a group."""
    if self.group is not None:
      return self.group
    L0, w = self.original_length, self.clip
    return max(1, math.ceil((self.factor * L0 - w) / (L0 - w)))

  def far_scores(self, q_BTNH, k_BSKH, q_pos_BT, k_pos_BS, table: Table) -> jax.Array:
    w, G = self.clip, self.size
    q_far = self.turn(q_BTNH, q_pos_BT // G + (w - w // G), table)
    return inner_products(q_far, self.turn(k_BSKH, k_pos_BS // G, table))


@dataclasses.dataclass(frozen=True)
class StreamingRope(WindowRope):
  """StreamingLLM: each query sees the first `sinks` tokens and the `window` nearest ones, at their places in such a cache.

  Relative positions to the window are RoPE's own; to sink j it is min(i, sinks + window - 1) - j, so none is beyond
  sinks + window.  `window` None is original_length less the sinks.  Source: Xiao et al. (2023), section 3.2.
  """

  sinks: int = 4

  def __post_init__(self):
    super().__post_init__()
    if type(self.sinks) is not int or self.sinks < 0:
      raise ConfigError(f"StreamingRope.sinks: found {self.sinks!r}, expected an integer of at least 0")
    if self.window is None and self.sinks >= self.original_length:
      raise ConfigError(
        f"StreamingRope.sinks: found {self.sinks!r}, expected fewer than original_length = {self.original_length}, or a window"
      )

  @property
  def clip(self) -> int:
    return self.window if self.window is not None else self.original_length - self.sinks

  @property
  def seen(self) -> tuple[int, int]:
    """The sinks and the window."""
    return self.sinks, self.clip

  def scores(self, q_BTNH, k_BSKH, q_pos_BT, k_pos_BS, table: Table, p: Params) -> jax.Array:
    # a sink is as far as the cache reaches even where it is near the window's end: not a matter of distance alone
    near = Rope.scores(self, q_BTNH, k_BSKH, q_pos_BT, k_pos_BS, table, p)
    q_sink = self.turn(q_BTNH, jnp.minimum(q_pos_BT, self.sinks + self.clip - 1), table)
    sink = inner_products(q_sink, self.turn(k_BSKH, k_pos_BS, table))
    is_sink = (k_pos_BS < self.sinks)[:, None, None, None, :]
    is_near_BTS = q_pos_BT[:, :, None] - k_pos_BS[:, None, :] < self.clip
    return jnp.where(is_sink, sink, jnp.where(is_near_BTS[:, None, None], near, MASKED))


@dataclasses.dataclass(frozen=True)
class XPosRope(Rope):
  """xPos: RoPE whose pairs also decay with the distance.

  score_ij = sum_c zeta_c ** ((i - j) / scale_base) (R_i q)_c . (R_j k)_c, zeta_c = (2 c / R + gamma) / (1 + gamma).  Only i - j
  enters, so the factors of query and key are counted from the middle of the T queries at hand, T / 2 before the last: counted
  from position 0 they leave float32 at 36,000 tokens, and from the middle of the text, as in the authors' code, at 72,000,
  with a middle that moves while decoding.  Positions may jump within the T queries (a document packed behind the end of
  another) by REACH scale_base / |ln zeta_0|, 12,000 tokens by default; by more, the decay of the earlier ones is lost.
  Source: Sun et al. (2022), section 3.2.
  """

  scale_base: float = 512.0
  gamma: float = 0.4

  needs_raw_keys: ClassVar[bool] = True

  def __post_init__(self):
    super().__post_init__()
    check_positive(self, scale_base=self.scale_base, gamma=self.gamma)

  def log_zeta(self, rotary_dim: int) -> np.ndarray:
    """ln(zeta_c) / scale_base, float64 [R/2]: what a pair's product falls by, a token of distance."""
    zeta = (np.arange(0, rotary_dim, 2) / rotary_dim + self.gamma) / (1 + self.gamma)
    return np.log(zeta) / self.scale_base

  def scores(self, q_BTNH, k_BSKH, q_pos_BT, k_pos_BS, table: Table, p: Params) -> jax.Array:
    log_zeta = self.log_zeta(table.rotary_dim)
    T = q_BTNH.shape[1]
    if T > 1 and T * np.max(np.abs(log_zeta)) > 2 * REACH:
      halves = (slice(0, T // 2), slice(T // 2, T))
      parts = [self.scores(q_BTNH[:, h], k_BSKH, q_pos_BT[:, h], k_pos_BS, table, p) for h in halves]
      return jnp.concatenate(parts, axis=-2)
    middle_B1 = jnp.max(q_pos_BT, axis=1, keepdims=True) - T // 2  # padding, if any, is at position 0

    def turn(x, pos, distance):
      cos, sin = table.cos_sin(pos)
      exponent = distance.astype(jnp.float32)[..., None] * log_zeta.astype(np.float32)[None, None]
      decay = jnp.exp(jnp.clip(exponent, -2 * REACH, 2 * REACH))
      return rotate(x.astype(jnp.float32), cos * decay, sin * decay, self.layout)

    q = turn(q_BTNH, q_pos_BT, q_pos_BT - middle_B1)
    return inner_products(q, turn(k_BSKH, k_pos_BS, middle_B1 - k_pos_BS))
