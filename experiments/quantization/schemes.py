"""Which schemes a run compares: by name, with fields where wanted, on the weights of a model."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm import quant, tree
from jaxllm.config import ModelConfig
from jaxllm.errors import ConfigError, QuantError
from jaxllm.nn.shapes import expected_shapes
from jaxllm.study import choices

NONE = "none"
"""The model as loaded, which every other is compared with."""
WORDS = {"yes": True, "no": False}
"""Of a rule: in the scheme of the line, or as loaded."""


def parse(text: str) -> dict[str, Any]:
  """{"int4:group=32": scheme} of --schemes, in the order given, without `none`, which is always there.

  Raises ConfigError for an item given twice, and as `made` does.
  """
  flag = f"--schemes={text}"
  items = [item.strip() for item in text.split(",")]
  items = list(quant.SCHEMES) if text == "all" else choices.choice_list("schemes", text, items)
  found = {item: made(item, flag) for item in items if item != NONE}
  if not found:
    raise ConfigError(
      f"{flag}: nothing to compare with the model as it is; give some of {', '.join(quant.SCHEMES)}"
    )
  return found


def made(item: str, flag: str) -> Any:
  """The scheme of "int4:group=32".

  Raises ConfigError for a name that is not in quant.SCHEMES, fields that the scheme has not, and fields that make it what
  another name says, as bits=3 of int4: a line of a table is what its name says.
  """
  name, *fields = item.split(":")
  if name not in quant.SCHEMES:
    near = choices.nearest(name, list(quant.SCHEMES))
    raise ConfigError(f"{flag}: {name!r} is not known{near}; allowed: all, {', '.join(quant.SCHEMES)}")
  try:
    given = dict(map(_field, fields))
    if len(given) < len(fields):
      raise ConfigError("a field is there twice")
    scheme = quant.SCHEMES[name](**given)
  except (TypeError, ValueError) as e:  # ConfigError is a ValueError
    raise ConfigError(f"{flag}: {item}: {e}") from None
  names = _names(scheme)
  if name not in names:
    plain = quant.SCHEMES[names[0]]()
    more = [
      text for text, (field, x) in zip(fields, given.items(), strict=True) if getattr(plain, field) != x
    ]
    raise ConfigError(f"{flag}: {item} is what the name {names[0]} says; give {':'.join([names[0], *more])}")
  return scheme


def _names(scheme: Any) -> list[str]:
  """The names of quant.SCHEMES that say most of a scheme: int4_asym, and not int4, for one of 4 bits with zero points."""
  kin = [name for name, make in quant.SCHEMES.items() if type(make()) is type(scheme)]
  true = [name for name in kin if all(getattr(scheme, k) == v for k, v in _fixed(name).items())]
  most = max(len(_fixed(name)) for name in true)
  return [name for name in true if len(_fixed(name)) == most]


def _fixed(name: str) -> dict[str, Any]:
  """The fields that the name of a scheme says."""
  return getattr(quant.SCHEMES[name], "keywords", {})


def _field(text: str) -> tuple[str, Any]:
  """("group", 32) of "group=32"; true, false and 3+50 (a tuple, as a comma ends an item), or a Python literal, or text."""
  name, equals, value = text.partition("=")
  if not equals:
    raise ConfigError(f"found {text!r}, expected field=value")
  if re.fullmatch(r"\d+(\+\d+)+", value):
    return name, tuple(map(int, value.split("+")))
  try:
    return name, ast.literal_eval(value.capitalize() if value in ("true", "false") else value)
  except (SyntaxError, ValueError):
    return name, value


def parse_rules(texts: Sequence[str]) -> list[tuple[str, Any]]:
  """[(regular expression, True, False or a scheme)] of --weights; ConfigError for what is none, as `made` has it."""
  found = []
  for text in texts:
    pattern, equals, value = text.partition("=")
    flag = f"--weights={text}"
    if not (pattern and equals and value):
      raise ConfigError(f"{flag}: expected PATTERN=yes, PATTERN=no or PATTERN=a scheme")
    try:
      re.compile(pattern)
    except re.error as e:
      raise ConfigError(f"{flag}: {pattern!r} is no regular expression: {e}") from None
    found.append((pattern, WORDS[value] if value in WORDS else made(value, flag)))
  return found


def rules(f, cfg: ModelConfig) -> list[tuple[str, Any]]:
  """What says beside quant.DEFAULT which weights are quantized, the first that matches: --weights, then --quantize_head."""
  head = [("embed" if cfg.tie_embeddings else "head", True)] if f.quantize_head else []
  return [*parse_rules(f.weights), *head]


def chosen_paths(cfg: ModelConfig, own_rules: Sequence[tuple[str, Any]]) -> tuple[str, ...]:
  """The weights that are quantized."""
  rule = [*own_rules, *quant.DEFAULT, (".+", False)]
  return tuple(path for path in expected_shapes(cfg) if tree.first_match(rule, path) is not False)


def fitting(f, cfg: ModelConfig) -> tuple[dict[str, Any], dict[str, str]]:
  """(the schemes that can hold the model's weights, {name: why not} of others), by the shapes of these alone.

  One that was asked for by name and cannot is a ConfigError; of --schemes=all it is left out, or has smaller groups where those
  divide the weights.
  """
  own_rules, kept, left_out = rules(f, cfg), {}, {}
  shapes = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in expected_shapes(cfg).items()}

  def refused(scheme: Any) -> str | None:
    try:
      quant.apply(tree.unflatten(shapes), scheme, own_rules)
    except QuantError as e:
      return str(e)
    except ConfigError as e:
      raise ConfigError(f"--weights: {e}") from None
    return None

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
