"""Quantized weights in files: each part of a `leaf.QTensor` is a tensor of its own, and config.json says how each is held.

  "quantization_config": {"format": "jaxllm", "schemes": [
    {"scheme": "Int8", "fields": {"per": "column", "symmetric": true}, "weights": ["layers/0/attn/q/w", ...]}]}

has the class and the fields of each scheme, which is one of `quant.SCHEMES`, and the parameters that it holds.  Of the weight
`x.weight` the part "value" is that tensor, [out, in], and another, as "scale", is `x.weight_scale`; where weights share a
tensor, each is one of its own, `x.weight.q`.

There is no quant_method, on purpose: transformers refuses a model without one, and ignores one that it does not know, so that
it would take the integers for weights.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.hf.family import Key, Whole
from jaxllm.hf.plain import brief
from jaxllm.hf.settings import GROUP, TEXT, Kind, Settings, one_of
from jaxllm.leaf import QTensor, Scheme
from jaxllm.quant import SCHEMES
from jaxllm.quant.quantize import TABLES

NAME, FORMAT = "quantization_config", "jaxllm"
CONFIG = Kind(
  f"no such key, or format = {FORMAT!r}, as hf.save writes it: quantized checkpoints of others are not read",
  lambda x: isinstance(x, Mapping) and x.get("format") == FORMAT and "quant_method" not in x,
)
_LIST = Kind("a list of objects", lambda x: isinstance(x, list) and all(map(GROUP.fits, x)))
_PATHS = Kind(
  "a list of different parameters",
  lambda x: isinstance(x, list) and all(map(TEXT.fits, x)) and len(set(x)) == len(x),
)


def write(params: Mapping[str, Any]) -> dict[str, Any]:
  """The settings that config.json has of the quantized ones of {path: parameter}; none where there are none.

  Raises CheckpointError for a scheme that is none of `quant.SCHEMES`, or has an infinite field: it could not be read.
  """
  weights: dict[Scheme, list[str]] = {}
  for path, leaf in params.items():
    if isinstance(leaf, QTensor):
      weights.setdefault(leaf.scheme, []).append(path)
  known, entries = _classes(), []
  for scheme, paths in weights.items():
    if known.get(type(scheme).__name__) is not type(scheme):
      raise CheckpointError(
        f"params: {paths[0]}: found a weight of {scheme}, expected a scheme of {', '.join(known)}; put it into quant.SCHEMES"
      )
    fields = {field.name: getattr(scheme, field.name) for field in dataclasses.fields(scheme)}
    if odd := [name for name, x in fields.items() if isinstance(x, float) and not math.isfinite(x)]:
      raise CheckpointError(
        f"params: {paths[0]}: found {odd[0]} = {fields[odd[0]]} of {scheme}, expected a finite number, as JSON has no "
        "other; take a large one"
      )
    entries.append({"scheme": type(scheme).__name__, "fields": fields, "weights": paths})
  return {NAME: {"format": FORMAT, "schemes": entries}} if entries else {}


def expected(
  plain: Mapping[str, Any], source: str, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, QTensor]:
  """{path: the weight, its parts jax.ShapeDtypeStructs} of all that config.json says is quantized, of a model of these shapes.

  Raises ConfigError for a scheme that is not known or cannot have these fields, and for parameters that the model does not have
  or that the scheme cannot hold.
  """
  if plain.get(NAME) is None:
    return {}
  s = Settings(plain, source).group(NAME)
  s.take("format", one_of([FORMAT]))
  entries = s.take("schemes", _LIST)
  s.finish()
  held, structs = {}, {}
  for i, entry in enumerate(entries):
    one = Settings(entry, source, f"{NAME}.schemes[{i}]")
    scheme = _scheme(one)
    for path in one.take("weights", _PATHS):
      if path not in shapes or path in held:
        raise one.error("weights", f"parameters of the model, each once: not {brief(path)}")
      table = re.fullmatch(TABLES, path) is not None
      known = (scheme, shapes[path][::-1] if table else shapes[path])
      if known not in structs:
        structs[known] = _parts(*known, f"{source}: {NAME}.schemes[{i}]: {path}", ConfigError)
      held[path] = QTensor(structs[known], scheme, table)
    one.finish()
  return held


def check(path: str, leaf: QTensor, shape: tuple[int, ...]) -> None:
  """Raises CheckpointError where the parts of a weight are not those of its scheme and this shape: it could not be read."""
  held = shape[::-1] if leaf.table else shape
  wanted = _parts(leaf.scheme, held, f"params: {path}", CheckpointError)
  kinds = lambda parts: {name: f"{part.dtype}{list(part.shape)}" for name, part in parts.items()}
  if kinds(leaf.parts) != kinds(wanted):
    raise CheckpointError(
      f"params: {path}: found the parts {kinds(leaf.parts)}, expected {kinds(wanted)} of {leaf.scheme} and a weight of {shape}"
    )


def opened(params: Mapping[str, Any]) -> dict[str, Any]:
  """{path: array} with "<path>/<part>" for each part of a quantized weight."""
  flat = {}
  for path, leaf in params.items():
    parts = leaf.parts if isinstance(leaf, QTensor) else None
    flat |= {path: leaf} if parts is None else {f"{path}/{name}": part for name, part in parts.items()}
  return flat


def opened_shapes(
  shapes: Mapping[str, tuple[int, ...]], held: Mapping[str, QTensor]
) -> dict[str, tuple[int, ...]]:
  """The shapes of parameters, with those of the parts of the quantized ones in their place."""
  kept = {path: shape for path, shape in shapes.items() if path not in held}
  return kept | {path: tuple(part.shape) for path, part in opened(held).items()}


def closed(flat: Mapping[str, Any], held: Mapping[str, QTensor]) -> dict[str, Any]:
  """The inverse of `opened`, of the weights that are quantized as `held` is."""
  inside = opened(held)
  params = {path: leaf for path, leaf in flat.items() if path not in inside}
  for path, leaf in held.items():
    params[path] = dataclasses.replace(leaf, parts={name: flat[f"{path}/{name}"] for name in leaf.parts})
  return params


def opened_keys(keys: Sequence[Key], held: Mapping[str, QTensor]) -> list[Key]:
  """The keys with one for each part of the weights that are quantized, and those that share a tensor with such a one apart."""
  out = []
  for key in keys:
    if held.keys().isdisjoint(key.ours):
      out.append(key)
      continue
    for path in key.ours:
      theirs = key.theirs if len(key.ours) == 1 else f"{key.theirs}.{path.split('/')[-2]}"
      if path not in held:
        out.append(dataclasses.replace(key, theirs=theirs, ours=(path,), layout=Whole()))
        continue
      for name, part in held[path].parts.items():
        named = theirs if name == "value" else f"{theirs}_{name}"
        fields = dict(stored=None, layout=Whole(), dtype=part.dtype)
        out.append(dataclasses.replace(key, theirs=named, ours=(f"{path}/{name}",), **fields))
  return out


def _classes() -> dict[str, type]:
  """The schemes by the names of their classes."""
  return {type(scheme).__name__: type(scheme) for scheme in (make() for make in SCHEMES.values())}


def _scheme(s: Settings) -> Scheme:
  known = _classes()
  kind = known[s.take("scheme", one_of(known))]
  fields = {name: _tuples(value) for name, value in s.take("fields", GROUP).items()}
  names = [field.name for field in dataclasses.fields(kind)]
  if fields.keys() != set(names):
    raise s.error("fields", f"{', '.join(names) or 'nothing'}, each once")
  try:
    scheme = kind(**fields)
    hash(scheme)
  except (TypeError, ValueError) as error:
    raise ConfigError(f"{s.source}: {s.path}.fields: {error}") from None
  return scheme


def _tuples(value: Any) -> Any:
  """Lists of JSON as the tuples that they were."""
  return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _parts(scheme: Scheme, shape: tuple[int, ...], where: str, error: type[Exception]) -> dict[str, Any]:
  """The parts of a weight [..., in, out], as jax.ShapeDtypeStructs."""
  try:
    return jax.eval_shape(scheme.quantize, jax.ShapeDtypeStruct(shape, jnp.float32))
  except (
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
  ) as problem:  # whatever does not fit such a scheme
    raise error(f"{where}: {scheme} cannot hold a weight of {shape}: {problem}") from None
