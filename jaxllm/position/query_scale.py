"""Scaling queries by their position, which composes with every position method."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from jaxllm.errors import ConfigError, check_positive
from jaxllm.position.tables import QueryScale


@dataclasses.dataclass(frozen=True)
class LogN:
  """log-n attention: q_n *= max(floor, ln(n) / ln(train_length)), n = position + 1, on the layers without a window.

  (A window bounds the number of keys, which is what the scale makes up for.)
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
    """The numbers that a compiled program needs."""
    slope = np.float32(1.0 / math.log(self.train_length))
    return QueryScale(np.int32(1), slope, np.float32(0), np.float32(self.floor), np.bool_(False))


@dataclasses.dataclass(frozen=True)
class Llama4Scale:
  """q_pos *= 1 + beta ln(1 + floor(pos / L0)), L0 = original_length, on all layers: 1 for the first L0 positions.

  (Llama 4 itself counts from 1, floor((pos + 1) / L0), and scales its layers without RoPE only.)
  Source: transformers' Ministral3 (`llama_4_scaling_beta`).
  """

  original_length: int
  beta: float = 0.1

  def __post_init__(self):
    length = self.original_length
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
      raise ConfigError(f"Llama4Scale.original_length: found {length!r}, expected an integer of at least 1")
    check_positive(self, beta=self.beta)

  def table(self) -> QueryScale:
    """The numbers that a compiled program needs."""
    one = np.float32(1)
    return QueryScale(np.int32(self.original_length), np.float32(self.beta), one, one, np.bool_(True))


QUERY_SCALES = {"log_n": LogN, "llama4": Llama4Scale}


def query_scale_table(query_scale: LogN | Llama4Scale | None) -> QueryScale:
  """The table of a query scale, or the one that multiplies by exactly 1."""
  if query_scale is not None:
    return query_scale.table()
  return QueryScale(np.int32(1), np.float32(0), np.float32(0), np.float32(1), np.bool_(False))
