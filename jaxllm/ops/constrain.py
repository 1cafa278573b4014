"""Where activations lie on a mesh: one fixed table from shape letters to mesh axes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
from jax.sharding import AxisType, PartitionSpec

AXES = ("data", "fsdp", "tensor")
"""The names that mesh axes have: copies of the model, shards of parameters over the batch, and shards of each product."""

LETTERS = dict.fromkeys("BC", ("data", "fsdp")) | dict.fromkeys("NKFV", ("tensor",))
"""The axes over which the dimension of a letter is split (C: tokens of several rows, one after the other); others are whole."""


def constrain(x: jax.Array, letters: str) -> jax.Array:
  """x, laid out over the mesh in scope as `letters` say, one a dimension: "BTNH" splits rows of the batch and heads.

  The mesh is that of `jax.set_mesh`, which is part of a compiled program's identity; without one, or with one device, x comes
  back as it is.  A dimension that its axes do not divide stays whole, as do those without an axis: on a mesh, "BTD" gathers D.
  Axes that are not left to the compiler (inside `jax.shard_map`) are not touched.
  """
  assert len(letters) == x.ndim, (letters, x.shape)
  sizes = compiler_axes()
  if all(size == 1 for size in sizes.values()):
    return x
  return jax.lax.with_sharding_constraint(x, activation_spec(x.shape, letters, sizes))


def compiler_axes() -> dict[str, int]:
  """The sizes of the axes of the mesh in scope that are left to the compiler."""
  mesh = jax.sharding.get_abstract_mesh()
  return {
    name: mesh.shape[name]
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
    if kind == AxisType.Auto
  }


def batch_shards() -> int:
  """Into how many parts the mesh in scope splits a batch; 1 without one."""
  sizes = jax.sharding.get_abstract_mesh().shape
  return math.prod(sizes.get(axis, 1) for axis in LETTERS["B"])


def activation_spec(shape: tuple[int, ...], letters: str, sizes: Mapping[str, int]) -> PartitionSpec:
  """How an array of `shape` lies on a mesh of these axis sizes."""

  def entry(size: int, letter: str) -> tuple[str, ...] | None:
    axes = tuple(axis for axis in LETTERS.get(letter, ()) if axis in sizes)
    return axes if axes and size % math.prod(sizes[axis] for axis in axes) == 0 else None

  return PartitionSpec(*map(entry, shape, letters))
