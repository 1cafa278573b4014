"""What a tree of weights takes, and how far it is from the one as loaded."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import tree
from jaxllm.leaf import dense

METRICS = ("bits", "disk_bytes", "resident_bytes", "weight_error")


def weigh(own: Any, params: Any, quantized: tuple[str, ...]) -> dict[str, float]:
  """Bits an element of the quantized weights, scales counted, bytes of the whole tree as written and as held, and
  ||w - w'|| / ||w|| over all quantized weights w (Frobenius).
  """
  before, after = tree.flatten(own), tree.flatten(params)
  difference, norm = [], []
  for path in quantized:
    w = np.asarray(dense(before[path]), np.float64)
    norm.append(np.sum(w * w))
    difference.append(
      0.0 if after[path] is before[path] else np.sum((np.asarray(dense(after[path])) - w) ** 2)
    )
  return {
    "bits": 8 * sum(stored(after[path]) for path in quantized) / sum(after[path].size for path in quantized),
    "disk_bytes": stored(params),
    "resident_bytes": sum(map(_resident, jax.tree.leaves(params))),
    "weight_error": math.sqrt(math.fsum(difference) / max(math.fsum(norm), 1e-300)),
  }


def stored(params: Any) -> int:
  """Bytes of the numbers of a tree or a leaf, those of less than 8 bits packed."""
  return sum(-(-leaf.size * _bits(leaf.dtype) // 8) for leaf in jax.tree.leaves(params))


def _bits(dtype: Any) -> int:
  return (jnp.finfo if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo)(dtype).bits


def _resident(leaf: Any) -> int:
  return leaf.on_device_size_in_bytes() if isinstance(leaf, jax.Array) else leaf.nbytes
