"""The forms in which a cache keeps keys and values: in full, or as integers of 8 or 4 bits."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.errors import ConfigError
from jaxllm.ops.constrain import compiler_axes


def write(slots_BKS: jax.Array, at_BT: jax.Array, new_BKT: jax.Array) -> jax.Array:
  """slots [B, K, S, ...] with new [B, K, T, ...] at the places of each row; what is below 0 or past the end is dropped.

  All slots are one axis of the write, as a loop then changes them where they lie: with an axis for rows, of which there is one,
  XLA copies them four times a token on a CPU (3000 tokens, 16 layers of 4 heads of 64: 6.5 ms a token).  On a mesh it is a row
  at a time, so that rows split over it stay where they are.
  """
  (B, K, S), rest = slots_BKS.shape[:3], slots_BKS.shape[3:]
  new_BKT, n = new_BKT.astype(slots_BKS.dtype), B * K * S
  at_BT = jnp.where(at_BT < 0, S, at_BT)  # past the end, too: negative ones would count from it
  if any(size > 1 for size in compiler_axes().values()) or n >= 2**31:
    row = lambda slots, at, new: slots.at[:, at].set(new, mode="drop", unique_indices=True)
    return jax.vmap(row)(slots_BKS, at_BT, new_BKT)
  first_BK = S * jnp.arange(B * K, dtype=jnp.int32).reshape(B, K)
  at_BKT = jnp.where(at_BT[:, None] < S, first_BK[..., None] + at_BT[:, None], n)
  slots, new = slots_BKS.reshape(n, *rest), new_BKT.reshape(at_BKT.size, *rest)
  return slots.at[at_BKT.reshape(-1)].set(new, mode="drop", unique_indices=True).reshape(slots_BKS.shape)


def longer(slots_BKS: jax.Array, size: int) -> jax.Array:
  """slots [B, K, S, ...] with zeros after them, [B, K, size, ...]."""
  return jnp.pad(slots_BKS, [(0, size - n if axis == 2 else 0) for axis, n in enumerate(slots_BKS.shape)])


@dataclasses.dataclass(frozen=True)
class Full:
  """Keys and values as they are, in the compute type."""

  def empty(self, B: int, K: int, S: int, H: int, dtype: Any) -> jax.Array:
    """Slots that hold nothing, [B, K, S, H]."""
    return jnp.zeros((B, K, S, H), dtype)

  def write(self, slots_BKSH: jax.Array, at_BT: jax.Array, new_BTKH: jax.Array) -> jax.Array:
    """The slots with a call's tokens at their places."""
    return write(slots_BKSH, at_BT, new_BTKH.swapaxes(1, 2))

  def read(self, slots_BKSH: jax.Array, dtype: Any) -> jax.Array:
    """All slots, [B, K, S, H] of `dtype`."""
    return slots_BKSH.astype(dtype)

  def grown(self, slots_BKSH: jax.Array, size: int) -> jax.Array:
    """`size` slots, of which the last ones hold nothing."""
    return longer(slots_BKSH, size)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Integers:
  """Slots of a `Quantized` store: x = low + step n.

  n: uint8 [B, K, S, H], or of 4 bits [B, K, S, ceil(H / 2)], number h in the low half of byte h and number h + ceil(H / 2) in
  its high half; step, low: float32 [B, K, S, 1]; first [B, K, sinks, H]: the first slots, in full.
  """

  n: jax.Array
  step: jax.Array
  low: jax.Array
  first: jax.Array


@dataclasses.dataclass(frozen=True)
class Quantized:
  """Keys and values as integers of 8 or 4 bits with a step and an offset a token and head; the first `sinks` slots in full.

  n = round((x - low) / step), low = min x, step = (max x - min x) / (2^bits - 1) over a head's H numbers: x is off by step / 2
  at most.  A token takes bits H / 8 + 8 bytes a head.  The first tokens attract much of the attention: hence in full.
  Raises ConfigError for other bits, or sinks below 0.  Source: Sheng et al. (2023), FlexGen, section 4.2 (group-wise integers
  of the cache); Hooper et al. (2024), KVQuant, section 3.5 (the first tokens in full).
  """

  bits: int = 8
  sinks: int = 4

  def __post_init__(self):
    if self.bits not in (8, 4):
      raise ConfigError(f"Quantized.bits: found {self.bits!r}, expected 8 or 4")
    if type(self.sinks) is not int or self.sinks < 0:
      raise ConfigError(f"Quantized.sinks: found {self.sinks!r}, expected an integer of at least 0")

  def empty(self, B: int, K: int, S: int, H: int, dtype: Any) -> Integers:
    """Slots that hold nothing."""
    width = H if self.bits == 8 else -(-H // 2)
    one = jnp.zeros((B, K, S, 1), jnp.float32)
    first = jnp.zeros((B, K, min(self.sinks, S), H), dtype)
    return Integers(jnp.zeros((B, K, S, width), jnp.uint8), one, one, first)

  def write(self, slots: Integers, at_BT: jax.Array, new_BTKH: jax.Array) -> Integers:
    """The slots with a call's tokens at their places."""
    new_BKTH = new_BTKH.swapaxes(1, 2)
    x = new_BKTH.astype(jnp.float32)
    low = jnp.min(x, axis=-1, keepdims=True)
    step = (jnp.max(x, axis=-1, keepdims=True) - low) / (2**self.bits - 1)
    n = jnp.round((x - low) / jnp.where(step > 0, step, 1)).astype(jnp.uint8)
    put = lambda slots, new: write(slots, at_BT, new)
    return Integers(
      put(slots.n, self._packed(n)), put(slots.step, step), put(slots.low, low), put(slots.first, new_BKTH)
    )

  def read(self, slots: Integers, dtype: Any) -> jax.Array:
    """All slots, [B, K, S, H] of `dtype`."""
    n = self._unpacked(slots.n, slots.first.shape[-1])
    x = (slots.low + slots.step * n.astype(jnp.float32)).astype(dtype)
    return jnp.concatenate([slots.first.astype(dtype), x[:, :, slots.first.shape[2] :]], axis=2)

  def grown(self, slots: Integers, size: int) -> Integers:
    """`size` slots, of which the last ones hold nothing."""
    first = longer(slots.first, min(self.sinks, size))
    return Integers(*(longer(x, size) for x in (slots.n, slots.step, slots.low)), first)

  def _packed(self, n: jax.Array) -> jax.Array:
    if self.bits == 8:
      return n
    H = n.shape[-1]
    n = jnp.pad(n, [(0, 0)] * (n.ndim - 1) + [(0, H % 2)])
    low, high = jnp.split(n, 2, axis=-1)
    return low | (high << 4)

  def _unpacked(self, n: jax.Array, H: int) -> jax.Array:
    return n if self.bits == 8 else jnp.concatenate([n & 15, n >> 4], axis=-1)[..., :H]


FULL = Full()
STORES = {"full": FULL, "int8": Quantized(8), "int4": Quantized(4)}
"""Forms of the cache by name."""
