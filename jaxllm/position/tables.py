"""What a position method needs on the device, as a pytree of arrays that a compiled program takes as data.

All methods that differ only in their frequencies, their scale and the scaling of queries have tables of one structure and one
set of shapes, so they run through one compiled program and can be batched by `jax.vmap`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.position import phase

STATIC = dict(static=True)


class Table:
  """Rows of frequencies, the row of a query at position p being clip(p + 1 - start, 0, rows - 1).

  scale (on cos and sin): float32 [rows]; start: int32, the length up to which row 0 holds.  A method whose frequencies do not
  depend on length has one row; one that turns by several (window.py) has a row for each.  reach: the longest context that
  the rows serve; program: the class whose hooks do more with the table than RoPE.  Both are None in all tables of fixed
  frequencies, which therefore have one structure.  Subclasses say how a frequency is held, and turn by it.
  """

  @property
  def held(self) -> dict[str, jax.Array]:
    """The fields that hold the frequencies, [rows, R/2] each."""
    raise NotImplementedError

  def turns(self, pos: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of positions [...] times frequencies that broadcast against [..., R/2], float32, without the scale."""
    raise NotImplementedError

  @property
  def rows(self) -> int:
    """The number of distinct rows; one means that a rotated key is good for every query."""
    return next(iter(self.held.values())).shape[0]

  @property
  def rotary_dim(self) -> int:
    """R, two coordinates a frequency."""
    return 2 * next(iter(self.held.values())).shape[-1]

  def at(self, rows: Any) -> Table:
    """The rows of an index, as a table of its own."""
    fields = self.held | {"scale": self.scale}
    return dataclasses.replace(
      self, **{name: x[rows] for name, x in fields.items()}, reach=None, program=None
    )

  def row(self, q_pos: jax.Array) -> Table:
    """The table rows of queries at `q_pos` [...], as a table whose leading axes are those of q_pos."""
    fields = {name: jnp.asarray(x) for name, x in (self.held | {"scale": self.scale}).items()}
    return dataclasses.replace(self, **fields).at(jnp.clip(q_pos + 1 - self.start, 0, self.rows - 1))

  def only(self, index: int) -> Table:
    """Row `index` as a table of its own."""
    return self.at(slice(index, index + 1))

  def pairs(self, part: slice) -> Table:
    """The frequencies of some pairs of coordinates, as a table of its own."""
    return dataclasses.replace(self, **{name: x[..., part] for name, x in self.held.items()})

  def cos_sin(self, pos: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every position [...], times the scale, float32 [..., R/2]; for a table of one row."""
    one = self.at(0)
    cos, sin = one.turns(pos)
    return cos * one.scale, sin * one.scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RopeTable(Table):
  """Frequencies as exact words (`phase.words`), hi and lo uint32 [rows, R/2]: angles without an error at any position."""

  hi: jax.Array
  lo: jax.Array
  scale: jax.Array
  start: jax.Array
  reach: int | None = dataclasses.field(default=None, metadata=STATIC)
  program: str | None = dataclasses.field(default=None, metadata=STATIC)

  @property
  def held(self):
    return {"hi": self.hi, "lo": self.lo}

  def turns(self, pos):
    return phase.cos_sin(pos, self.hi, self.lo)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Float32Table(Table):
  """Frequencies in float32 [rows, R/2], turning by the float32 product of position and frequency, as transformers does.

  The angle of position p is off by up to half a unit in the last place of p * inv_freq: 2e-3 at 32 thousand, 3e-2 at a million.
  Source: transformers' `rotary_emb` modules.
  """

  inv_freq: jax.Array
  scale: jax.Array
  start: jax.Array
  reach: int | None = dataclasses.field(default=None, metadata=STATIC)
  program: str | None = dataclasses.field(default=None, metadata=STATIC)

  @property
  def held(self):
    return {"inv_freq": self.inv_freq}

  def turns(self, pos):
    pos = jnp.asarray(pos).astype(jnp.float32)[..., None]
    inv_freq = jnp.asarray(self.inv_freq)
    return phase.cos_sin_of(pos * jnp.expand_dims(inv_freq, range(pos.ndim - inv_freq.ndim)))


def make_table(
  frequencies: list[tuple[np.ndarray, float]],
  start: int = 0,
  reach: int | None = None,
  program: str | None = None,
  precision: str = "exact",
) -> Table:
  """A table from rows of (inv_freq, scale) on the host: a RopeTable, or for precision "hf" a Float32Table."""
  inv_freq = np.stack([inv_freq for inv_freq, _ in frequencies])
  rest = (np.asarray([s for _, s in frequencies], np.float32), np.int32(start), reach, program)
  if precision == "hf":
    return Float32Table(inv_freq.astype(np.float32), *rest)
  return RopeTable(*phase.words(inv_freq), *rest)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QueryScale:
  """q *= max(floor, offset + slope ln(1 + floor(pos / step))): every method of query_scale.py as data.

  step: int32; slope, offset, floor: float32; windowed: whether layers with a window scale their queries too.  With slope 0,
  offset 0 and floor 1 it is no scaling at all, exactly.
  """

  step: jax.Array
  slope: jax.Array
  offset: jax.Array
  floor: jax.Array
  windowed: jax.Array

  def __call__(self, q_BTNH: jax.Array, pos_BT: jax.Array, window: int | None = None) -> jax.Array:
    """Queries of a layer times the factor of their positions."""
    # in float32: a half type has too few digits for the ratio of two logarithms
    log_n = jnp.log((pos_BT // self.step).astype(jnp.float32) + 1)
    factor_BT = jnp.maximum(self.floor, self.offset + log_n * self.slope)
    if window is not None:
      factor_BT = jnp.where(self.windowed, factor_BT, 1.0)
    return q_BTNH * factor_BT[..., None, None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PositionTables:
  """All position data of a model: one Table a distinct RoPE of `cfg.layers`, in order, and the query scale."""

  ropes: tuple[Table, ...]
  query_scale: QueryScale
