"""LoRA: weights of a tree with corrections of low rank, which are all that is trained; QLoRA where they are quantized.

params = lora.apply(params, rank=16, alpha=32, key=jax.random.key(0))
loss = lambda adapters: loss_of(lora.with_adapters(params, adapters))
grads = jax.grad(loss)(lora.adapters(params))

`train.step` does so with parameters that have LoRA: make_step(model, config)(init_state(model, config, seed, params), tokens).
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm import tree
from jaxllm.errors import ConfigError
from jaxllm.leaf import LoRA, Matrix, QTensor, dense

ALL_LINEAR = (
  (r"(layers|blocks)/\d+/attn/[qkvo]/w", True),
  (r"(layers|blocks)/\d+/mlp/(gate|up|down)/w", True),
)
"""The matrices of layers, but those of experts.  Source: Dettmers et al. (2023), QLoRA, section 4 (all linear layers)."""

MATRICES = r"(?!.*/experts/).+/w|head|embed_in|embed_out"
"""What can have LoRA: matrices that rows are multiplied with, one matrix all rows."""


def apply(
  params: Any,
  rules: Sequence[tuple[str, bool]] = ALL_LINEAR,
  *,
  rank: int,
  alpha: float,
  key: jax.Array,
) -> dict[str, Any]:
  """The tree with a `leaf.LoRA` in place of each weight that the rules choose, which computes what it did until it is trained.

  w = base + (alpha / rank) a b, float32 a [in, rank] from U(-1 / sqrt(in), 1 / sqrt(in)), which is Kaiming's with a slope of
  sqrt(5), and b = 0: the weight keeps its form (an array, a `Matrix`, a `QTensor`) as the base.
  rules: (regular expression of a whole path, whether the weight gets LoRA); the first that matches counts, and all others do
  not.  A weight's `a` depends on the key and its path only.
  Raises ConfigError for what is no rule, or one that matches no parameter, for a weight that has LoRA already or is no matrix,
  and for a rank that is not from 1 to the smaller dimension of each.
  Source: Hu et al. (2021), LoRA, section 4.1; the range of `a` as in peft.
  """
  if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < float("inf"):
    raise ConfigError(
      f"alpha: found {alpha!r}, expected a finite number above 0; often it is rank, or twice it"
    )
  flat = tree.flatten(params)
  if rules is not ALL_LINEAR:
    tree.check_rules(rules, flat, lambda value: isinstance(value, bool), "True or False")
  chosen = [path for path in flat if tree.first_match([*rules, (".+", False)], path)]
  if not chosen:
    raise ConfigError("rules: no parameter gets LoRA; leave apply out, or give a rule with True")
  for path in chosen:
    flat[path] = _wrapped(path, flat[path], rank, alpha, jax.random.fold_in(key, zlib.crc32(path.encode())))
  return tree.unflatten(flat)


def _wrapped(path: str, leaf: Any, rank: int, alpha: float, key: jax.Array) -> LoRA:
  if isinstance(leaf, LoRA):
    raise ConfigError(f"{path}: found a weight with LoRA, expected one without; merge or unmerge it first")
  if not re.fullmatch(MATRICES, path) or leaf.ndim < 2:
    raise ConfigError(
      f"{path}: found {tuple(leaf.shape)}, expected a matrix that all rows are multiplied with ({MATRICES}); leave it out by "
      "a rule"
    )
  *leading, rows, columns = leaf.shape
  if type(rank) is not int or not 1 <= rank <= min(rows, columns):
    raise ConfigError(
      f"rank: found {rank!r}, expected an integer from 1 to {min(rows, columns)}, as {path} is {rows} x {columns}"
    )
  a = jax.random.uniform(key, (*leading, rows, rank), minval=-(rows**-0.5), maxval=rows**-0.5)
  return LoRA(leaf, a, jnp.zeros((*leading, rank, columns)), alpha / rank)


def adapters(params: Mapping[str, Any]) -> dict[str, Any]:
  """What is trained: the tree of {"a", "b"} at the path of each weight with LoRA; an optimizer's state is of these."""
  flat = {p: {"a": x.a, "b": x.b} for p, x in tree.flatten(params).items() if isinstance(x, LoRA)}
  if not flat:
    raise ConfigError("params: found no weight with LoRA, expected some; give what lora.apply gives")
  return tree.unflatten(flat)


def with_adapters(params: Mapping[str, Any], adapters: Mapping[str, Any]) -> dict[str, Any]:
  """The tree with other factors, such as `adapters` gave them; gradients by them are gradients of these alone.

  Raises ConfigError where they are not those of the same weights and shapes.
  """
  flat, new = tree.flatten(params), tree.flatten(adapters)
  old = {f"{p}/{name}": getattr(x, name) for p, x in flat.items() if isinstance(x, LoRA) for name in "ab"}
  if lines := tree.diff(tree.unflatten(old), tree.unflatten(new), dtypes=False):
    raise ConfigError(f"adapters: not those of the parameters: {'; '.join(lines[:6])}")
  put = lambda path, x: dataclasses.replace(x, a=new[f"{path}/a"], b=new[f"{path}/b"])
  return tree.unflatten({path: put(path, x) if isinstance(x, LoRA) else x for path, x in flat.items()})


def trained(params: Mapping[str, Any]) -> Mapping[str, Any]:
  """What an optimizer changes: the `adapters` where there are some, else all parameters; ConfigError if these are quantized."""
  if has(params):
    return adapters(params)
  if held := [path for path, x in tree.flatten(params).items() if isinstance(x, QTensor)]:
    raise ConfigError(
      f"{held[0]}: found a quantized weight without LoRA, expected floats to train; take lora.apply(params, ...) first"
    )
  return params


def with_trained(params: Mapping[str, Any], trained: Mapping[str, Any]) -> Mapping[str, Any]:
  """The tree with other values of what `trained` gave."""
  return with_adapters(params, trained) if has(params) else trained


def has(params: Mapping[str, Any]) -> bool:
  """Whether any weight has LoRA."""
  return any(isinstance(x, LoRA) for x in tree.flatten(params).values())


def merge(params: Mapping[str, Any]) -> dict[str, Any]:
  """The tree with base + scale a b in place of each LoRA, in the type and the layout of its base; of a `QTensor` float32.

  Of a bfloat16 base the sum is rounded to it: each weight is off by 2^-8 of itself at most, and scale a b that is less than
  2^-9 of the base is lost, while unmerged it counts.  Merge into a float32 copy of the base to keep it.
  """
  return _each(params, _merged)


def unmerge(params: Mapping[str, Any]) -> dict[str, Any]:
  """The tree with its base in place of each LoRA: the very leaf that `apply` was given, as `merge` does not change it.

  params: those with LoRA, not what `merge` gave, which holds no bases any more.  Raises ConfigError where there is none.
  """
  return _each(params, lambda leaf: leaf.base)


def _each(params: Mapping[str, Any], change: Any) -> dict[str, Any]:
  flat = tree.flatten(params)
  if not has(params):
    raise ConfigError(
      "params: found no weight with LoRA, expected some; give what lora.apply gives, not a merged tree"
    )
  return tree.unflatten({path: change(x) if isinstance(x, LoRA) else x for path, x in flat.items()})


def _merged(leaf: LoRA) -> Any:
  w, base = dense(leaf), leaf.base
  if isinstance(base, QTensor):
    return w
  if isinstance(base, Matrix):
    value = w if base.stored == "io" else jnp.swapaxes(w, -1, -2)
    return dataclasses.replace(base, value=value.astype(base.dtype))
  return w.astype(base.dtype)
