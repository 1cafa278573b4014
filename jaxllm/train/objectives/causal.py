"""Objectives that read text from left to right: causal, and with a prefix that is seen from both sides."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from jaxllm.train.objectives.example import Example


@dataclasses.dataclass(frozen=True)
class Causal:
  """-log p(x_t | x_<t), for all tokens of a piece but the first.

  Source: Radford et al. (2018), section 3.1.
  """

  overlap: ClassVar[int] = 1
  prefixed: ClassVar[bool] = False
  plain: ClassVar[bool] = True
  axes: ClassVar[int] = 1
  vocab_size: ClassVar[int] = 0

  def slots(self, size: int) -> int:
    return size - 1

  def example(self, ids: np.ndarray, rng: np.random.Generator) -> Example:
    t = len(ids) - 1
    return Example(ids[:-1], ids[1:], np.ones(t, np.float32), np.arange(t, dtype=np.int32))


@dataclasses.dataclass(frozen=True)
class PrefixLm(Causal):
  """-log p(x_t | x_<t), t >= p, where the first p tokens see each other in both directions; p is uniform in 1 ... n - 1.

  Source: Raffel et al. (2020), sections 3.2.1 and 3.2.3 (a random split of a span of text).
  """

  prefixed: ClassVar[bool] = True

  def example(self, ids: np.ndarray, rng: np.random.Generator) -> Example:
    whole = super().example(ids, rng)
    prefix = int(rng.integers(1, len(ids)))
    weights = (np.arange(len(ids) - 1) >= prefix - 1).astype(np.float32)
    return dataclasses.replace(whole, weights=weights, prefix=prefix)
