"""Parameter trees: nested dicts with '/'-joined paths, the one selector, and the layouts of layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.errors import CheckpointError, ConfigError

Tree = Mapping[str, Any]


def flatten(tree: Tree, prefix: str = "") -> dict[str, Any]:
  """{"a/b": leaf} of a nested dict; anything that is not a mapping is a leaf."""
  flat = {}
  for name, value in tree.items():
    path = f"{prefix}/{name}" if prefix else str(name)
    flat |= flatten(value, path) if isinstance(value, Mapping) else {path: value}
  return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  """The nested dict of {"a/b": leaf}."""
  tree: dict[str, Any] = {}
  for path, leaf in flat.items():
    *parents, name = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf
  return tree


def first_match(rules: Iterable[tuple[str, Any]], path: str) -> Any:
  """The value of the first rule whose regular expression matches the whole path; no match raises ConfigError."""
  rules = list(rules)
  for pattern, value in rules:
    if re.fullmatch(pattern, path):
      return value
  raise ConfigError(f"no rule matches the parameter {path!r}; rules: {', '.join(p for p, _ in rules)}")


def check_rules(
  rules: Iterable[Any], paths: Collection[str], is_value: Callable[[Any], bool], expected: str
) -> None:
  """Raise ConfigError for what is no rule, no regular expression, no value as `expected` says, or matches none of the paths."""
  for rule in rules:
    if not isinstance(rule, (tuple, list)) or len(rule) != 2 or not isinstance(rule[0], str):
      raise ConfigError(f"rules: found {rule!r}, expected pairs of a regular expression and {expected}")
    pattern, value = rule
    if not is_value(value):
      raise ConfigError(f"rules: found {value!r} for {pattern!r}, expected {expected}")
    try:
      re.compile(pattern)
    except re.error as e:
      raise ConfigError(f"rules: found {pattern!r}, expected a regular expression: {e}") from None
    if not any(re.fullmatch(pattern, path) for path in paths):
      some = ", ".join([*paths][:6])
      raise ConfigError(f"rules: {pattern!r} matches no parameter; they are {some}, ...")


def diff(expected: Tree, found: Tree, dtypes: bool = True) -> list[str]:
  """Every difference in names, shapes and dtypes between two trees, a line each; empty when they agree.

  Shapes are the logical ones, whatever form a leaf is stored in (`jaxllm.leaf`).  dtypes False: of any type, as parameters keep
  that of the checkpoint they are from.
  """
  want, have = flatten(expected), flatten(found)
  lines = [f"missing: {path} {tuple(want[path].shape)}" for path in want if path not in have]
  lines += [f"unexpected: {path} {tuple(have[path].shape)}" for path in have if path not in want]
  for path in want.keys() & have.keys():
    w, h = want[path], have[path]
    if tuple(w.shape) != tuple(h.shape):
      lines.append(f"shape: {path} is {tuple(h.shape)}, expected {tuple(w.shape)}")
    elif dtypes and w.dtype != h.dtype:
      lines.append(f"dtype: {path} is {h.dtype}, expected {w.dtype}")
  return sorted(lines)


def check_same(expected: Tree, found: Tree, source: str, dtypes: bool = True) -> None:
  """Raise CheckpointError with every line of `diff` in one message; `source` says where `found` is from."""
  if lines := diff(expected, found, dtypes):
    shown = "\n  ".join(lines[:20]) + (f"\n  (+{len(lines) - 20} more)" if len(lines) > 20 else "")
    raise CheckpointError(f"{source}: the parameters do not fit the model\n  {shown}")


def stack_layers(params: Tree, period: int) -> dict[str, Any]:
  """layers/<i>/... -> blocks/<i % period>/..., layers of one place in the pattern stacked on a new first axis.

  This is the layout that scanned blocks train with; every checkpoint holds the other one.
  """
  layers = params["layers"]
  if len(layers) % period:
    raise ConfigError(f"{len(layers)} layers do not divide into a pattern of {period}")
  stack = lambda *leaves: jnp.stack(leaves)
  blocks = {
    str(place): jax.tree.map(stack, *(layers[str(i)] for i in range(place, len(layers), period)))
    for place in range(period)
  }
  return {name: value for name, value in params.items() if name != "layers"} | {"blocks": blocks}


def unstack_layers(params: Tree) -> dict[str, Any]:
  """The inverse of `stack_layers`."""
  blocks = params["blocks"]
  period, repeats = len(blocks), jax.tree.leaves(blocks)[0].shape[0]
  layers = {
    str(r * period + place): jax.tree.map(lambda leaf, r=r: leaf[r], blocks[str(place)])
    for r in range(repeats)
    for place in range(period)
  }
  return {name: value for name, value in params.items() if name != "blocks"} | {"layers": layers}


def num_parameters(params: Tree) -> int:
  """The number of elements of all leaves."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))
