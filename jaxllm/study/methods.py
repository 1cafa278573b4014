"""The length-extrapolation sweep as data: which methods there are, and the groups of cells that one program fills.

No JAX here: flags are checked against these tables before it is imported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jaxllm.errors import ConfigError
from jaxllm.study import choices
from jaxllm.study.cells import Group

METRICS = ("bpb_last", "bpb", "accuracy", "accuracy_repeated")
TOKEN_METRICS = (*METRICS, "perplexity")
"""With the perplexity of a token, for models whose tokens are not bytes."""
BY_POSITION = "bpb_position"
"""Loss by position at the longest length, for bpb_vs_position.png; `position` is the first byte of a row's bin."""
BY_WINDOW = "bpb_window"
"""Loss of the last block of each window, for the error of differences between methods; `window` is its number."""
IN_LENGTH = "bpb_in_length"
"""Loss at the training length on up to IN_LENGTH_WINDOWS windows: what the model has learnt, beside the trigram model."""
LOADED = "-"
"""The scheme of a checkpoint that was not trained here."""
DETAILS = (BY_POSITION, BY_WINDOW, IN_LENGTH)
"""Metrics of rows that are details behind the report, and no results of their own."""
IN_LENGTH_WINDOWS = 1000

GROUP_SIZE = 4
"""Methods batched in one program.  A group is padded to it, so neither the number of methods nor what is done already
changes a program or a number."""


@dataclasses.dataclass(frozen=True)
class Method:
  """A way to run a trained model at a longer length.

  position: the entry of POSITIONS put on its RoPE layers, None for the model as trained; stretches: whether it takes a
  factor; tables_only: whether it differs from RoPE in (frequencies, scale) only and so shares the trained model's program;
  log_n: queries scaled by max(1, log_train_length(position + 1)), at test time only; by_default: whether a run that names no
  methods has it.
  """

  position: str | None
  log_n: bool = False
  stretches: bool = True
  tables_only: bool = True
  by_default: bool = True


@dataclasses.dataclass(frozen=True)
class Scheme:
  """How a model came to its positions: a way to train it at a short length, or what a loaded one was trained with.

  position: the entry of POSITIONS it is trained with; tested_as: the one it is tested with, where that is another; log_n:
  queries scaled by log_train_length(position + 1), from training on; hwfa: all layers but the last have a window, and the last
  has no positions (kexue.fm/archives/9603); plain_rope: whether the methods that change RoPE can be put on the model.
  Of a loaded model, whose name is "-": lacks, in words, why they cannot; sees_all, whether a layer has no window; max_length,
  where learned positions end (None: at the training length); linear, the factor of its own linear scaling, whose settings name
  the stretched length only.  group_size: how many variants one program takes at once.
  """

  name: str
  position: str
  tested_as: str | None = None
  log_n: bool = False
  hwfa: bool = False
  plain_rope: bool = False
  lacks: str | None = None
  sees_all: bool = True
  linear: float | None = None
  max_length: int | None = None
  group_size: int = GROUP_SIZE


SCHEMES = {
  scheme.name: scheme
  for scheme in (
    Scheme("rope", "rope", plain_rope=True),
    Scheme("rope_logn", "rope", log_n=True, plain_rope=True),
    Scheme("alibi", "alibi"),
    Scheme("nope", "nope"),
    Scheme("sinusoidal", "sinusoidal"),
    Scheme("learned", "learned"),
    Scheme("t5", "t5"),
    Scheme("xpos", "xpos"),
    Scheme("proportional", "proportional"),
    Scheme("inv_leaky", "inv_leaky_rerope", tested_as="rope", log_n=True),
    Scheme("hwfa", "rope", log_n=True, hwfa=True),
  )
}

METHODS = {
  "none": Method(None, stretches=False),
  "logn": Method(None, log_n=True, stretches=False),
  "pi": Method("pi"),
  "ntk_old": Method("ntk_old"),
  "ntk": Method("ntk"),
  "ntk_logn": Method("ntk", log_n=True),
  "ntk_fixed": Method("ntk_fixed"),
  "ntk_fixed_logn": Method("ntk_fixed", log_n=True),
  "ntk_mixed": Method("ntk_mixed"),
  "ntk_mixed_logn": Method("ntk_mixed", log_n=True),
  "dynamic_ntk": Method("dynamic_ntk"),
  "yarn": Method("yarn"),
  "rerope": Method("rerope", stretches=False, tables_only=False),
  "rerope_logn": Method("rerope", log_n=True, stretches=False, tables_only=False),
  "ntk_by_parts": Method("ntk_by_parts", by_default=False),
  "llama3": Method("llama3", by_default=False),
  "leaky_rerope": Method("leaky_rerope", stretches=False, tables_only=False, by_default=False),
  "self_extend": Method("self_extend", tables_only=False, by_default=False),
  "streaming": Method("streaming", stretches=False, tables_only=False, by_default=False),
}

DEFAULT = tuple(name for name, method in METHODS.items() if method.by_default)
GROUPS = {"default": DEFAULT, "all": tuple(METHODS)}
"""What --methods calls by one name."""

TRAINED_WITH = {
  "longrope": "its factors are searched for one model and length, and any made-up list is another method",
  "proportional": "a model must be trained with the pairs that stand still (--schemes=proportional)",
  "xpos": "a model must be trained with the decay (--schemes=xpos)",
  "inv_leaky_rerope": "a model is trained with it, and tested as plain RoPE (--schemes=inv_leaky)",
  "rope_2d": "a model must be trained with two positions a token",
}
"""RoPE methods that cannot be put on a trained RoPE model as it is, and why."""


def choose(text: str, schemes: Sequence[Scheme]) -> tuple[str, ...]:
  """The methods that --methods=`text` names: a list, or "default" or "all", which are those of them that apply to a scheme.

  Raises ConfigError for one that is unknown, or that a model must be trained with.
  """
  if text in GROUPS:
    return tuple(
      name for name in GROUPS[text] if any(not_applicable(scheme, name) is None for scheme in schemes)
    )
  for name in (item.strip() for item in text.split(",")):
    if name in TRAINED_WITH:
      raise ConfigError(f"--methods={text}: {name} cannot be put on a trained model: {TRAINED_WITH[name]}")
  return choices.choice_list("methods", text, tuple(METHODS))


def not_applicable(scheme: Scheme, method: str) -> str | None:
  """Why a method cannot be put on a model of `scheme`; None if it can."""
  m = METHODS[method]
  if m.position is not None and not scheme.plain_rope:
    lacks = scheme.lacks or f"{scheme.name} has no layer of plain RoPE over all keys"
    return f"{m.position} changes RoPE, and {lacks}"
  if m.log_n and not scheme.sees_all:
    return "log-n scales the queries of layers over all keys, and every layer of the model has a window"
  if m.log_n and scheme.log_n:
    return f"the model {'scales its queries by position' if scheme.name == LOADED else 'is trained with log-n'} already"
  return None


def check_counts_from(scheme: Scheme, method: str, length: int | None, flag: str) -> None:
  """Refuse a method in place of a linear scaling while only the stretched `length` is known, from which it must not count."""
  if METHODS[method].position is not None and scheme.linear is not None:
    own = f"linear x{scheme.linear:g}"
    raise ConfigError(
      f"{flag}: {method} replaces the model's own {own}, which reaches {length} tokens, and the settings of the model do not "
      "say how long a context it was trained at before, from which factors count; give --train_length=TOKENS, or only methods "
      "that leave RoPE as it is"
    )


def beyond_table(scheme: Scheme, train_length: int, length: int) -> str | None:
  """Why a model of `scheme` cannot read `length` tokens at all; None if it can."""
  if scheme.max_length is not None:
    return f"learned positions end at {scheme.max_length}" if length > scheme.max_length else None
  if scheme.position == "learned" and length > train_length:
    return f"learned positions end at the training length, {train_length}"
  return None


def program_of(variant: Variant) -> str:
  """The compiled program that a variant runs through when it is switched on: "tables" is the trained model's own.

  Others have the method built in, and with it the factor where it takes one, as in "self_extend x4.0".
  """
  method = METHODS[variant.method]
  stretch = f" x{variant.factor}" if method.stretches and not method.tables_only else ""
  return _family(method) + stretch


def _family(method: Method) -> str:
  return "tables" if method.tables_only else method.position


def program_size(scheme: Scheme, program: str) -> int:
  """How many tables a program takes at once: constant, whichever methods are asked for."""
  members = [
    name
    for name, method in METHODS.items()
    if not_applicable(scheme, name) is None and _family(method) == program.split(" ")[0]
  ]
  return min(scheme.group_size, len(members))


@dataclasses.dataclass(frozen=True)
class Variant:
  """A method at one factor."""

  method: str
  factor: float


def variants(
  methods: Sequence[str], factors: Sequence[float] | None, train_length: int, length: int
) -> list[Variant]:
  """What is evaluated at one length.

  Without `factors` the factor is length / train_length: a method is switched on for the long test only, as in the published
  protocol.  Given factors apply at every length.
  """
  own = factors if factors is not None else (max(1.0, length / train_length),)
  return [Variant(name, f) for name in methods for f in (own if METHODS[name].stretches else (1.0,))]


def is_on(variant: Variant, factors: Sequence[float] | None, train_length: int, length: int) -> bool:
  """Whether the method differs from the model as trained: within the trained length only where a factor was asked for."""
  if METHODS[variant.method].stretches:
    return variant.factor != 1.0 or factors is not None
  return length > train_length and variant.method != "none"


def check_methods_matter(
  schemes: Sequence[Scheme],
  methods: Sequence[str],
  factors: Sequence[float] | None,
  train_length: int,
  lengths: Sequence[int],
) -> None:
  """Refuse a method that would change nothing anywhere; `none` and a factor of 1 that was asked for are controls."""
  longest = max(lengths)
  for name in methods:
    reasons = [not_applicable(scheme, name) for scheme in schemes]
    if all(reasons):
      trained = [scheme.name for scheme in schemes if scheme.name != LOADED]
      where = f"--schemes={','.join(trained)}" if trained else "--model"
      raise ConfigError(f"--methods={name} with {where}: {'; '.join(dict.fromkeys(reasons))}")
    on = any(
      is_on(v, factors, train_length, longest) for v in variants([name], factors, train_length, longest)
    )
    if name != "none" and not on:
      raise ConfigError(
        f"--methods={name} with --lengths up to {longest}: changes nothing, as methods are switched on beyond "
        f"--train_length={train_length} only; give longer --lengths, or --factors, or --methods=none"
      )


def plan(
  schemes: Sequence[Scheme],
  methods: Sequence[str],
  metrics: Sequence[str],
  factors: Sequence[float] | None,
  train_length: int,
  lengths: Sequence[int],
  seeds: int,
  windows: int,
) -> list[Group]:
  """Every cell of the sweep, in groups of methods that share one compiled program at one length, in a fixed order.

  A group's name holds all that `compute` needs beside its cells: scheme/seed/length/program/number.
  """
  groups = []
  for scheme in schemes:
    for seed in range(seeds):
      in_length = _cells(scheme.name, seed, train_length, train_length, [Variant("none", 1.0)], [IN_LENGTH])
      groups.append(Group(f"{scheme.name}/{seed}/{train_length}/in_length/0", tuple(in_length)))
      for length in lengths:
        programs: dict[str, list[Variant]] = {}
        for variant in variants(methods, factors, train_length, length):
          if not_applicable(scheme, variant.method) or beyond_table(scheme, train_length, length):
            program = "none"
          else:
            on = is_on(variant, factors, train_length, length)
            program = program_of(variant) if on else "tables"
          programs.setdefault(program, []).append(variant)
        for program, members in programs.items():
          size = program_size(scheme, program) or len(members)
          for start in range(0, len(members), size):
            cells = _cells(scheme.name, seed, length, train_length, members[start : start + size], metrics)
            if program != "none":
              details = [("window", BY_WINDOW, range(windows))] if "bpb_last" in metrics else []
              if length == max(lengths):
                details.append(("position", BY_POSITION, range(0, length, bin_size(train_length))))
              cells += [cell for detail in details for cell in _details(cells, *detail)]
            groups.append(Group(f"{scheme.name}/{seed}/{length}/{program}/{start // size}", tuple(cells)))
  return groups


def _cells(scheme, seed, length, train_length, members: Sequence[Variant], metrics) -> list[dict]:
  return [
    {
      "scheme": scheme,
      "quant": "none",
      "method": v.method,
      "factor": v.factor,
      "train_length": train_length,
      "length": length,
      "metric": metric,
      "seed": seed,
    }
    for v in members
    for metric in metrics
  ]


def bin_size(train_length: int) -> int:
  """Bytes of a bin of loss by position."""
  return max(1, train_length // 2)


def _details(cells: Sequence[dict], column: str, metric: str, places: Sequence[int]) -> list[dict]:
  """One cell a place for each variant of `cells`, its number in `column`."""
  variants = {(cell["method"], cell["factor"]): cell for cell in cells}
  return [{**cell, "metric": metric, column: place} for cell in variants.values() for place in places]
