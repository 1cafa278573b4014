"""The kinds of caches that every property of caches is held for: one table, a row a kind."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from model_cases import B, T, params, structure, tables

from jaxllm.nn import STORES, Context, Transformer, init_cache

CALL = 4
"""The most tokens of one call."""
SIZES = [4, 4, 3, 1, 1, 4, 1, 1, 1, 1, 1, 1, 1]
"""Tokens a call, together T."""


@dataclasses.dataclass(frozen=True)
class Kind:
  """How a cache is made, and how far logits may be from those of the full forward pass, by the largest.

  least: what they are at least off by, where the kind is not exact: else it was not in use.  loose: bounds of models of which
  more is asked.
  """

  bound: float
  least: float = 0.0
  call: int | None = CALL
  store: Any = STORES["full"]
  loose: dict = dataclasses.field(default_factory=dict)

  def bound_of(self, name):
    """The bound of one of MODELS."""
    return self.loose.get(name, self.bound)

  def empty(self, cfg, capacity=T):
    """An empty one for B rows."""
    return init_cache(cfg, B, capacity, call=self.call, store=self.store)

  @property
  def arguments(self):
    """Those of `generate`."""
    return {"store": self.store} | ({} if self.call is None else {"part": self.call})


CAPPED = {"post": 4e-2, "soft caps": 4e-2}
"""What is normed after the sum, or capped, has no large logits, by which small errors are small."""
ROUTED = {"experts": 1.0}
"""A token goes to other experts where an error decides it."""
CACHES = {
  "full": Kind(1e-5, call=None),
  "ring": Kind(1e-5),
  # a model of random weights is a hard case
  "int8": Kind(2e-2, 1e-5, store=STORES["int8"], loose=CAPPED),
  "int4": Kind(0.35, 1e-5, store=STORES["int4"], loose=ROUTED),
}


def step(cfg):
  """The jitted call for the structure of cfg."""
  return program(structure(cfg))


@functools.cache
def program(cfg):
  """That of one config."""
  model = Transformer(cfg)
  return jax.jit(
    lambda params, ids, valid, cache, rope: model.apply(
      {"params": params}, ids, Context(valid=valid), cache, rope
    )
  )


def decoded(cfg, ids, cache, sizes=SIZES, poison=None, padding=0):
  """(logits [B, T, V], the cache) of calls of CALL tokens each, of which sizes are real."""
  out, done, weights, rope = [], 0, params(cfg), tables(cfg)
  for n in sizes:
    chunk = np.full((B, CALL), padding, np.int32)
    chunk[:, :n] = ids[:, done : done + n]
    if poison is not None:
      cache = spoiled(cache, poison)
    logits, cache = step(cfg)(weights, chunk, np.arange(CALL)[None] < np.full((B, 1), n), cache, rope)
    out.append(np.asarray(logits)[:, :n])
    done += n
  return np.concatenate(out, axis=1), cache


@jax.jit
def spoiled(cache, value=np.nan):
  """The cache with `value`, or the largest integer, in all slots that hold no token."""

  def spoil(kind, x):
    _, valid = cache.slots[kind].held(cache.length)
    unused = ~valid[:, None, : x.shape[2], None]
    return jnp.where(unused, value if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).max, x)

  layers = lambda kv: tuple(
    jax.tree.map(functools.partial(spoil, kind), x) for x, kind in zip(kv, cache.layers, strict=True)
  )
  return dataclasses.replace(cache, k=layers(cache.k), v=layers(cache.v))
