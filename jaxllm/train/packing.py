"""Which stretches of a text make the rows of an epoch: equal windows, or whole documents packed into rows."""

from __future__ import annotations

import bisect
import dataclasses

import numpy as np

from jaxllm.errors import ConfigError, DataError
from jaxllm.train.objectives import SMALLEST, Objective
from jaxllm.train.order import permuted
from jaxllm.train.tokens import Text

OPEN = 1024
"""Rows with space left that are kept in mind while documents are packed."""


@dataclasses.dataclass(frozen=True)
class Windows:
  """`count` pieces of `size` tokens, `stride` apart from `start` on: a row each."""

  start: int
  size: int
  stride: int
  count: int

  def __len__(self) -> int:
    return self.count

  def pieces(self, row: int) -> list[tuple[int, int]]:
    """(first token, tokens) of each piece of a row."""
    return [(self.start + row * self.stride, self.size)]


@dataclasses.dataclass(frozen=True)
class Packed:
  """Pieces [pieces, 2] of (first token, tokens) in the order of rows, which begin at first_R, int64 [rows + 1]."""

  table: np.ndarray
  first: np.ndarray

  def __len__(self) -> int:
    return len(self.first) - 1

  def pieces(self, row: int) -> list[tuple[int, int]]:
    """(first token, tokens) of each piece of a row."""
    return [(int(start), int(size)) for start, size in self.table[self.first[row] : self.first[row + 1]]]


def documents(text: Text) -> np.ndarray:
  """(first token, the one after its last) of each document, its separator included: int64 [documents, 2].

  The whole text where there is no separator.  Reads all of it, and raises DataError for ids that are not in the vocabulary.
  """
  if text.separator is None:
    return np.array([[0, len(text)]], np.int64)
  ends = [start + 1 + np.flatnonzero(ids == text.separator) for start, ids in text.chunks()]
  edges = np.unique(np.concatenate([[0], *ends, [len(text)]])).astype(np.int64)
  return np.stack([edges[:-1], edges[1:]], axis=1)


def held_out(ranges: np.ndarray, share: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """(training, held-out) documents of `ranges` [documents, 2], both in the order of the text.

  Of at least 1 / share documents so many are held out, by the permutation of `seed`; of fewer the end of the text, as that
  share of its tokens.  Raises ConfigError for a share that is not between 0 and 1.
  """
  if not 0 < share < 1:
    raise ConfigError(f"held_out: found the share {share!r}, expected a number between 0 and 1")
  count = len(ranges)
  if count * share >= 1:
    out = permuted(np.arange(count), count, seed) < round(share * count)
    return ranges[~out], ranges[out]
  sizes = ranges[:, 1] - ranges[:, 0]
  kept = int(np.sum(sizes)) - max(1, round(share * int(np.sum(sizes))))
  ends_N = np.cumsum(sizes)
  cut_N = ranges[:, 0] + np.clip(kept - (ends_N - sizes), 0, sizes)
  parts = np.stack([ranges[:, 0], cut_N], 1), np.stack([cut_N, ranges[:, 1]], 1)
  return tuple(part[part[:, 1] > part[:, 0]] for part in parts)


def longest_piece(objective: Objective, length: int) -> int:
  """The most tokens of text whose example fits in `length` slots.  Raises ConfigError where none do."""
  size = bisect.bisect_right(range(length + 2), length, key=objective.slots) - 1
  if size < SMALLEST:
    raise ConfigError(
      f"length: found {length}, expected at least {objective.slots(SMALLEST)} for {type(objective).__name__}"
    )
  return size


def plan(text: Text, ranges: np.ndarray, objective: Objective, length: int) -> Windows | Packed:
  """The rows of an epoch over some documents of a text, for examples of at most `length` slots a row.

  Without a separator: windows that share objective.overlap tokens, so that each token but the first is learned once; what is
  left at the end is in none.  With one: a document longer than a row is cut into pieces likewise, and each piece goes, in the
  order of the text, into the row where the least space is left (best fit).  A piece of fewer than SMALLEST tokens has nothing
  to learn and is left out.  Raises DataError for a text with no row, ConfigError for a length that holds nothing.
  Source: Ding et al. (2024), Fewer truncations improve language modeling, section 3 (theirs sorts by length first).
  """
  size = longest_piece(objective, length)
  stride = size - objective.overlap
  if text.separator is None and len(ranges) == 1:
    start, end = (int(x) for x in ranges[0])
    rows = Windows(start, size, stride, max(0, (end - start - objective.overlap) // stride))
  else:
    rows = _packed(_cut(ranges, size, stride), objective, length)
  if len(rows) == 0:
    tokens = int(np.sum(ranges[:, 1] - ranges[:, 0]))
    raise DataError(
      f"{text.source}: found {tokens} tokens in {len(ranges)} documents, expected at least {size} in a row of {length}, or a "
      f"document of {SMALLEST} or more; give more text, or a shorter length"
    )
  return rows


def _cut(ranges: np.ndarray, size: int, stride: int) -> np.ndarray:
  """Pieces (first token, tokens) of the documents, in order, int64 [pieces, 2]."""
  lengths = ranges[:, 1] - ranges[:, 0]
  counts = lengths // stride + 1  # the last of which may be no more than what it shares with the one before
  which = np.repeat(np.arange(len(ranges)), counts)
  number = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
  starts = ranges[which, 0] + number * stride
  sizes = np.minimum(size, ranges[which, 1] - starts)
  return np.stack([starts, sizes], axis=1)[sizes >= SMALLEST]


def _packed(table: np.ndarray, objective: Objective, length: int) -> Packed:
  slots = {size: objective.slots(size) for size in np.unique(table[:, 1]).tolist()}
  smallest = objective.slots(SMALLEST)
  row_of = np.zeros(len(table), np.int64)
  rows = 0
  spaces: list[tuple[int, int]] = []  # (space left, row), sorted
  for i, size in enumerate(table[:, 1].tolist()):
    needed = slots[size]
    at = bisect.bisect_left(spaces, (needed, 0))
    if at < len(spaces):
      left, row = spaces.pop(at)
    else:
      left, row, rows = length, rows, rows + 1
    row_of[i] = row
    if left - needed >= smallest:
      bisect.insort(spaces, (left - needed, row))
      if len(spaces) > OPEN:
        spaces.pop(0)
  order = np.argsort(row_of, kind="stable")
  first = np.searchsorted(row_of[order], np.arange(rows + 1))
  return Packed(table[order], first)
