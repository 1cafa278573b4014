"""Scaling queries by their position, which composes with every position method."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from jaxllm.errors import ConfigError
from jaxllm.position.tables import QueryScale


@dataclasses.dataclass(frozen=True)
class LogN:
  """log-n attention: q_n *= max(floor, ln(n) / ln(train_length)), n = position + 1.

  floor = 0 is the form to train with (the first token attends uniformly: ln(1) = 0); floor = 1 is the form for a model
  trained without it, switched on at test time, where queries within the trained length stay as they are.
  Source: kexue.fm/archives/8823 and 9675.
  """

  train_length: int
  floor: float = 0.0

  def __post_init__(self):
    if not isinstance(self.train_length, int) or self.train_length < 2:
      raise ConfigError(f"LogN.train_length: found {self.train_length!r}, expected an integer of at least 2")
    if not 0.0 <= self.floor <= 1.0:
      raise ConfigError(f"LogN.floor: found {self.floor!r}, expected a number from 0 to 1")

  def table(self) -> QueryScale:
    """The two numbers that a compiled program needs."""
    return QueryScale(np.float32(1.0 / math.log(self.train_length)), np.float32(self.floor))


def query_scale_table(query_scale: LogN | None) -> QueryScale:
  """The table of a query scale, or the one that multiplies by exactly 1."""
  return QueryScale(np.float32(0.0), np.float32(1.0)) if query_scale is None else query_scale.table()
