"""Where activations lie on a mesh: one fixed table from shape letters to mesh axes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
from jax.sharding import AxisType, PartitionSpec

from jaxllm.errors import ConfigError

AXES = ("data", "fsdp", "tensor")
"""The names that mesh axes have: copies of the model, shards of parameters over the batch, and shards of each product."""

LETTERS = dict.fromkeys("BC", ("data", "fsdp")) | dict.fromkeys("NKFV", ("tensor",))
LETTERS |= {"b": ("data",), "d": ("fsdp",)}
"""The axes over which the dimension of a letter is split (C: tokens of several rows, one after the other); others are whole.

b, d: rows and width of what is `looked_up`.
"""

SEQUENCE = {"T": ("tensor",)}
"""And where tokens are split between blocks.  Source: Korthikanti et al. (2022), section 4.2.2."""


def constrain(x: jax.Array, letters: str, sequence: bool = False) -> jax.Array:
  """x, laid out over the mesh in scope as `letters` say, one a dimension: "BTNH" splits rows of the batch and heads.

  The mesh is that of `jax.set_mesh`, which is part of a compiled program's identity; without one, or with one device, x comes
  back as it is.  A dimension that its axes do not divide stays whole, as do those without an axis: on a mesh, "BTD" gathers D.
  sequence: T is split over `tensor`; ConfigError where that does not divide it.  Axes that are not left to the compiler
  (inside `jax.shard_map`) are not touched.
  """
  assert len(letters) == x.ndim, (letters, x.shape)
  sizes = compiler_axes()
  if all(size == 1 for size in sizes.values()):
    return x
  if sequence and x.shape[letters.index("T")] % (tensor := sizes.get("tensor", 1)):
    T = x.shape[letters.index("T")]
    raise ConfigError(
      f"sequence: found {T} tokens in a row over tensor = {tensor}, expected a multiple of it, as they are split between "
      f"blocks; the nearest is {max(1, round(T / tensor)) * tensor}, or take the rules tensor"
    )
  return jax.lax.with_sharding_constraint(x, activation_spec(x.shape, letters, sizes, sequence))


def gathered(x_BTD: jax.Array, sequence: bool) -> jax.Array:
  """The residual stream as products over a split width read it: where tokens are split, an all-gather of them.

  The gradient is split by a reduce-scatter.  A constraint alone would have it summed whole, as its transpose is itself.
  """
  return _gathered(x_BTD) if sequence else x_BTD


def summed(x_BTD: jax.Array, sequence: bool) -> jax.Array:
  """What products over a split width add to the residual stream: an all-reduce, or where tokens are split a reduce-scatter.

  That is the transpose of `gathered`.  Raises ConfigError for tokens that the axis does not divide.
  """
  return _summed(x_BTD) if sequence else constrain(x_BTD, "BTD")


def looked_up(x_BTD: jax.Array) -> jax.Array:
  """Rows of a table, on a mesh whose fsdp axis may divide the table's width: each device takes its part of all that axis' rows.

  An all-to-all then splits the rows.  From the width to the rows of all axes at once there is none: the compiler would give
  every device all rows, forward and backward.
  """
  sizes = compiler_axes()
  if sizes.get("fsdp", 1) == 1 or x_BTD.shape[-1] % sizes["fsdp"]:
    return x_BTD
  return jax.lax.with_sharding_constraint(x_BTD, activation_spec(x_BTD.shape, "b-d", sizes))


_whole = lambda x_BTD: constrain(x_BTD, "BTD")
_split = lambda x_BTD: constrain(x_BTD, "BTD", sequence=True)
_gathered, _summed = jax.custom_vjp(_whole), jax.custom_vjp(_split)
_gathered.defvjp(lambda x_BTD: (_whole(x_BTD), None), lambda _, g_BTD: (_split(g_BTD),))
_summed.defvjp(lambda x_BTD: (_split(x_BTD), None), lambda _, g_BTD: (_whole(g_BTD),))


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


def activation_spec(
  shape: tuple[int, ...], letters: str, sizes: Mapping[str, int], sequence: bool = False
) -> PartitionSpec:
  """How an array of `shape` lies on a mesh of these axis sizes."""
  table = LETTERS | SEQUENCE if sequence else LETTERS

  def entry(size: int, letter: str) -> tuple[str, ...] | None:
    axes = tuple(axis for axis in table.get(letter, ()) if axis in sizes)
    return axes if axes and size % math.prod(sizes[axis] for axis in axes) == 0 else None

  return PartitionSpec(*map(entry, shape, letters))
