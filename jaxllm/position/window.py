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
from jaxllm.position.tables import RopeTable


@dataclasses.dataclass(frozen=True)
class WindowRope(Rope):
  """RoPE within `window` tokens of the query and something else beyond: what its subclasses have in common.

  `window` None is a part of original_length.  The cache holds unrotated keys.
  """

  window: int | None = None

  needs_raw_keys: ClassVar[bool] = True
  window_part: ClassVar[int] = 2
  """original_length is divided by this where no window is given."""

  def __post_init__(self):
    super().__post_init__()
    name = type(self).__name__
    if self.window is None and self.original_length is None:
      raise ConfigError(
        f"{name}.window: found None, expected an integer (or original_length, whose 1/{self.window_part} is the window)"
      )
    if self.window is not None and (type(self.window) is not int or self.window < 1):
      raise ConfigError(f"{name}.window: found {self.window!r}, expected an integer of at least 1")

  @property
  def clip(self) -> int:
    """The first relative position that is not RoPE's own."""
    return self.window if self.window is not None else max(1, self.original_length // self.window_part)

  def scores(self, q_BTNH, k_BSKH, q_pos_BT, k_pos_BS, table: RopeTable, p: Params) -> jax.Array:
    near = super().scores(q_BTNH, k_BSKH, q_pos_BT, k_pos_BS, table.only(0), p)
    far = self.far_scores(q_BTNH, k_BSKH, q_pos_BT, k_pos_BS, table)
    is_near_BTS = q_pos_BT[:, :, None] - k_pos_BS[:, None, :] < self.clip
    return jnp.where(is_near_BTS[:, None, None], near, far)

  def far_scores(self, q_BTNH, k_BSKH, q_pos_BT, k_pos_BS, table: RopeTable) -> jax.Array:
    """Scores of the keys that are `clip` or more tokens back, float32 [B, K, G, T, S]."""
    raise NotImplementedError

  def turn(self, x: jax.Array, pos: jax.Array, table: RopeTable) -> jax.Array:
    """x [B, T, heads, H] turned by positions [B or 1, T or 1] with the one row of `table`."""
    return rotate(x, *table.cos_sin(pos), self.layout)


@dataclasses.dataclass(frozen=True)
class ReRope(WindowRope):
  """Rectified RoPE: the relative position i - j becomes min(i - j, window).

  score_ij = (R_i q) . (R_j k) where i - j < window, else (R_window q) . k: with rotations that act on q and k both, the far
  branch turns the query by +window and leaves the key.  `window` None is half of original_length.
  Source: kexue.fm/archives/9708.
  """

  def far_scores(self, q_BTNH, k_BSKH, q_pos_BT, k_pos_BS, table: RopeTable) -> jax.Array:
    q_far = self.turn(q_BTNH, jnp.full((1, 1), self.clip, jnp.int32), table)
    # cos and sin carry the table's scale; the unturned keys of the far branch must carry theirs
    return inner_products(q_far, k_BSKH) * table.scale[0]


@dataclasses.dataclass(frozen=True)
class StepRope(WindowRope):
  """Relative positions that grow by `step` a token beyond the window: w + step (i - j - w).

  The far branch is two rotations, both exact at every position: by positions with frequencies times step, and the query once
  more by w (1 - step).
  """

  @property
  def step(self) -> float:
    """How much the relative position grows a token beyond the window."""
    raise NotImplementedError

  def rows(self, rotary_dim, max_len=None, seq_len=None):
    inv_freq, scale = self.frequencies(rotary_dim, seq_len)
    offset = (self.clip * (1 - self.step) * inv_freq) % (2 * math.pi)  # one angle: the row is turned by 1
    return 0, [(inv_freq, scale), (inv_freq * self.step, scale), (offset, 1.0)]

  def far_scores(self, q_BTNH, k_BSKH, q_pos_BT, k_pos_BS, table: RopeTable) -> jax.Array:
    q_far = self.turn(q_BTNH, q_pos_BT, table.only(1))
    q_far = self.turn(q_far, jnp.ones((1, 1), jnp.int32), table.only(2))
    return inner_products(q_far, self.turn(k_BSKH, k_pos_BS, table.only(1)))


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

  At test time the model runs as plain RoPE, at no extra cost, on contexts up to `factor` times the trained length.
  `window` None is a quarter of original_length.  Source: kexue.fm, "Transformer upgrade 13" (there k = 1 / (2 b)).
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
  """Self-Extend: beyond the window positions are those of groups of `group` tokens, floor(i / G) - floor(j / G) + w - floor(w / G).

  `group` None is the smallest that keeps factor * original_length tokens within the trained positions:
  ceil((factor L0 - w) / (L0 - w)).  `window` None is half of original_length.
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

  def far_scores(self, q_BTNH, k_BSKH, q_pos_BT, k_pos_BS, table: RopeTable) -> jax.Array:
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

  @property
  def clip(self) -> int:
    return self.window if self.window is not None else max(1, self.original_length - self.sinks)

  def scores(self, q_BTNH, k_BSKH, q_pos_BT, k_pos_BS, table: RopeTable, p: Params) -> jax.Array:
    # a sink is as far as the cache reaches even where it is near the window's end: not a matter of distance alone
    near = Rope.scores(self, q_BTNH, k_BSKH, q_pos_BT, k_pos_BS, table, p)
    q_sink = self.turn(q_BTNH, jnp.minimum(q_pos_BT, self.sinks + self.clip - 1), table)
    sink = inner_products(q_sink, self.turn(k_BSKH, k_pos_BS, table))
    is_sink = (k_pos_BS < self.sinks)[:, None, None, None, :]
    is_near_BTS = q_pos_BT[:, :, None] - k_pos_BS[:, None, :] < self.clip
    return jnp.where(is_sink, sink, jnp.where(is_near_BTS[:, None, None], near, MASKED))


@dataclasses.dataclass(frozen=True)
class XPosRope(Rope):
  """xPos: RoPE whose pairs also decay with the distance, score_ij = sum_c zeta_c ** ((i - j) / scale_base) (R_i q)_c . (R_j k)_c.

  zeta_c = (2 c / R + gamma) / (1 + gamma).  Only the difference i - j enters, so both factors are taken from the middle of
  the tile of queries at hand: taken from position 0, as in the authors' code, they leave float32 at some 35,000 tokens.
  Source: Sun et al. (2022), section 3.2.
  """

  scale_base: float = 512.0
  gamma: float = 0.4

  needs_raw_keys: ClassVar[bool] = True

  def __post_init__(self):
    super().__post_init__()
    check_positive(self, scale_base=self.scale_base, gamma=self.gamma)

  def scores(self, q_BTNH, k_BSKH, q_pos_BT, k_pos_BS, table: RopeTable, p: Params) -> jax.Array:
    rotary_dim = 2 * table.hi.shape[-1]
    zeta = (np.arange(0, rotary_dim, 2) / rotary_dim + self.gamma) / (1 + self.gamma)
    log_zeta = np.log(zeta).astype(np.float32)[None, None]
    middle_B1 = (jnp.min(q_pos_BT, axis=1, keepdims=True) + jnp.max(q_pos_BT, axis=1, keepdims=True)) // 2

    def turn(x, pos, distance):
      cos, sin = table.cos_sin(pos)
      # beyond e^60 the product of both factors is 0 or the pair is masked, and infinity times 0 would be NaN
      exponent = jnp.clip(distance.astype(jnp.float32)[..., None] / self.scale_base * log_zeta, -60, 60)
      return rotate(x.astype(jnp.float32), cos * jnp.exp(exponent), sin * jnp.exp(exponent), self.layout)

    q = turn(q_BTNH, q_pos_BT, q_pos_BT - middle_B1)
    return inner_products(q, turn(k_BSKH, k_pos_BS, middle_B1 - k_pos_BS))
