"""Meshes: how many devices hold copies of the model, shards of its parameters, and shards of each product."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from jaxllm.errors import ConfigError, DataError
from jaxllm.ops.constrain import AXES, LETTERS, activation_spec


def make_mesh(axes: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """The mesh of "data=2,tensor=4", to be used as `with jax.set_mesh(mesh):`.

  data: copies of the model, each with its part of the batch.  fsdp: the same, with the parameters split among them.  tensor:
  each product split.  The last axis named changes fastest over the devices, so it is the one between neighbours.  A size of -1
  takes what the others leave.  devices: all there are, of all processes.

  Raises ConfigError for an unknown or repeated axis, a size below 1, and a product other than the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = _parse(axes)
  given = math.prod(size for size in sizes.values() if size != -1)
  if -1 in sizes.values() and len(devices) % given == 0:
    sizes = {name: len(devices) // given if size == -1 else size for name, size in sizes.items()}
  elif -1 in sizes.values() or given != len(devices):
    virtual = ""
    if devices[0].platform == "cpu" and given > len(devices):
      virtual = f"; for virtual ones set XLA_FLAGS=--xla_force_host_platform_device_count={given}"
    fits = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]
    wanted = "a divisor of" if -1 in sizes.values() else "exactly"
    raise ConfigError(
      f"mesh {axes!r}: found sizes with the product {given} for {len(devices)} {devices[0].platform} devices, expected "
      f"{wanted} {len(devices)}, as a mesh takes all of them; sizes that fit are {_listed(fits)}{virtual}"
    )
  kinds = (AxisType.Auto,) * len(sizes)
  return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=devices)


def spell(mesh: Mesh) -> str:
  """The text that `make_mesh` makes this mesh of."""
  return ",".join(f"{name}={size}" for name, size in mesh.shape.items())


def default_rules(mesh: Mesh) -> str:
  """The name of the rule set (`RULES`) that uses every axis of the mesh."""
  used = [name for name in ("fsdp", "tensor") if mesh.shape.get(name, 1) > 1]
  return "_".join(used) or "data"


def batch_shards(mesh: Mesh) -> int:
  """Into how many parts a batch is split: the number of rows is to be a multiple of it."""
  return math.prod(mesh.shape.get(axis, 1) for axis in LETTERS["B"])


def shard_batch(batch: Any, mesh: Mesh) -> Any:
  """Arrays [B, ...] that every process holds whole, rows split over data and fsdp; any pytree of them.

  Raises DataError where the rows do not divide.
  """

  def put(x):
    x = np.asarray(x)
    if x.shape[0] % batch_shards(mesh):
      raise DataError(
        f"batch: found {x.shape[0]} rows on the mesh {spell(mesh)}, expected a multiple of {batch_shards(mesh)} (data x fsdp)"
      )
    letters = "B".ljust(x.ndim, "-")
    sharding = NamedSharding(mesh, activation_spec(x.shape, letters, mesh.shape))
    return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)

  return jax.tree.map(put, batch)


def _parse(axes: str) -> Mapping[str, int]:
  """{name: size} of "data=2,tensor=4"."""
  sizes: dict[str, int] = {}
  for part in axes.split(","):
    name, equals, size = (word.strip() for word in part.partition("="))
    if name not in AXES:
      near = difflib.get_close_matches(name, AXES, 1, 0.0)
      hint = f" (did you mean {near[0]!r}?)" if name and near else ""
      raise ConfigError(
        f"mesh {axes!r}: found the axis {name!r}, expected some of {', '.join(AXES)}, as in data=2,tensor=4{hint}"
      )
    if name in sizes:
      raise ConfigError(f"mesh {axes!r}: found the axis {name!r} twice, expected each at most once")
    try:
      sizes[name] = int(size)
    except ValueError:
      sizes[name] = 0
    if not equals or (sizes[name] < 1 and sizes[name] != -1):
      raise ConfigError(
        f"mesh {axes!r}: found {part.strip()!r}, expected {name}=N with N at least 1, or -1 for what the others leave"
      )
  if list(sizes.values()).count(-1) > 1:
    raise ConfigError(f"mesh {axes!r}: found -1 for several axes, expected it once at most")
  return sizes


def _listed(numbers: Sequence[int]) -> str:
  return ", ".join(map(str, numbers))
