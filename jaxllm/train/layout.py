"""Where the state of training lies on a mesh: parameters by rules, and what follows them by ZeRO's stage."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm import parallel, tree
from jaxllm.config import ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.leaf import LoRA, QTensor
from jaxllm.parallel import RULES, RuleSet

Path = tuple[str, ...]
SHARDS = "fsdp"
"""The axis over which ZeRO divides the state."""


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where each array of a state lies on a mesh.  Without a mesh every method gives back what it was given.

  What is shaped like a parameter lies as it does (gradients, moments, momenta, master weights), means of its rows and columns
  as the dimensions that they keep, and all else whole.  What a stage of ZeRO divides (`parallel.RuleSet`) is divided over fsdp
  in the largest dimension that it divides, where the rules have not done so; an array without one stays whole.
  Of `params` paths and shapes are read, padded or not, and arrays may be abstract: but where a method constrains them, which
  is for a program that is traced.
  """

  mesh: Mesh | None
  rules: RuleSet
  cfg: ModelConfig

  @property
  def splits_table(self) -> bool:
    """Whether products, and so tokens, read the embedding's width in parts over fsdp (`nn.Transformer.split_table`)."""
    width = (None, *tree.first_match(self.rules, "embed"))[-1]
    return SHARDS in (width if isinstance(width, tuple) else (width,))

  def state(self, state: dict[str, Any]) -> dict[str, Any]:
    """A jax.ShapeDtypeStruct for each array of a `step.State`: its shape with the vocabulary padded, and its sharding."""
    params = self._placed(state["params"], self.rules.stage >= 3)
    follow = lambda part: self.following(part, state["params"], 1)
    return {name: params if name == "params" else follow(part) for name, part in state.items()}

  def made(self, make: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """The state make(*args), whose vocabulary is not padded, computed by each device for what it holds."""
    if self.mesh is None:
      return make(*args)
    target = self.state(jax.eval_shape(make, *args))
    shardings = jax.tree.map(lambda struct: struct.sharding, target)
    return jax.jit(lambda *args: _resized(make(*args), target), out_shardings=shardings)(*args)

  def check_scope(self) -> None:
    """ConfigError where the mesh in scope is another, as activations would lie anywhere."""
    if self.mesh is not None and jax.sharding.get_abstract_mesh() != self.mesh.abstract_mesh:
      raise ConfigError(
        f"mesh: found a call outside of it, expected one within jax.set_mesh of the mesh {parallel.spell(self.mesh)}"
      )

  def kept(self, state: dict[str, Any]) -> dict[str, Any]:
    """A state, constrained to its layout."""
    return state if self.mesh is None else _constrained(state, self.state(state))

  def computed_with(self, params: Any) -> Any:
    """Parameters, constrained to lie as the rules say, which is how products read them."""
    if self.mesh is None or self.rules.stage < 3:
      return params
    return _constrained(params, self._placed(params, False))

  def gradients(self, grads: Any, params: Any) -> Any:
    """Gradients, constrained to lie as parameters do, or from stage 2 on as the optimizer's state."""
    return grads if self.mesh is None else _constrained(grads, self.following(grads, params, 2))

  def changed(self, weights: Any, params: Any) -> Any:
    """Weights that the optimizer is to change, constrained to lie as its state, so that each device changes its part."""
    return weights if self.mesh is None else _constrained(weights, self.following(weights, params, 1))

  def following(self, values: Any, params: Any, stage: int) -> Any:
    """Shapes and shardings of arrays, of any tree, that lie as the parameters whose paths theirs end with.

    stage: the first that divides them over fsdp.
    """
    given, placed = _named(params), _named(self._placed(params, False))
    whole = NamedSharding(self.mesh, PartitionSpec())

    def of_leaf(path, leaf):
      name, dims = _source(path, leaf, given)
      if dims is None:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole)
      at = placed[name]
      spec = tuple(at.sharding.spec) + (None,) * (len(at.shape) - len(at.sharding.spec))
      shape, entries = tuple(at.shape[d] for d in dims), [spec[d] for d in dims]
      struct = jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=_on(self.mesh, entries))
      return _spread(struct) if self.rules.stage >= stage else struct

    return jax.tree_util.tree_map_with_path(of_leaf, values)

  def unpadded(self, values: Any, params: Any) -> Any:
    """Arrays that follow parameters without padding of the vocabulary, so that means over an array do not have it."""
    return self._sized(values, params, jax.eval_shape(lambda p: parallel.unpad(p, self.cfg), params))

  def padded(self, values: Any, params: Any) -> Any:
    """The inverse of `unpadded`: params are padded ones."""
    plain = jax.eval_shape(lambda p: parallel.unpad(p, self.cfg), params)
    return self._sized(values, plain, params)

  def _placed(self, params: Any, spread: bool) -> Any:
    """Shapes and shardings of parameters, divided further or not."""
    placed = parallel.layout(params, self.mesh, self.rules, self.cfg)
    if not spread:
      return placed

    def of_leaf(leaf: Any) -> Any:
      if isinstance(leaf, LoRA):
        return dataclasses.replace(leaf, a=_spread(leaf.a), b=_spread(leaf.b))
      return leaf if isinstance(leaf, QTensor) else jax.tree.map(_spread, leaf)

    return tree.unflatten({path: of_leaf(leaf) for path, leaf in tree.flatten(placed).items()})

  def _sized(self, values: Any, params: Any, target: Any) -> Any:
    """Arrays that follow parameters of one size, made to follow those of another."""
    old, new = _named(params), _named(target)
    if self.mesh is None or all(x.shape == new[name].shape for name, x in old.items()):
      return values

    def of_leaf(path, leaf):
      name, dims = _source(path, leaf, old)
      return leaf if dims is None else _fitted(leaf, tuple(new[name].shape[d] for d in dims))

    return jax.tree_util.tree_map_with_path(of_leaf, values)


def make_layout(
  cfg: ModelConfig,
  mesh: Mesh | None,
  rules: RuleSet | parallel.rules.Rules | None = None,
  *,
  rows: int = 0,
  length: int = 0,
) -> Layout:
  """The layout of a run whose steps read `rows` rows of `length` tokens at a time (0: any).

  rules: default those that use all axes of the mesh; plain rules, without a stage, are those of stage 0.
  Raises ConfigError for rules that divide over an axis that the mesh lacks, or leave tensor unused, and for rows and tokens
  that its axes do not divide.
  """
  if mesh is None:
    if rules is not None:
      raise ConfigError("rules: found some without a mesh, expected both or neither; give mesh too")
    return Layout(None, RULES["data"], cfg)
  if rules is None:
    rules = RULES[parallel.default_rules(mesh)]
  elif not isinstance(rules, RuleSet):
    rules = RuleSet(tuple(rules))
  _check_axes(mesh, rules)
  shards, tensor = parallel.batch_shards(mesh), mesh.shape.get("tensor", 1)
  if rows % shards:
    raise ConfigError(
      f"batch_size: found {rows} rows at a time on the mesh {parallel.spell(mesh)}, expected a multiple of {shards} "
      f"(data x fsdp); the nearest is {_nearest(rows, shards)}"
    )
  if rules.sequence and length % tensor:
    raise ConfigError(
      f"length: found {length} tokens on the mesh {parallel.spell(mesh)}, expected a multiple of {tensor}, as the rules "
      f"split tokens over tensor; the nearest is {_nearest(length, tensor)}, or take the rules tensor"
    )
  return Layout(mesh, rules, cfg)


def _check_axes(mesh: Mesh, rules: RuleSet) -> None:
  name = next((name for name, known in RULES.items() if known == rules), "given")
  shape, spelled = mesh.shape, parallel.spell(mesh)
  missing = sorted(rules.axes - set(shape))
  idle = shape.get("tensor", 1) > 1 and "tensor" not in rules.axes
  if not missing and not idle:
    return
  used = {axis for axis in shape if axis != "data"}
  fits = [one for one, known in RULES.items() if known.axes == used] or [parallel.default_rules(mesh)]
  if missing:
    found = f"which split over {missing[0]}, on the mesh {spelled}, which does not have it"
    free = [axis for axis in shape if axis not in rules.axes]
    renamed = spelled.replace(f"{free[-1]}=", f"{missing[0]}=") if free else f"{spelled},{missing[0]}=1"
    hint = f"the mesh {renamed}"
  else:
    found = f"which do not split over tensor, on the mesh {spelled}: its devices would compute the same"
    hint = f"the mesh {spelled.replace('tensor=', 'fsdp=' if 'fsdp' not in shape else 'data=')}"
    if "fsdp" in shape and "data" in shape:
      hint = "a mesh without tensor"
  raise ConfigError(f"rules: found {name}, {found}; the nearest are {hint}, or the rules {' or '.join(fits)}")


def _nearest(size: int, shards: int) -> int:
  return max(1, round(size / shards)) * shards


def _named(values: Any) -> dict[Path, Any]:
  """{names from the root: array} of a tree."""
  return {_names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(values)}


def _names(path: tuple[Any, ...]) -> Path:
  """Of a key, an index or a field alike: the factors of LoRA are fields of a parameter, and keys where they are trained."""
  return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _source(path: tuple[Any, ...], leaf: Any, params: dict[Path, Any]) -> tuple[Path, tuple[int, ...] | None]:
  """The parameter whose path the leaf's ends with, and which of its dimensions the leaf has; None if it is not like one."""
  names = _names(path)
  name = next((names[i:] for i in range(len(names)) if names[i:] in params), ())
  if not name:
    return name, None
  shape = tuple(params[name].shape)
  every = tuple(range(len(shape)))
  if leaf.shape == shape:
    return name, every
  # Adafactor's means of rows and columns; of a square matrix either will do, as it decides where they lie and no number
  kept = (every[:i] + every[i + 1 :] for i in every)
  return name, next((dims for dims in kept if leaf.shape == tuple(shape[d] for d in dims)), None)


def _spread(struct: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  """Divided over fsdp in one more dimension, unless it is already, or that divides none."""
  mesh, shape = struct.sharding.mesh, struct.shape
  entries = [
    () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
    for entry in tuple(struct.sharding.spec) + (None,) * (len(shape) - len(struct.sharding.spec))
  ]
  if SHARDS not in mesh.shape or any(SHARDS in entry for entry in entries):
    return struct
  parts = [
    size // math.prod(mesh.shape[a] for a in entry) for size, entry in zip(shape, entries, strict=True)
  ]
  # one that is whole first, and the largest of them
  order = sorted(range(len(shape)), key=lambda d: (bool(entries[d]), -parts[d]))
  chosen = next((d for d in order if parts[d] % mesh.shape[SHARDS] == 0), None)
  if chosen is None:
    return struct
  entries[chosen] += (SHARDS,)
  spec = [entry[0] if len(entry) == 1 else entry or None for entry in entries]
  return jax.ShapeDtypeStruct(shape, struct.dtype, sharding=_on(mesh, spec))


def _on(mesh: Mesh, entries: list[Any]) -> NamedSharding:
  while entries and entries[-1] is None:
    entries.pop()
  return NamedSharding(mesh, PartitionSpec(*entries))


def _constrained(values: Any, target: Any) -> Any:
  return jax.tree.map(lambda x, at: jax.lax.with_sharding_constraint(x, at.sharding), values, target)


def _resized(values: Any, target: Any) -> Any:
  return jax.tree.map(lambda x, at: _fitted(x, tuple(at.shape)), values, target)


def _fitted(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """x cut, or with 0 at its end."""
  if x.shape == shape:
    return x
  x = x[tuple(map(slice, shape))]
  return jnp.pad(x, [(0, n - have) for n, have in zip(shape, x.shape, strict=True)])
