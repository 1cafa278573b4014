"""What an objective makes of a piece of text, and what all objectives have in common."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Protocol

import numpy as np

SMALLEST = 2
"""Tokens of the smallest piece that anything can be learned from."""


@dataclasses.dataclass(frozen=True)
class Example:
  """One sequence of t slots: what the model reads, and what it is to say.

  tokens_T, labels_T: int32.  weights_T: float32, the share of each slot in the loss, 0 where there is nothing to say.
  pos_T, or [t, 2] with block positions: int32.  prefix: how many leading slots see each other in both directions.
  """

  tokens: np.ndarray
  labels: np.ndarray
  weights: np.ndarray
  pos: np.ndarray
  prefix: int = 0


class Objective(Protocol):
  """What is learned from text: a frozen dataclass.

  overlap: how many tokens a piece of a long document shares with the one before it.  prefixed: whether examples have a
  prefix.  plain: whether an example fills its slots from position 0 on, so that a row of one needs no positions.  axes: 1, or
  2 with block positions.
  """

  overlap: ClassVar[int]
  prefixed: ClassVar[bool]
  plain: ClassVar[bool]

  @property
  def axes(self) -> int:
    """Numbers in a position."""
    ...

  @property
  def vocab_size(self) -> int:
    """The largest id that it puts in, and 1."""
    ...

  def slots(self, size: int) -> int:
    """How many slots the example of a piece of so many tokens takes at most; it grows with the size."""
    ...

  def example(self, ids: np.ndarray, rng: np.random.Generator) -> Example:
    """The example of a piece, int32 [n], n at least SMALLEST, by the draws of `rng`."""
    ...
