"""What a tree of weights takes, and how far it is from the one as loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxllm import tree
from jaxllm.leaf import dense

SIZES = ("bits", "disk_bytes", "resident_bytes")
ERROR, EACH = "weight_error", "error"
"""Relative errors, of all quantized weights and of each."""


def errors(own: Any, params: Any, quantized: Sequence[str]) -> dict[str, float]:
  """||w - w'|| / ||w|| (Frobenius) of each quantized weight, by its path, and of all of them together, by `ERROR`."""
  before, after = tree.flatten(own), tree.flatten(params)
  difference, norm = {}, {}
  for path in quantized:
    w = np.asarray(dense(before[path]), np.float64)
    norm[path] = np.sum(w * w)
    same = after[path] is before[path]
    difference[path] = 0.0 if same else np.sum((np.asarray(dense(after[path])) - w) ** 2)
  ratio = lambda a, b: math.sqrt(a / max(b, 1e-300))
  each = {path: ratio(difference[path], norm[path]) for path in quantized}
  return each | {ERROR: ratio(math.fsum(difference.values()), math.fsum(norm.values()))}


def bits(params: Any, quantized: Sequence[str]) -> float:
  """Bits an element of the quantized weights, scales counted."""
  leaves = [tree.flatten(params)[path] for path in quantized]
  return 8 * sum(leaf.nbytes for leaf in leaves) / sum(leaf.size for leaf in leaves)


def resident(params: Any) -> int:
  """Bytes of all parameters in the memory of the devices, copies on several of them counted."""
  return sum(map(_resident, jax.tree.leaves(params)))


def _resident(leaf: Any) -> int:
  if not isinstance(leaf, jax.Array):
    return leaf.nbytes
  return sum(shard.data.on_device_size_in_bytes() for shard in leaf.addressable_shards)
