"""Random numbers and orders of a run as functions of (seed, place), so that any step can be computed alone."""

from __future__ import annotations

import numpy as np

_ROUNDS = 8
_STREAMS, _ORDER = 0x73747265616D, 0x6F72646572
"""Second words of Philox keys: draws and orders of one seed have nothing in common."""


def stream(seed: int, *place: int) -> np.random.Generator:
  """The generator of a place in a run, such as (step, row, piece): up to three numbers below 2^64.

  Philox encrypts its counter; the lowest of its four words counts the draws and the others are the place, so that streams
  of two places never meet.  Source: Salmon et al. (2011), Parallel random numbers: as easy as 1, 2, 3.
  """
  assert len(place) <= 3
  counter = np.array([0, *place, 0, 0, 0][:4], np.uint64)
  return np.random.Generator(np.random.Philox(key=np.array([seed, _STREAMS], np.uint64), counter=counter))


def permuted(index: np.ndarray, count: int, seed: int, epoch: np.ndarray | int = 0) -> np.ndarray:
  """Where `index`, each below `count`, goes in the permutation of 0 ... count - 1 of (seed, epoch), int64 of its shape.

  A Feistel network over 2 h bits, the least that hold `count`: (l, r) -> (r, l ^ F(r)), eight times, which is a bijection for
  any F; what falls on `count` or beyond goes through again until it does not (at most 4 times on average), which is one of the
  smaller set.  Takes no memory of the size of `count`.
  Source: Luby and Rackoff (1988); Black and Rogaway (2002), Ciphers with arbitrary finite domains, method 3 (cycle walking).
  """
  shape = np.broadcast_shapes(np.shape(index), np.shape(epoch))
  x = np.array(np.broadcast_to(index, shape), np.uint64).ravel()  # its own, as it is written to
  epochs, which = np.unique(np.broadcast_to(epoch, shape).ravel(), return_inverse=True)
  assert x.size == 0 or (x.max() < count < 2**62)
  keys = np.stack([_keys(seed, int(e)) for e in epochs]) if len(epochs) else np.zeros((0, _ROUNDS), np.uint64)
  half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
  going = np.arange(x.size)
  while going.size:
    x[going] = _network(x[going], half, keys[which[going]])
    going = going[x[going] >= count]
  return x.astype(np.int64).reshape(shape)


def _keys(seed: int, epoch: int) -> np.ndarray:
  philox = np.random.Philox(
    key=np.array([seed, _ORDER], np.uint64), counter=np.array([0, epoch, 0, 0], np.uint64)
  )
  return philox.random_raw(_ROUNDS)


def _network(x: np.ndarray, half: np.uint64, keys: np.ndarray) -> np.ndarray:
  mask = (np.uint64(1) << half) - np.uint64(1)
  left, right = x >> half, x & mask
  for i in range(_ROUNDS):
    left, right = right, left ^ (_mixed(right, keys[:, i]) & mask)
  return (left << half) | right


def _mixed(x: np.ndarray, key: np.ndarray) -> np.ndarray:
  """64 bits that each depend on all of x and key: the finalizer of SplitMix64 (Steele et al., 2014)."""
  x = x * np.uint64(0x9E3779B97F4A7C15) + key
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))
