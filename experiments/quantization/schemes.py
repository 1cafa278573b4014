"""Which schemes a run compares: by name, with fields where wanted, on the weights of a model."""

from __future__ import annotations

import ast
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import quant, tree
from jaxllm.config import ModelConfig
from jaxllm.errors import ConfigError, JaxllmError
from jaxllm.nn.shapes import expected_shapes
from jaxllm.study import choices

NONE = "none"
"""The model as loaded, which every other is compared with."""


def parse(text: str) -> dict[str, Any]:
  """{"int4:group=32": scheme} of --schemes, in the order given, without `none`, which is always there.

  Raises ConfigError for a name that is not in quant.SCHEMES, one given twice, and fields that the scheme has not.
  """
  flag = f"--schemes={text}"
  items = [item.strip() for item in text.split(",")]
  items = list(quant.SCHEMES) if text == "all" else choices.choice_list("schemes", text, items)
  found = {}
  for item in items:
    name, *fields = item.split(":")
    if item == NONE:
      continue
    if name not in quant.SCHEMES:
      near = choices.nearest(name, list(quant.SCHEMES))
      raise ConfigError(f"{flag}: {name!r} is not known{near}; allowed: all, {', '.join(quant.SCHEMES)}")
    try:
      found[item] = quant.SCHEMES[name](**dict(map(_field, fields)))
    except (TypeError, ValueError) as e:  # ConfigError is a ValueError
      raise ConfigError(f"{flag}: {item}: {e}") from None
  if not found:
    raise ConfigError(
      f"{flag}: nothing to compare with the model as it is; give some of {', '.join(quant.SCHEMES)}"
    )
  return found


def _field(text: str) -> tuple[str, Any]:
  """("group", 32) of "group=32"; what is no Python literal is text."""
  name, equals, value = text.partition("=")
  if not equals:
    raise ConfigError(f"found {text!r}, expected field=value")
  try:
    return name, ast.literal_eval(value)
  except (SyntaxError, ValueError):
    return name, value


def rules(f, cfg: ModelConfig) -> list[tuple[str, bool]]:
  """What is quantized beside the matrices of the layers."""
  return [("embed" if cfg.tie_embeddings else "head", True)] if f.quantize_head else []


def chosen_paths(cfg: ModelConfig, own_rules: list[tuple[str, bool]]) -> dict[str, tuple[int, ...]]:
  """{path: shape} of the weights that are quantized."""
  rule = [*own_rules, *quant.DEFAULT, (".+", False)]
  return {p: shape for p, shape in expected_shapes(cfg).items() if tree.first_match(rule, p) is not False}


def fitting(f, cfg: ModelConfig) -> tuple[dict[str, Any], dict[str, str]]:
  """(the schemes that can hold the model's weights, {name: why not} of others), by shapes alone.

  One that was asked for by name and cannot is a ConfigError; of --schemes=all it is left out, or has smaller groups where those
  divide the weights.
  """
  own_rules, kept, left_out = rules(f, cfg), {}, {}
  shapes = chosen_paths(cfg, own_rules)
  if "embed" in shapes:  # a tied head is the table's transpose
    shapes["embed"] = shapes["embed"][::-1]
  refused = lambda scheme: _refused(scheme, sorted(set(shapes.values())), own_rules)
  for name, scheme in parse(f.schemes).items():
    if not (reason := refused(scheme)):
      kept[name] = scheme
      continue
    if f.schemes != "all":
      raise ConfigError(f"--schemes={f.schemes}: {name} cannot hold the weights of the model: {reason}")
    instead = {label: one for label, one in _smaller(name, scheme).items() if not refused(one)}
    left_out[name] = reason + "".join(f"; in its place {label}" for label in list(instead)[:1])
    kept |= dict(list(instead.items())[:1])
    print(f"--schemes=all without {name}: {left_out[name]}")
  if not kept:
    raise ConfigError("--schemes=all: no scheme can hold the weights of the model, for the reasons above")
  return kept, left_out


def _smaller(name: str, scheme: Any) -> dict[str, Any]:
  """The scheme with its groups or blocks halved and halved again, down to 16 weights, by the names that --schemes takes."""
  (field, size) = next(((n, getattr(scheme, n)) for n in ("group", "block") if hasattr(scheme, n)), ("", 0))
  found = {}
  while size >= 32 and size % 2 == 0:
    size //= 2
    found[f"{name}:{field}={size}"] = dataclasses.replace(scheme, **{field: size})
  return found


def _refused(scheme: Any, shapes: list[tuple[int, ...]], own_rules: list[tuple[str, bool]]) -> str | None:
  try:
    for (
      path,
      _,
    ) in own_rules:  # whether it can be read as a quantized weight at all, which is no matter of its size
      quant.apply({path: np.ones((256, 256), np.float32)}, scheme, own_rules)
    for shape in shapes:
      jax.eval_shape(scheme.quantize, jax.ShapeDtypeStruct(shape, jnp.float32))
  except JaxllmError as e:
    return str(e)
  return None
