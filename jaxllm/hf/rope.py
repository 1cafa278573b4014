"""The RoPE settings of config.json, both ways, in the forms of all versions of transformers.

Before version 5: `rope_theta` beside `rope_scaling` ({"type" or "rope_type": ..., "factor": ...}); since then
`rope_parameters`, which holds both, or an object of them for each type of layer.  What is here says which keys a type has and
what each means; the formulas are in jaxllm/position.  Source: transformers 5.24, modeling_rope_utils.py.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxllm.errors import ConfigError
from jaxllm.hf.settings import BASE, COUNT, FLAG, NUMBER, POSITIVE, REQUIRED, TEXT, Kind, Settings, list_of
from jaxllm.position import POSITIONS, Alibi, NoPE, Position, Rope
from jaxllm.position.absolute import Learned
from jaxllm.position.rope import DynamicNtkRope, PiRope, YarnRope, base_power
from jaxllm.position.scalings import Llama3Rope, LongRope, ProportionalRope


@dataclasses.dataclass(frozen=True)
class Type:
  """A rope_type: our class, whose fields have the names of its keys but for `names`, and of each key its kind and default.

  A kind that depends on the number of turned pairs is a function of it.  STRETCH as a default is M / L0, the longest length by
  the trained one; `null_stretches` are the keys that are M / L0 where they are null, and have no default.
  """

  cls: type[Rope]
  keys: dict[str, tuple[Kind | Callable[[int], Kind], Any]]
  null_stretches: tuple[str, ...] = ()
  ignored: tuple[str, ...] = ()


HEAD_LIMIT = 1 << 16
"""Coordinates of a head, whose frequencies are computed while settings are read; models have hundreds."""
STRETCH = object()
LENGTH, PART = "original_max_position_embeddings", "partial_rotary_factor"
OURS = {"base": "rope_theta", "original_length": LENGTH, "proportion": PART}
"""The fields that have another name than their keys."""


def _list(pairs: int) -> Kind:
  return list_of(POSITIVE, pairs, "pair of turned coordinates")


TYPES = {
  "default": Type(Rope, {}),
  "linear": Type(PiRope, {"factor": (POSITIVE, REQUIRED)}),
  "dynamic": Type(DynamicNtkRope, {"factor": (POSITIVE, REQUIRED)}),
  "yarn": Type(
    YarnRope,
    {
      "factor": (POSITIVE, REQUIRED),
      "beta_fast": (POSITIVE, 32.0),
      "beta_slow": (POSITIVE, 1.0),
      "mscale": (NUMBER, None),
      "mscale_all_dim": (NUMBER, None),
      "attention_factor": (POSITIVE, None),
      "truncate": (FLAG, True),
    },
    null_stretches=("factor",),
    ignored=("finetuned",),  # in the YaRN authors' configurations: how the weights were made
  ),
  "longrope": Type(
    LongRope,
    {
      "factor": (POSITIVE, STRETCH),
      "short_factor": (_list, REQUIRED),
      "long_factor": (_list, REQUIRED),
      "attention_factor": (POSITIVE, None),
    },
  ),
  "llama3": Type(
    Llama3Rope,
    {
      "factor": (POSITIVE, REQUIRED),
      "low_freq_factor": (POSITIVE, REQUIRED),
      "high_freq_factor": (POSITIVE, REQUIRED),
    },
  ),
  "proportional": Type(ProportionalRope, {"factor": (POSITIVE, 1.0)}),
}
ALIASES = {"su": "longrope"}


@dataclasses.dataclass(frozen=True)
class Head:
  """What a family says of its RoPE before the settings do.

  head_dim: coordinates of a head.  context: max_position_embeddings, M.  base: rope_theta where it is missing.  partial:
  partial_rotary_factor where it is missing, or None for a family that turns the whole head.  original: the trained length
  L0 of a family that has one as a setting beside rope_scaling (None: M).  bases, partials: names of the settings beside
  rope_scaling.  types, aliases: the rope_types the family takes, and other names of them.  extra: keys that it reads itself.
  layout: which coordinates of a head make a pair: those of its two halves, or neighbours.
  """

  head_dim: int
  context: int
  base: float = 10000.0
  partial: float | None = None
  original: int | None = None
  bases: tuple[str, ...] = ("rope_theta",)
  partials: tuple[str, ...] = (PART,)
  types: tuple[str, ...] = tuple(TYPES)
  aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
  extra: tuple[str, ...] = ()
  layout: str = "half"


def group_of(s: Settings) -> Settings:
  """rope_parameters or rope_scaling, of which there may be one; empty where there is none."""
  old, new = s.group("rope_scaling"), s.group("rope_parameters")
  if old and new:
    raise s.error("rope_scaling", "no such key beside rope_parameters")
  return old or new


def read(s: Settings, head: Head) -> Rope:
  """The RoPE of a config.json whose layers have one.

  Raises ConfigError, by key, for rope_scaling beside rope_parameters, an unknown type or key, a bad number, and for one thing
  said twice in different words.
  """
  return read_group(s, group_of(s), head)


def read_group(s: Settings, group: Settings, head: Head, nested: bool = False) -> Rope:
  """The RoPE of one object of settings, `nested` where rope_parameters has one a layer type."""
  if head.head_dim > HEAD_LIMIT:
    raise ConfigError(
      f"{s.source}: head_dim, or what it is by the width and the heads: found {head.head_dim}, expected at most {HEAD_LIMIT}"
    )
  name = _type(group, head)
  kind = TYPES[name]
  base = _same(s, group, "rope_theta", head.bases, BASE)
  part = _same(s, group, PART, head.partials, POSITIVE)
  original = _same(s, group, LENGTH, () if nested else (LENGTH,), COUNT)
  if head.original is not None and not s.has(
    LENGTH
  ):  # transformers takes its default, whatever the object says
    if original not in (None, head.original):
      raise s.error(LENGTH, f"{original}, as {group.path}.{LENGTH} says: this family reads it here")
    original = head.original
  if original is None or name == "dynamic":  # whose trained length is M, whatever else is said
    original = head.context
  base = head.base if base is None else base
  fields = {"base": base, "original_length": original, "layout": head.layout}
  if name == "proportional":  # a share of the frequencies, not of the coordinates
    fields["proportion"] = 1.0 if part is None else part
    pairs = head.head_dim // 2
  else:
    fields["rotary_dim"] = _rotary_dim(s, group, head, part)
    pairs = (fields["rotary_dim"] or head.head_dim) // 2
  stretch = head.context / original
  for key, (check, default) in kind.keys.items():
    null = stretch if key in kind.null_stretches else default
    value = group.take(
      key, check(pairs) if callable(check) else check, stretch if default is STRETCH else default, null
    )
    fields[key] = tuple(value) if isinstance(value, list) else value
  for key in ("mscale", "mscale_all_dim"):
    if fields.get(key) == 0:  # is none
      fields[key] = None
  if nested and "truncate" in fields:
    fields["truncate"] = (
      True  # transformers looks for it in rope_parameters, not in the object of a layer type
    )
  group.ignore(*kind.ignored, *head.extra)
  group.finish()
  try:
    rope = kind.cls(**fields)
    rope.frequencies(2 * pairs, 1)
  except ConfigError as error:
    by_key = lambda match: f"{group.path}.{OURS.get(match[1], match[1])}:"
    raise ConfigError(f"{s.source}: " + re.sub(r"^\w+\.(\w+):", by_key, str(error))) from None
  return rope


def _same(s: Settings, group: Settings, name: str, beside: tuple[str, ...], kind: Kind) -> Any:
  """A setting that may be in the object, beside it, or both if they agree; None for neither."""
  inner = group.take(name, kind, None)
  outer = s.take(beside[0], kind, None, also=beside[1:]) if beside else None
  if inner is not None and outer is not None and inner != outer:
    raise group.error(name, f"{outer}, as {beside[0]} says, or only one of the two")
  return outer if inner is None else inner


def _type(group: Settings, head: Head) -> str:
  names = []
  for key in ("rope_type", "type"):
    if (name := group.take(key, TEXT, None)) is None:
      continue
    name = (ALIASES | dict(head.aliases)).get(name, name)
    if name not in head.types:
      near = difflib.get_close_matches(name, head.types, 1)
      raise group.error(key, f"one of {', '.join(head.types)}" + (f" (nearest: {near[0]})" if near else ""))
    names.append(name)
  if len(set(names)) > 1:
    raise group.error("type", f"{names[0]}, as rope_type says, or only one of the two")
  return names[0] if names else "default"


def _rotary_dim(s: Settings, group: Settings, head: Head, part: float | None) -> int | None:
  """int(part * head_dim), None for the whole head."""
  default = 1.0 if head.partial is None else head.partial
  owner, key = (group, PART) if group.has(PART) else (s, head.partials[0])
  rotary_dim = int(head.head_dim * (default if part is None else part))
  if head.head_dim % 2 and rotary_dim == head.head_dim:
    raise ConfigError(
      f"{s.source}: head_dim: found {head.head_dim}, expected an even number, as its coordinates turn in pairs"
    )
  if rotary_dim == head.head_dim:
    return None
  if part is not None and head.partial is None:
    raise owner.error(key, "1.0, as this family turns the whole head")
  if rotary_dim < 2 or rotary_dim % 2 or rotary_dim > head.head_dim:
    share = f"with head_dim = {head.head_dim} it turns {rotary_dim} coordinates"
    raise owner.error(key, f"a share of the head that is an even number of coordinates; {share}")
  return rotary_dim


def expressible(
  position: Position, head_dim: int, context: int | None = None, pinned: bool = False
) -> Position:
  """The method as transformers has it: itself, or for any other fixed frequencies LongRoPE with one list for all lengths.

  pinned: take methods whose frequencies depend on the length, for which transformers has one length a call where we have one a
  query.  Raises ConfigError, by name, for what it has nothing for.
  """
  name = next((name for name, cls in POSITIONS.items() if cls is type(position)), type(position).__name__)
  if isinstance(position, NoPE | Alibi | Learned):
    return position
  if not isinstance(position, Rope):
    raise ConfigError(f"{name}: transformers has no such position method in these families")
  fixed = position.program is None and not position.needs_raw_keys and not position.two_dimensional
  if isinstance(position, LongRope):
    fixed = position.short_factor == position.long_factor
  elif not fixed and type(position) is not DynamicNtkRope:
    raise ConfigError(f"{name}: transformers has no such position method; save the model with another")
  if not fixed and not pinned:
    raise ConfigError(
      f"{name}: found frequencies by the length of each query, expected ones that transformers has too: it takes those of one "
      "length for a whole call, so that its decoding is another; save with pinned=True if that is what you want"
    )
  part = type(position) is ProportionalRope and position.rotary_dim not in (None, head_dim)
  if type(position) in [kind.cls for kind in TYPES.values()] and not part:
    return position
  rotary_dim = position.rotary_dim or head_dim
  inv_freq, scale = position.frequencies(rotary_dim)
  if not (inv_freq > 0).all():
    raise ConfigError(f"{name}: found frequencies of 0, expected ones that LongRoPE's factors can give")
  factors = tuple(float(x) for x in base_power(position.base, rotary_dim) / inv_freq)
  length = max(position.original_length or context or 2, 2)
  return LongRope(
    position.base,
    position.rotary_dim,
    position.layout,
    original_length=length,
    factor=getattr(position, "factor", 1.0),
    short_factor=factors,
    long_factor=factors,
    attention_factor=scale,
  )


def context_of(ropes: tuple[Rope, ...], context: int | None) -> int:
  """max_position_embeddings to write: that of dynamic NTK, which computes with it, else what is known, else 2048."""
  if dynamic := [rope.original_length for rope in ropes if type(rope) is DynamicNtkRope]:
    return dynamic[0]
  lengths = [
    math.ceil(rope.original_length * getattr(rope, "factor", 1.0)) for rope in ropes if rope.original_length
  ]
  return context or max(lengths, default=2048)


def write(rope: Rope, head: Head) -> dict[str, Any]:
  """{rope_theta, rope_scaling, ...}: the settings of a RoPE that `expressible` gave, in the form that every version reads."""
  out: dict[str, Any] = {head.bases[0]: float(rope.base)}
  scaling = write_group(rope, head)
  if head.partial is not None:
    out[head.partials[0]] = part_of(rope.rotary_dim or head.head_dim, head.head_dim)
  if isinstance(rope, ProportionalRope):
    out[head.partials[0]] = rope.proportion
  return out | ({"rope_scaling": scaling} if scaling else {})


def write_group(rope: Rope, head: Head) -> dict[str, Any]:
  """The object of rope_scaling: rope_type and its numbers, or {} for plain RoPE.

  Raises ConfigError for one that makes other pairs than the family's.
  """
  if rope.layout != head.layout:
    raise ConfigError(
      f"layout: found {rope.layout!r}, expected {head.layout!r}, as transformers turns such pairs in this family"
    )
  name = next(name for name, kind in TYPES.items() if kind.cls is type(rope))
  if name == "default":
    return {}
  out: dict[str, Any] = {"rope_type": name}
  for key, (_, default) in TYPES[name].keys.items():
    value = getattr(rope, key)
    if value is not None and not (key == "truncate" and value is default):  # older versions do not know it
      out[key] = list(value) if isinstance(value, tuple) else value
  if (rope.needs_original_length and name != "dynamic") or rope.original_length not in (None, head.context):
    out[LENGTH] = rope.original_length
  return out


def part_of(rotary_dim: int, head_dim: int) -> float:
  """The smallest partial_rotary_factor p near rotary_dim / head_dim with int(p * head_dim) = rotary_dim."""
  part = rotary_dim / head_dim
  while int(head_dim * part) < rotary_dim:
    part = math.nextafter(part, 1.0)
  return part
