"""Keys and values of the tokens before: which slot holds which token, in which form, and how they are read back."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.config import Layer, ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.nn.store import FULL, Full, Quantized, write
from jaxllm.ops.attention import Side
from jaxllm.ops.constrain import constrain


@dataclasses.dataclass(frozen=True)
class Slots:
  """Which of `size` slots holds which token: the first `sinks` tokens keep theirs, the others share a ring.

  Token i is in slot i for i < sinks, else in sinks + (i - sinks) mod (size - sinks), where the newest one stays.  A ring as
  large as the text never comes round: it is the usual cache, slot i for token i.  call: the most tokens of one call where there
  is a ring (None: there is none).
  Source: Beltagy et al. (2020), Longformer, section 3.1 (the window); Xiao et al. (2023), section 3.2 (the sinks).
  """

  size: int
  sinks: int = 0
  call: int | None = None

  def of(self, index: jax.Array) -> jax.Array:
    """The slots of tokens."""
    if self.call is None:
      return index
    return jnp.where(index < self.sinks, index, self.sinks + (index - self.sinks) % (self.size - self.sinks))

  def held(self, length_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(index, validity) of the tokens in the slots, [B or 1, size], in rows of so many tokens."""
    slot = jnp.arange(self.size, dtype=jnp.int32)[None]
    length = length_B[:, None]
    if self.call is None:
      return slot, slot < length
    last = length - 1
    newest = last - (last - slot) % (self.size - self.sinks)
    index = jnp.where(slot < self.sinks, slot, newest)
    return index, (index < length) & ((slot < self.sinks) | (newest >= self.sinks))


def slots_of(layer: Layer, capacity: int, call: int | None) -> Slots:
  """The slots of a layer in a cache for `capacity` tokens of which a call reads at most `call` (None: any number).

  A layer whose queries see the `window` nearest tokens keeps window + call of them: a call's tokens are written before they are
  read, and a cut of as many tokens leaves what is then the window.
  """
  seen = layer.position.seen or (layer.window and (0, layer.window))
  if seen is None or call is None:
    return Slots(capacity)
  sinks, window = seen
  size = sinks + window + call
  return Slots(capacity) if size >= capacity else Slots(size, sinks, call)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Place:
  """One kind of slots in one call: at_BT, where its tokens go (past the end for padding), and the keys' side of all slots."""

  at: jax.Array
  side: Side


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
  """The keys and values of one layer during one call."""

  k: Any
  v: Any
  place: Place
  store: Full | Quantized = dataclasses.field(metadata=dict(static=True))
  fresh: bool = dataclasses.field(metadata=dict(static=True))

  def add(self, k_BTKH: jax.Array, v_BTKH: jax.Array) -> LayerCache:
    """With the call's own tokens in their slots."""
    k, v = (
      jax.tree.map(lambda x: constrain(x, "BKSH"), self.store.write(slots, self.place.at, new))
      for slots, new in ((self.k, k_BTKH), (self.v, v_BTKH))
    )
    return dataclasses.replace(self, k=k, v=v)

  def read(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """(k_BSKH, v_BSKH) of all slots."""
    k_BKSH, v_BKSH = (self.store.read(slots, dtype) for slots in (self.k, self.v))
    return k_BKSH.swapaxes(1, 2), v_BKSH.swapaxes(1, 2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """Keys and values of the tokens so far; what it holds of a row depends on that row alone, not on the batch.

  k, v: what `store` makes of [B, K, S, H], a layer (keys unrotated where the position method needs them so), S the size of the
  layer's slots.  pos: positions of the tokens in the slots, [B, S] a kind of slots (the first of two: keys are turned by both
  before they are cached).  length_B: how many tokens a row has had.  slots: the kinds of slots, and layers: the kind of each
  layer, by number.  capacity: how many tokens a row can have.  fresh: known while tracing that no row has had any, so that
  the tokens of a call need not look beyond themselves.
  """

  k: tuple[Any, ...]
  v: tuple[Any, ...]
  pos: tuple[jax.Array, ...]
  length: jax.Array
  slots: tuple[Slots, ...] = dataclasses.field(metadata=dict(static=True))
  layers: tuple[int, ...] = dataclasses.field(metadata=dict(static=True))
  capacity: int = dataclasses.field(metadata=dict(static=True))
  store: Full | Quantized = dataclasses.field(default=FULL, metadata=dict(static=True))
  fresh: bool = dataclasses.field(default=False, metadata=dict(static=True))

  def check_room(self, new_tokens: int) -> None:
    """Raise ConfigError if `new_tokens` more do not fit; on the host, as a write past the end is silently dropped."""
    longest = int(jnp.max(self.length))
    if longest + new_tokens > self.capacity:
      raise ConfigError(
        f"cache: {longest} tokens and {new_tokens} more do not fit in {self.capacity} slots; make it larger (init_cache)"
      )

  def take(self, rows_B: jax.Array) -> Cache:
    """The cache whose row i is row rows_B[i] of this one: rows reordered, repeated or left out."""
    return jax.tree.map(lambda x: x[rows_B], self)

  def cut(self, length_B: jax.Array) -> Cache:
    """The cache as it was when row i had had length_B[i] tokens, at most a call's fewer than now."""
    return dataclasses.replace(self, length=jnp.minimum(self.length, length_B))

  def move(self, pos_BT: jax.Array, valid_BT: jax.Array | None) -> tuple[Cache, tuple[Place, ...]]:
    """(the cache with positions and lengths of a call's tokens added, the places of each kind of slots)."""
    B, T = pos_BT.shape
    for slots in self.slots:
      if slots.call is not None and slots.call < T:
        raise ConfigError(
          f"cache: found a call of {T} tokens, expected at most {slots.call}, as windowed layers hold no more; read the text "
          f"in parts, or make the cache by init_cache(call={T})"
        )
    new = jnp.full((B,), T, jnp.int32) if valid_BT is None else jnp.sum(valid_BT, axis=1, dtype=jnp.int32)
    length_B = self.length + new
    index_BT = self.length[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
    pos, places = [], []
    for slots, old in zip(self.slots, self.pos, strict=True):
      at_BT = slots.of(index_BT)
      if valid_BT is not None:  # padding goes past the end
        at_BT = at_BT + jnp.where(valid_BT, 0, slots.size)
      pos.append(constrain(write(old[:, None], at_BT, pos_BT[:, None])[:, 0], "BS"))
      index_BS, valid_BS = slots.held(length_B)
      places.append(Place(at_BT, Side(index_BS, pos[-1], valid=valid_BS)))
    return dataclasses.replace(self, pos=tuple(pos), length=length_B), tuple(places)

  def of_layers(self, places: tuple[Place, ...]) -> tuple[LayerCache, ...]:
    """What each layer has of it, with the place of its kind of slots."""
    layers = zip(self.k, self.v, self.layers, strict=True)
    return tuple(LayerCache(k, v, places[kind], self.store, self.fresh) for k, v, kind in layers)

  def with_layers(self, layers: tuple[LayerCache, ...]) -> Cache:
    """The cache after a call, of what its layers have become."""
    k, v = (tuple(getattr(layer, name) for layer in layers) for name in ("k", "v"))
    return dataclasses.replace(self, k=k, v=v, fresh=False)


def init_cache(
  cfg: ModelConfig, batch: int, capacity: int, *, call: int | None = None, store: Full | Quantized = FULL
) -> Cache:
  """An empty cache for `capacity` tokens a row, in the form of `store` (`store.STORES` has them by name).

  call: the most tokens that one call will read; layers that see a window then hold the window and so many more, not all of the
  text.  Raises ConfigError for more than a learned table has positions.
  """
  cfg.check_length(capacity, "cache capacity")
  of_layers = [slots_of(cfg.layer(i), capacity, call) for i in range(cfg.num_layers)]
  slots = tuple(dict.fromkeys(of_layers))

  def empty() -> tuple[Any, ...]:
    new = lambda size: store.empty(batch, cfg.num_kv_heads, size, cfg.head_dim, cfg.dtype)
    return tuple(jax.tree.map(lambda x: constrain(x, "BKSH"), new(s.size)) for s in of_layers)

  return Cache(
    empty(),
    empty(),
    tuple(constrain(jnp.zeros((batch, s.size), jnp.int32), "BS") for s in slots),
    constrain(jnp.zeros((batch,), jnp.int32), "B"),
    slots,
    tuple(slots.index(s) for s in of_layers),
    capacity,
    store,
  )


def grow(cfg: ModelConfig, cache: Cache, capacity: int, *, call: int | None = None) -> Cache:
  """A cache with the same tokens and room for `capacity` of them; call: as `init_cache` was given it.

  A layer that comes to its window keeps that and a call's tokens: until then it had a slot for every token, as a ring has.
  Raises ConfigError for another `call`, as a ring that has come round would be read as one of another size.
  """
  cfg.check_length(capacity, "cache capacity")
  of_layers = [slots_of(cfg.layer(i), capacity, call) for i in range(cfg.num_layers)]
  for old, new in zip((cache.slots[kind] for kind in cache.layers), of_layers, strict=True):
    if old.size > new.size or (old.call is not None and old != new):
      raise ConfigError(
        f"grow: found a layer of {old}, expected {new}; give the call that init_cache was given"
      )
  slots = tuple(dict.fromkeys(of_layers))

  def grown(layers: tuple[Any, ...]) -> tuple[Any, ...]:
    pairs = zip(layers, of_layers, strict=True)
    return tuple(jax.tree.map(lambda x: constrain(x, "BKSH"), cache.store.grown(x, s.size)) for x, s in pairs)

  old = [cache.pos[cache.layers[of_layers.index(s)]] for s in slots]
  pos = (jnp.pad(x, [(0, 0), (0, s.size - x.shape[1])]) for x, s in zip(old, slots, strict=True))
  return dataclasses.replace(
    cache,
    k=grown(cache.k),
    v=grown(cache.v),
    pos=tuple(constrain(x, "BS") for x in pos),
    slots=slots,
    layers=tuple(slots.index(s) for s in of_layers),
    capacity=capacity,
  )
