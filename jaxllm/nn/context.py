"""What a call of the model knows beside its tokens: their order and positions, and the keys and values seen before."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxllm.config import ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.ops.attention import Side
from jaxllm.ops.constrain import constrain
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
  (prefix-LM); all of them must be in one call, as no later call changes them.  Source of the prefix: Raffel et al. (2020),
  section 3.2.1.
  """

  index: jax.Array | None = None
  pos: jax.Array | None = None
  segment: jax.Array | None = None
  valid: jax.Array | None = None
  prefix: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """Keys and values of the tokens so far: slot j of a row holds the token of index j, and slots from length on are unused.

  k, v: a [B, S, K, H] array a layer (keys unrotated where the position method needs them so); pos_BS: positions of the
  slots (the first of two: keys are turned by both before they are cached); length_B: how many tokens each row holds, so a
  row does not depend on the batch it is in.
  """

  k: tuple[jax.Array, ...]
  v: tuple[jax.Array, ...]
  pos: jax.Array
  length: jax.Array

  @property
  def capacity(self) -> int:
    """How many tokens a row can hold."""
    return self.pos.shape[1]

  def check_room(self, new_tokens: int) -> None:
    """Raise ConfigError if `new_tokens` more do not fit; on the host, as a write past the end is silently dropped."""
    longest = int(jnp.max(self.length))
    if longest + new_tokens > self.capacity:
      raise ConfigError(
        f"cache: {longest} tokens and {new_tokens} more do not fit in {self.capacity} slots; make it larger (init_cache)"
      )


def init_cache(cfg: ModelConfig, batch: int, capacity: int) -> Cache:
  """An empty cache for `capacity` tokens a row; raises ConfigError for more than a learned table has positions."""
  cfg.check_length(capacity, "cache capacity")
  shape = (batch, capacity, cfg.num_kv_heads, cfg.head_dim)
  empty = lambda: tuple(constrain(jnp.zeros(shape, cfg.dtype), "BSKH") for _ in range(cfg.num_layers))
  pos_BS, length_B = jnp.zeros((batch, capacity), jnp.int32), jnp.zeros((batch,), jnp.int32)
  return Cache(empty(), empty(), constrain(pos_BS, "BS"), constrain(length_B, "B"))


def append(
  slots_BS: jax.Array, new_BT: jax.Array, length_B: jax.Array, valid_BT: jax.Array | None
) -> jax.Array:
  """The valid of `new_BT...` written into each row's slots from its own length on; what is past the end is dropped."""
  B, T = new_BT.shape[:2]
  slot_BT = length_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
  if valid_BT is not None:  # padding goes past the end
    slot_BT = slot_BT + jnp.where(valid_BT, 0, slots_BS.shape[1])
  # a row at a time, so that rows split over a mesh stay where they are
  write = jax.vmap(lambda slots, at, new: slots.at[at].set(new, mode="drop", unique_indices=True))
  return write(slots_BS, jnp.broadcast_to(slot_BT, (B, T)), new_BT.astype(slots_BS.dtype))


def sides(context: Context, cache: Cache | None, shape: tuple[int, int]) -> tuple[Side, Side, Cache | None]:
  """(queries, keys, the cache with positions and lengths moved on) of a call on tokens of `shape` (B, T)."""
  B, T = shape
  start = jnp.zeros((1,), jnp.int32) if cache is None else cache.length
  index = (
    context.index if context.index is not None else start[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
  )
  pos, block = _positions(context.pos, index)
  prefix = None
  if context.prefix is not None:
    prefix = jnp.broadcast_to(context.prefix[:, None], (context.prefix.shape[0], T))
  in_order = cache is None and context.index is None
  queries = Side(index, pos, context.segment, context.valid, block, prefix, in_order)
  if cache is None:
    return queries, queries, None
  if context.index is not None or context.segment is not None:
    raise ConfigError(
      "context: index and segment cannot be given with a cache, whose slots are the order of one sequence"
    )
  new = (
    jnp.full((B,), T, jnp.int32) if context.valid is None else jnp.sum(context.valid, axis=1, dtype=jnp.int32)
  )
  moved = dataclasses.replace(
    cache,
    pos=append(cache.pos, jnp.broadcast_to(pos, shape), cache.length, context.valid),
    length=cache.length + new,
  )
  slot = jnp.arange(cache.capacity, dtype=jnp.int32)[None]
  return queries, Side(slot, moved.pos, valid=slot < moved.length[:, None]), moved


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
  """What all layers of one call share: both sides of attention, the position tables, and learned position parameters."""

  q_side: Side
  k_side: Side
  tables: PositionTables
  learned: tuple[Params, ...]

  def of(self, cfg: ModelConfig, position: Position) -> tuple[Table | None, Params]:
    """(the table, the parameters) of one method, where it has any."""
    table = self.tables.ropes[cfg.ropes.index(position)] if position in cfg.ropes else None
    methods = cfg.learned_positions
    return table, self.learned[methods.index(position)] if position in methods else {}
