"""What of a parameter tree lies where, as a table."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm import tree
from jaxllm.leaf import LoRA, Matrix, QTensor

HEADER = ("parameter", "shape", "dtype", "stored", "spec", "bytes a device")


def report(params: Any) -> str:
  """A table of parameters (arrays, or the abstract ones of `parallel.layout`), equal ones of several layers in one line.

  shape: the logical one, with any padding.  stored: the order of a matrix's dimensions in memory.  spec: the mesh axis of each
  logical dimension, "-" where the leaf is on no mesh.  bytes a device: of all parameters of the line.  The last line has sums.
  """
  groups: dict[tuple, list[int]] = {}
  counted: dict[tuple, int] = {}
  for path, leaf in tree.flatten(params).items():
    where, number = _template(path)
    stored = {"oi": "out,in", "io": "in,out"}.get(_stored(leaf), "")
    row = (where, _shape(leaf.shape), np.dtype(leaf.dtype).name, stored, _spec(leaf))
    groups.setdefault(row, []).extend(() if number is None else (number,))
    counted[row] = counted.get(row, 0) + sum(map(device_bytes, jax.tree.leaves(leaf)))
  rows = [
    (row[0].replace("*", _runs(numbers)), *row[1:], f"{counted[row]:,}") for row, numbers in groups.items()
  ]
  arrays = jax.tree.leaves(params)
  elements, whole = sum(x.size for x in arrays), sum(np.dtype(x.dtype).itemsize * x.size for x in arrays)
  held = sum(map(device_bytes, arrays))
  devices = max((len(x.sharding.device_set) for x in arrays if getattr(x, "sharding", None)), default=1)
  total = (
    f"{elements:,} elements, {whole:,} bytes in all; {held:,} on each of {devices} device{'s'[: devices > 1]}"
  )
  return "\n".join([*_aligned([HEADER, *rows]), total])


def device_bytes(x: Any) -> int:
  """The bytes of an array, real or abstract, on each device that it lies on."""
  sharding = getattr(x, "sharding", None)
  shape = x.shape if sharding is None else sharding.shard_shape(tuple(x.shape))
  return np.dtype(x.dtype).itemsize * math.prod(shape)


def _template(path: str) -> tuple[str, int | None]:
  """("layers/*/mlp/up/w", 3) of "layers/3/mlp/up/w"."""
  found = re.fullmatch(r"((?:layers|blocks)/)(\d+)(/.*)", path)
  return (path, None) if found is None else (f"{found[1]}*{found[3]}", int(found[2]))


def _runs(numbers: Sequence[int]) -> str:
  """ "0-3,6" of 0, 1, 2, 3 and 6."""
  runs: list[list[int]] = []
  for n in sorted(numbers):
    if runs and runs[-1][-1] == n - 1:
      runs[-1].append(n)
    else:
      runs.append([n])
  return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _shape(shape: Sequence[int]) -> str:
  return " x ".join(map(str, shape)) or "()"


def _spec(leaf: Any) -> str:
  """The axes of each logical dimension: "fsdp, tensor", with "." for a dimension that is whole."""
  if isinstance(leaf, LoRA):
    return _spec(leaf.base)
  value = (
    leaf.value if isinstance(leaf, Matrix) else leaf.parts["value"] if isinstance(leaf, QTensor) else leaf
  )
  sharding = getattr(value, "sharding", None)
  if not isinstance(sharding, NamedSharding):
    return "-"
  spec: PartitionSpec = sharding.spec
  entries = list(spec) + [None] * (len(value.shape) - len(spec))
  if _stored(leaf) == "oi":
    entries[-2:] = entries[:-3:-1]
  if not any(entries):
    return "whole"
  return ", ".join(
    "." if entry is None else entry if isinstance(entry, str) else "+".join(entry) for entry in entries
  )


def _stored(leaf: Any) -> str | None:
  """The order of a matrix's dimensions in memory."""
  if isinstance(leaf, LoRA):
    return _stored(leaf.base)
  if isinstance(leaf, QTensor):
    return None if leaf.table else "oi"
  return leaf.stored if isinstance(leaf, Matrix) else None


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
  """Columns two spaces apart, the last one to the right."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  *left, right = widths
  line = lambda row: "  ".join([*map(str.ljust, row, left), row[-1].rjust(right)])
  return list(map(line, rows))
