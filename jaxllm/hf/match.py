"""Which tensor of the files holds which parameters of a model, and all that does not fit in one message."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np

from jaxllm.config import ModelConfig
from jaxllm.errors import CheckpointError, JaxllmError
from jaxllm.hf import quantized, sizes
from jaxllm.hf.family import Family, Key
from jaxllm.hf.files import Checkpoint, shown
from jaxllm.hf.header import Stored
from jaxllm.hf.scan import INFINITIES
from jaxllm.leaf import QTensor
from jaxllm.nn.shapes import expected_shapes

Shapes = Mapping[str, tuple[int, ...]]
_ROWS = 256  # compared at once: little memory


@dataclasses.dataclass(frozen=True)
class Source:
  """A config.json for messages: where it is, its settings, and what makes a ModelConfig of such settings."""

  path: str
  plain: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  read: Callable[[dict[str, Any]], ModelConfig] | None = None


def all_keys(family: Family, cfg: ModelConfig) -> list[Key]:
  """The family's keys, a tensor each: those with {i} once a layer, and those with {j} once a slice of the parameter."""
  keys = []
  for key in family.keys(cfg):
    layers = [key.numbered("i", i) for i in range(cfg.num_layers)] if "{i}" in key.theirs else [key]
    for one in layers:
      keys += [one.numbered("j", j, part=j) for j in range(one.stack)] if one.stack else [one]
  return keys


def count_keys(family: Family, cfg: ModelConfig) -> int:
  """How many `all_keys` are, without making them."""
  layers = lambda key: cfg.num_layers if "{i}" in key.theirs else 1
  return sum((key.stack or 1) * layers(key) for key in family.keys(cfg))


def all_constants(family: Family, cfg: ModelConfig) -> dict[str, float]:
  """{name: value} of the family's constants, those with {i} once a layer."""
  return {
    name.replace("{i}", str(i)): value
    for name, value in family.constants(cfg).items()
    for i in range(cfg.num_layers if "{i}" in name else 1)
  }


def stored_shape(key: Key, shapes: Shapes) -> tuple[int, ...]:
  """The shape of the tensor that holds parameters of these logical shapes."""
  sliced = [shapes[path] if key.part is None else shapes[path][1:] for path in key.ours]
  parts = [(*shape[:-2], *shape[:-3:-1]) if key.stored == "oi" else shape for shape in sliced]
  shape, axis = list(parts[0]), key.axis(len(parts[0]))
  if shape:
    shape[axis] = sum(part[axis] for part in parts)
  return tuple(shape)


@dataclasses.dataclass(frozen=True)
class Matched:
  """Every key of the model with the tensor of the files that is it.

  shapes: of all parameters.  held: the quantized ones, their parts jax.ShapeDtypeStructs.  heads: tensors beside a tied
  embedding, which are to be equal to it.  constants: those that hold a number of the config, with that number.
  """

  found: list[tuple[Key, Stored]]
  shapes: Shapes
  held: Mapping[str, QTensor]
  heads: list[Stored]
  constants: list[tuple[Stored, float]]


def match(checkpoint: Checkpoint, family: Family, cfg: ModelConfig, source: Source) -> Matched:
  """What the headers say: no values are read.

  Raises CheckpointError with all tensors that are missing, not expected, or of another shape or type than config.json implies,
  and for a head beside a tied embedding of another shape or type; `check_heads` and `check_constants` compare values.
  """
  layers = _count_layers(checkpoint, family, cfg)
  if cfg.num_layers > max(2 * layers, 1000):  # no list of what is missing
    raise CheckpointError(f"{source.path}: says {cfg.num_layers:,} layers, but the files hold {layers}")
  values = sum(math.prod(stored.shape) for stored in checkpoint.tensors.values())
  problem, asked, there = sizes.problem(cfg, values), count_keys(family, cfg), len(checkpoint.tensors)
  if problem is None and asked > 2 * there + 1000:  # nor one of experts or heads
    problem = f"asks for {asked:,} tensors, and the files hold {there:,}"
  if problem is not None:
    raise CheckpointError(
      f"{source.path}: {problem}{_Changed(source).sizes()}; mend it, or fetch the files again"
    )
  shapes, keys = expected_shapes(cfg), all_keys(family, cfg)
  paths = [path for key in keys if not key.part for path in key.ours]
  assert sorted(paths) == sorted(shapes), f"keys of {family.name}"
  held = quantized.expected(source.plain, source.path, shapes)
  keys, stored_shapes = quantized.opened_keys(keys, held), quantized.opened_shapes(shapes, held)
  heads = [] if "embed" in held else _head_keys(family, cfg)
  names = _names(checkpoint, family, {key.theirs for key in keys + heads})
  changed = _Changed(source)
  found, problems = [], []
  for key in keys:
    want = stored_shape(key, stored_shapes)
    if key.theirs not in names:
      problems.append(f"missing: {key.theirs} {list(want)}")
      continue
    stored = checkpoint.tensors[names.pop(key.theirs)]
    found.append((key, stored))
    if stored.shape != want:
      problems.append(f"shape: {stored} is {list(stored.shape)}, expected {list(want)}{changed.shape(key)}")
    elif stored.dtype not in (allowed := INFINITIES if key.dtype is None else (key.dtype,)):
      problems.append(f"type: {stored} is {stored.dtype}, expected {', '.join(map(str, allowed))}")
  constants = [
    (checkpoint.tensors[names.pop(name)], value)
    for name, value in all_constants(family, cfg).items()
    if name in names
  ]
  for stored, _ in constants:
    if stored.shape not in ((), (1,)) or stored.dtype not in INFINITIES:
      problems.append(f"constant: {stored} is {stored.dtype} {list(stored.shape)}, expected one number")
  tied = [checkpoint.tensors[names.pop(key.theirs)] for key in heads if key.theirs in names]
  if not problems:  # else the embedding may be what is missing
    for head in tied:
      embed = _embedding(found)
      if (head.shape, head.dtype) != (embed.shape, embed.dtype):
        problem = f"is {head.dtype} {list(head.shape)}, and {embed} {embed.dtype} {list(embed.shape)}"
        problems.append(_tied(head, problem, source))
  for name in _unexpected(names, family):
    stored = checkpoint.tensors[names[name]]
    problems.append(f"unexpected: {stored} {list(stored.shape)}")
  if problems:
    hint = ""
    if layers != cfg.num_layers:
      hint = f" (the files hold {layers} layers, expected {cfg.num_layers}{changed.layers()})"
    raise _unfit(checkpoint, source, problems, hint)
  return Matched(found, shapes, held, tied, constants)


def check_heads(checkpoint: Checkpoint, matched: Matched, source: Source) -> None:
  """Raises CheckpointError for a head beside a tied embedding with other values."""
  problems = list(_differing_heads(checkpoint, matched, source))
  if problems:
    raise _unfit(checkpoint, source, problems)


def check_constants(checkpoint: Checkpoint, matched: Matched, source: Source) -> None:
  """Raises CheckpointError for a constant of another value, but for the rounding of a type that it may have been through."""
  problems = []
  for stored, value in matched.constants:
    found = float(np.asarray(checkpoint.view(stored.name), np.float64).reshape(()))
    if found not in [float(np.asarray(value, dtype)) for dtype in INFINITIES]:
      problems.append(f"constant: {stored} is {found:g}, expected {value:g}: no other is supported")
  if problems:
    raise _unfit(checkpoint, source, problems)


def _unfit(checkpoint: Checkpoint, source: Source, problems: list[str], hint: str = "") -> CheckpointError:
  return CheckpointError(
    f"{checkpoint.directory}: the tensors do not fit {source.path}{hint}; mend it, or fetch the files again\n  "
    + shown(problems)
  )


class _Changed:
  """The model with one setting of config.json changed at a time: what a shape depends on, of any family."""

  def __init__(self, source: Source):
    self._read, self._plain = source.read, dict(source.plain)

  @functools.cached_property
  def _models(self) -> list[tuple[str, ModelConfig]]:
    """("key = value" as it is, the model where it is another) for every whole number; the model as it is comes first."""
    models = [("", self._model({}))]
    for key, number in self._plain.items():
      if type(number) is int and number > 0:
        tried = (self._model({key: other}) for other in (2 * number, number // 2, number + 1))
        models.append((f"{key} = {number}", next(filter(None, tried), models[0][1])))
    return models

  def _model(self, changes: dict[str, int]) -> ModelConfig | None:
    try:
      return self._read(self._plain | changes)
    except JaxllmError:
      return None

  @functools.cached_property
  def _shapes(self) -> list[Shapes]:
    return [expected_shapes(cfg) for _, cfg in self._models]

  def layers(self) -> str:
    """ " (key = value)": what the number of layers depends on; nothing where that is not known."""
    return self._dependent(lambda i: self._models[i][1].num_layers)

  def sizes(self) -> str:
    """ ", most by key = value": what the number of parameters depends on most."""
    counts = {text: sizes.at_least(cfg) for text, cfg in self._models} if self._read is not None else {}
    usual = counts.pop("", 0)
    moved = {text: abs(count - usual) for text, count in counts.items()}
    much = [text for text, move in moved.items() if move >= max(moved.values()) / 4 > 0]
    return f", most by {max(much, key=lambda text: int(text.rpartition(' ')[2]))}" if much else ""

  def shape(self, key: Key) -> str:
    """ " (key = value, ...)": what the shape of a tensor depends on."""
    # another model may lack a parameter
    return self._dependent(
      lambda i: all(p in self._shapes[i] for p in key.ours) and stored_shape(key, self._shapes[i])
    )

  def _dependent(self, quantity: Callable[[int], Any]) -> str:
    if self._read is None:
      return ""
    keys = [text for i, (text, _) in enumerate(self._models) if quantity(i) != quantity(0)]
    return f" ({', '.join(keys)})" if keys else ""


def _names(checkpoint: Checkpoint, family: Family, known: Collection[str]) -> dict[str, str]:
  """{name as in the family's keys: name in the files}; they differ where the files are of the model without its head."""
  prefix = family.prefix
  bare = prefix and not any(name.startswith(prefix) for name in checkpoint.tensors)
  return {prefix + name if bare and name not in known else name: name for name in checkpoint.tensors}


def _unexpected(names: Mapping[str, str], family: Family) -> list[str]:
  unused = [re.compile(pattern) for pattern in family.unused]
  forms = lambda name: (name, name.removeprefix(family.prefix))
  return [name for name in names if not any(p.fullmatch(form) for p in unused for form in forms(name))]


def _count_layers(checkpoint: Checkpoint, family: Family, cfg: ModelConfig) -> int:
  """How many layers the files have tensors of."""
  starts = {key.theirs.partition("{i}")[0] for key in family.keys(cfg) if "{i}" in key.theirs}
  starts |= {start.removeprefix(family.prefix) for start in starts}
  number = re.compile(f"(?:{'|'.join(map(re.escape, starts))})([0-9]+)[.]")
  return len({found[1] for name in checkpoint.tensors if (found := number.match(name))})


def _head_keys(family: Family, cfg: ModelConfig) -> list[Key]:
  """What the family calls the head of a model whose embedding is not its head too; nothing where cfg's is not."""
  if not cfg.tie_embeddings:
    return []
  own = {key.theirs for key in family.keys(cfg)}
  return [key for key in family.keys(dataclasses.replace(cfg, tie_embeddings=False)) if key.theirs not in own]


def _embedding(found: list[tuple[Key, Stored]]) -> Stored:
  (embed,) = (stored for key, stored in found if key.ours == ("embed",))
  return embed


def _differing_heads(checkpoint: Checkpoint, matched: Matched, source: Source) -> Iterator[str]:
  """A line for each tensor that should be the embedding once more and is not."""
  for head in matched.heads:
    embed = _embedding(matched.found)
    # the bits: a NaN that both have is for the scan of the values
    a, b = (checkpoint.view(each.name).view(INFINITIES[embed.dtype][0]) for each in (head, embed))
    parts = (slice(start, start + _ROWS) for start in range(0, len(a), _ROWS))
    rows = next((part for part in parts if not np.array_equal(a[part], b[part])), None)
    if rows is not None:
      row = rows.start + int((a[rows] != b[rows]).any(axis=1).argmax())
      yield _tied(head, f"is not {embed}: they differ first in row {row}", source)


def _tied(head: Stored, problem: str, source: Source) -> str:
  return (
    f"tied: {head} {problem}, but the model of {source.path} has one matrix for both; "
    "set tie_word_embeddings to false, or remove the tensor"
  )
