"""What a position method needs on the device, as a pytree of arrays that a compiled program takes as data.

All methods that differ only in their frequencies, their scale and the log-n factor have tables of one structure and one
set of shapes, so they run through one compiled program and can be batched by `jax.vmap`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.position import phase


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RopeTable:
  """Frequencies of one RoPE: `rows` of exact words, the row of a query at position p being clip(p + 1 - start, 0, rows - 1).

  hi, lo: uint32 [rows, R/2]; scale (on cos and sin): float32 [rows]; start: int32, the length up to which row 0 holds.
  A method whose frequencies do not depend on length has one row; one that turns by several (window.py) has a row for each.
  the rows serve; program, the class whose hooks do more with the table than RoPE.  Both are None in all tables of
  fixed frequencies, which therefore have one structure.
  """

  hi: jax.Array
  lo: jax.Array
  scale: jax.Array
  start: jax.Array
  reach: int | None = dataclasses.field(default=None, metadata={"static": True})
  program: str | None = dataclasses.field(default=None, metadata={"static": True})

  @property
  def rows(self) -> int:
    """The number of distinct rows; one means that a rotated key is good for every query."""
    return self.hi.shape[0]

  def row(self, q_pos: jax.Array) -> RopeTable:
    """The table rows of queries at `q_pos` [...], as a table whose leading axes are those of q_pos."""
    index = jnp.clip(q_pos + 1 - self.start, 0, self.rows - 1)
    hi, lo, scale = (jnp.asarray(x)[index] for x in (self.hi, self.lo, self.scale))
    return RopeTable(hi, lo, scale, self.start)

  def only(self, index: int) -> RopeTable:
    """Row `index` as a table of its own."""
    one = slice(index, index + 1)
    return RopeTable(self.hi[one], self.lo[one], self.scale[one], self.start)

  def cos_sin(self, pos: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every position [...], times the scale, float32 [..., R/2]; for a table of one row."""
    cos, sin = phase.cos_sin(pos, self.hi[0], self.lo[0])
    return cos * self.scale[0], sin * self.scale[0]


def make_table(
  frequencies: list[tuple[np.ndarray, float]],
  start: int = 0,
  reach: int | None = None,
  program: str | None = None,
) -> RopeTable:
  """A table from rows of (inv_freq, scale) on the host."""
  hi, lo = phase.words(np.stack([inv_freq for inv_freq, _ in frequencies]))
  scale = np.asarray([s for _, s in frequencies], np.float32)
  return RopeTable(hi, lo, scale, np.int32(start), reach, program)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QueryScale:
  """q *= max(floor, ln(pos + 1) * inverse_log): log-n as data.  floor 1 and inverse_log 0 is no scaling at all, exactly."""

  inverse_log: jax.Array
  floor: jax.Array

  def __call__(self, q_BTNH: jax.Array, pos_BT: jax.Array) -> jax.Array:
    """Queries times the factor of their positions."""
    log_n = jnp.log(
      pos_BT.astype(jnp.float32) + 1
    )  # in float32: a half type has too few digits for the ratio
    factor_BT = jnp.maximum(self.floor, log_n * self.inverse_log)
    return q_BTNH * factor_BT[..., None, None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PositionTables:
  """All position data of a model: one RopeTable a distinct RoPE of `cfg.layers`, in order, and the query scale."""

  ropes: tuple[RopeTable, ...]
  query_scale: QueryScale
