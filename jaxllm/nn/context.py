"""What a call of the model knows beside its tokens: their order and positions, and the keys and values seen before."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxllm.config import ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.nn.cache import Cache, Place
from jaxllm.ops.attention import Side
from jaxllm.position import Position
from jaxllm.position.base import Params
from jaxllm.position.tables import PositionTables, Table


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
  """Order and positions of the tokens of one call; None means the usual: index counts on from the cache, pos = index.

  index_BT: order in the sequence, which masks use.  pos_BT: what position methods rotate by, or pos [B, T, 2] for those of two
  dimensions: position and block position.  segment_BT: the sequence each token of a packed row belongs to.  valid_BT: False
  for right padding, which the cache then does not count.  prefix_B: how many leading tokens see each other in both directions
  (prefix-LM), or prefix [B, T] in packed rows: where, by index, the prefix of each token's own sequence ends; all of it must be
  in one call, as no later call changes it.  Source of the prefix: Raffel et al. (2020), section 3.2.1.
  """

  index: jax.Array | None = None
  pos: jax.Array | None = None
  segment: jax.Array | None = None
  valid: jax.Array | None = None
  prefix: jax.Array | None = None


def sides(
  context: Context, cache: Cache | None, shape: tuple[int, int]
) -> tuple[Side, tuple[Place, ...], Cache | None]:
  """(queries, the places of their keys and of those before, the cache moved on) of a call on tokens of `shape` (B, T).

  Without a cache the queries' own side is the keys' one, and there are no places.
  """
  start = jnp.zeros((1,), jnp.int32) if cache is None else cache.length
  index = (
    context.index
    if context.index is not None
    else start[:, None] + jnp.arange(shape[1], dtype=jnp.int32)[None]
  )
  pos, block = _positions(context.pos, index)
  prefix = context.prefix
  if prefix is not None and prefix.ndim == 1:
    prefix = jnp.broadcast_to(prefix[:, None], (prefix.shape[0], shape[1]))
  in_order = context.index is None and (cache is None or cache.fresh)
  queries = Side(index, pos, context.segment, context.valid, block, prefix, in_order)
  if cache is None:
    return queries, (), None
  if context.index is not None or context.segment is not None:
    raise ConfigError(
      "context: index and segment cannot be given with a cache, whose slots are the order of one sequence"
    )
  moved, places = cache.move(jnp.broadcast_to(pos, shape), context.valid)
  return queries, places, moved


def _positions(pos: jax.Array | None, index: jax.Array) -> tuple[jax.Array, jax.Array | None]:
  """(positions, block positions or None) of what a context gives: nothing, [B, T] or [B, T, 2]."""
  if pos is None:
    return index, None
  if pos.ndim == 2:
    return pos, None
  if pos.ndim != 3 or pos.shape[-1] != 2:
    raise ConfigError(f"context.pos: found shape {pos.shape}, expected [B, T], or [B, T, 2]")
  return pos[..., 0], pos[..., 1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shared:
  """What all layers of one call share: the queries' side, the position tables, and learned position parameters."""

  q_side: Side
  tables: PositionTables
  learned: tuple[Params, ...]

  def of(self, cfg: ModelConfig, position: Position) -> tuple[Table | None, Params]:
    """(the table, the parameters) of one method, where it has any."""
    table = self.tables.ropes[cfg.ropes.index(position)] if position in cfg.ropes else None
    methods = cfg.learned_positions
    return table, self.learned[methods.index(position)] if position in methods else {}
