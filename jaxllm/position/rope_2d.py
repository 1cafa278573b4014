"""Two-dimensional RoPE of ChatGLM-6B, and the positions of GLM prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import ConfigError, DataError
from jaxllm.position.rope import Rope, base_power, rotate
from jaxllm.position.tables import Table


@dataclasses.dataclass(frozen=True)
class Rope2d(Rope):
  """2-D RoPE: the first half of a head is turned by the position, the second by the block position.

  Each half has R/2 coordinates and is a RoPE of its own, inv_freq_i = base ** (-2 i / (R/2)), i < R/4; `layout` is that
  within a half ("half" in ChatGLM-6B).  Positions are [B, T, 2], (position, block position) on the last axis; [B, T] means
  block position 0, which leaves the second half as it is.  `frequencies` gives those of the first half, then those of the
  second, [R/2].  Raises ConfigError for a rotary_dim (None: the head) that is no multiple of 4.
  Source: Du et al. (2022), GLM, section 2.1 (two position ids); ChatGLM-6B's published code.
  """

  two_dimensional: ClassVar[bool] = True
  rotary_multiple: ClassVar[int] = 4

  def __post_init__(self):
    super().__post_init__()
    if self.rotary_dim is not None and self.rotary_dim % 4:
      raise ConfigError(f"Rope2d.rotary_dim: found {self.rotary_dim!r}, expected a multiple of 4, or None")

  def frequencies(self, rotary_dim: int, seq_len: int | None = None) -> tuple[np.ndarray, float]:
    return np.tile(base_power(self.base, rotary_dim // 2), 2), 1.0

  def rotate_q(self, q_BTNH: jax.Array, pos: jax.Array, table: Table) -> jax.Array:
    if pos.ndim == 2:
      pos = jnp.stack([pos, jnp.zeros_like(pos)], axis=-1)
    half = table.rotary_dim // 2
    turned = []
    for axis, pairs in enumerate((slice(None, half // 2), slice(half // 2, None))):
      part = q_BTNH[..., axis * half : (axis + 1) * half]
      turned.append(rotate(part, *table.pairs(pairs).cos_sin(pos[..., axis]), self.layout))
    return jnp.concatenate([*turned, q_BTNH[..., 2 * half :]], axis=-1)

  rotate_k = rotate_q


def glm_positions(
  ids: Sequence[int], *, bos: int, mask: int, gmask: int, two_dimensional: bool = True
) -> np.ndarray:
  """Positions of one GLM prompt or text, int32 on the host: [T, 2] for ChatGLM-6B, [T] for GLM-130B.

  ids: context with a [gMASK] or [MASK], then `bos` (GLM-130B's [sop]), then what is generated.  m is the place of the first
  [gMASK], or of the first [MASK] if there is none, and c that of `bos`:

    two_dimensional (ChatGLM-6B): position t for t < c and m from c on; block position 0 for t < c, then 1, 2, 3, ...
    otherwise (GLM-130B): [gMASK] has positions 0, 1, 2, ...; with [MASK] all from c on have position m.

  Raises DataError where there is no `bos`, or no mask before it.  Source: ChatGLM-6B's and GLM-130B's published code.
  """
  ids = np.asarray(ids)
  T = len(ids)
  if not np.any(ids == bos):
    raise DataError(f"glm_positions: found no bos = {bos} in the {T} ids, expected one after the context")
  context = int(np.argmax(ids == bos))
  kind = next((token for token in (gmask, mask) if np.any(ids[:context] == token)), None)
  if kind is None:
    raise DataError(
      f"glm_positions: found neither gmask = {gmask} nor mask = {mask} before bos, expected one of them"
    )
  pos = np.arange(T, dtype=np.int32)
  if two_dimensional or kind == mask:
    pos[context:] = np.argmax(ids == kind)
  if not two_dimensional:
    return pos
  return np.stack([pos, np.maximum(np.arange(T, dtype=np.int32) - context + 1, 0)], axis=-1)


def next_glm_positions(positions: np.ndarray, count: int = 1) -> np.ndarray:
  """Positions of the next `count` tokens after those of `glm_positions`: int32 [count, 2] or [count].

  The frozen position stays and the block position counts on; GLM-130B's count on after [gMASK] and stay after [MASK].
  """
  ahead = np.arange(1, count + 1, dtype=np.int32)
  last = positions[-1]
  if positions.ndim == 2:
    return np.stack([np.full(count, last[0], np.int32), last[1] + ahead], axis=-1)
  frozen = last < len(positions) - 1
  return np.full(count, last, np.int32) if frozen else last + ahead
