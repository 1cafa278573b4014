"""Methods that change the relative position itself beyond a window, so that no distance is unseen."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxllm.errors import ConfigError
from jaxllm.position.base import Params, inner_products
from jaxllm.position.rope import Rope, rotate
from jaxllm.position.tables import RopeTable


@dataclasses.dataclass(frozen=True)
class ReRope(Rope):
  """Rectified RoPE: the relative position i - j becomes min(i - j, window).

  score_ij = (R_i q) . (R_j k) where i - j < window, else (R_window q) . k: with rotations that act on q and k both, the far
  branch turns the query by +window and leaves the key.  `window` None is half of original_length.  The cache holds unrotated
  keys.  Source: kexue.fm/archives/9708.
  """

  window: int | None = None

  needs_raw_keys: ClassVar[bool] = True

  def __post_init__(self):
    super().__post_init__()
    if self.window is None and self.original_length is None:
      raise ConfigError(
        "ReRope.window: found None, expected an integer (or original_length, whose half is the window)"
      )
    if self.window is not None and (type(self.window) is not int or self.window < 1):
      raise ConfigError(f"ReRope.window: found {self.window!r}, expected an integer of at least 1")

  @property
  def clip(self) -> int:
    """The largest relative position."""
    return self.window if self.window is not None else max(1, self.original_length // 2)

  def scores(self, q_BTNH, k_BSKH, q_pos_BT, k_pos_BS, table: RopeTable, p: Params) -> jax.Array:
    if table.rows > 1:
      raise ConfigError(
        f"rope: found a table of {table.rows} rows, expected one for {type(self).__name__}; pin one length with "
        "rope_tables(seq_len=...)"
      )
    near = super().scores(q_BTNH, k_BSKH, q_pos_BT, k_pos_BS, table, p)
    clip_pos = jnp.full((1, 1), self.clip, jnp.int32)
    # cos and sin carry the table's scale; the queries of the far branch carry that of the unturned keys too, which is on the
    # turned coordinates only
    cos, sin = (x * table.scale[0] for x in table.cos_sin(clip_pos))
    far = inner_products(rotate(q_BTNH, cos, sin, self.layout), k_BSKH)
    is_near_BTS = q_pos_BT[:, :, None] - k_pos_BS[:, None, :] < self.clip
    return jnp.where(is_near_BTS[:, None, None], near, far)
