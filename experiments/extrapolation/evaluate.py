"""The cells of the length-extrapolation sweep: what the methods on a model make of long text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np

from experiments.extrapolation.models import Models
from experiments.extrapolation.settings import Settings
from experiments.extrapolation.variants import aligned, changes, on, shared_program, with_variant
from jaxllm.errors import ConfigError
from jaxllm.evaluate.windows import bits_per_byte, repeat_last_block, score_windows
from jaxllm.nn.cores import core_report
from jaxllm.nn.transformer import Transformer
from jaxllm.position import PositionTables
from jaxllm.study import methods, rows
from jaxllm.study.cells import Group


def compute(settings: Settings, models: Models, group: Group) -> list[dict]:
  """One row for each cell of a group."""
  scheme, seed, length, program, _ = group.name.split("/")
  how = models.schemes[scheme]
  if program == "none":
    return [rows.not_applicable(c, reason(how, c)) for c in group.cells]
  length, train = int(length), settings.train_length
  members = list(dict.fromkeys(methods.Variant(c["method"], c["factor"]) for c in group.cells))
  own = models.tested[scheme]
  if program in ("tables", "in_length"):
    config = shared_program(own) if how.plain_rope else own
  else:
    config = on(own, members[0], train)
  # what the tables say, the program need not: without its query scale one program serves every RoPE scheme
  model = Transformer(dataclasses.replace(config, query_scale=None))
  tables = [
    aligned(with_variant(own, variant, settings.factors, train, length), config, length)
    for variant in members
  ]
  params = models.params(scheme, int(seed))
  if program == "in_length":
    tokens, sizes = in_length_windows(models, train)
    nats, _ = score_windows(model, params, tokens, stack(tables, 1))
    return [rows.ok(cell, bits_per_byte(np.asarray(nats), sizes)) for cell in group.cells]
  tables = stack(tables, methods.program_size(how, program))
  tokens, sizes = models.text.windows(length, max(settings.lengths), settings.windows)
  wanted = {c["metric"] for c in group.cells}
  scored = {}
  if wanted - {"accuracy_repeated"}:
    scored["natural"] = jax.device_get(score_windows(model, params, tokens, tables))
  if "accuracy_repeated" in wanted:
    repeated = models.text.begun(repeat_last_block(tokens, train))
    scored["repeated"] = jax.device_get(score_windows(model, params, repeated, tables))
  place = {variant: i for i, variant in enumerate(members)}
  return [
    rows.ok(c, value(c, place[methods.Variant(c["method"], c["factor"])], scored, sizes, train))
    for c in group.cells
  ]


def reason(how: methods.Scheme, cell: dict) -> str:
  """Why a cell of a group without a program has no value."""
  own = methods.not_applicable(how, cell["method"])
  return own or methods.beyond_table(how, cell["train_length"], cell["length"])


def in_length_windows(models: Models, train_length: int) -> tuple[np.ndarray, np.ndarray]:
  """Windows of the training length from all over the text: of bytes, enough for an error of a hundredth of a bit."""
  most = (len(models.text) - 1) // train_length - 1
  return models.text.windows(train_length, train_length, min(models.in_length, most))


def stack(tables: Sequence[PositionTables], size: int) -> PositionTables:
  """Tables on a new first axis, padded to `size` with the first one."""
  padded = [*tables, *[tables[0]] * (size - len(tables))]
  return jax.tree.map(lambda *leaves: np.stack(leaves), *padded)


def value(cell: dict, member: int, scored: dict, sizes: np.ndarray, block: int) -> float:
  """The value of a cell from losses and hits [M, W, T] of tokens that stand for `sizes` [W, T] bytes."""
  if cell["metric"] == "accuracy_repeated":
    return float(np.mean(scored["repeated"][1][member], dtype=np.float64))
  nats, hits = (x[member] for x in scored["natural"])
  match cell["metric"]:
    case "accuracy":
      return float(np.mean(hits, dtype=np.float64))
    case "perplexity":
      return math.exp(np.mean(nats, dtype=np.float64))
    case "bpb":
      return bits_per_byte(nats, sizes)
    case "bpb_last":
      return bits_per_byte(nats[:, -block:], sizes[:, -block:])
    case methods.BY_WINDOW:
      return bits_per_byte(nats[cell["window"], -block:], sizes[cell["window"], -block:])
    case methods.BY_POSITION:
      places = slice(cell["position"], cell["position"] + methods.bin_size(block))
      return bits_per_byte(nats[:, places], sizes[:, places])
  raise AssertionError(cell["metric"])


def core_reports(settings: Settings, models: Models) -> dict[str, str]:
  """{scheme, method and length: which attention core it takes, and why}; ConfigError where a forced one cannot serve."""
  reports = {}
  for scheme, cfg in models.configs.items():
    for name in settings.methods:
      if methods.not_applicable(models.schemes[scheme], name):
        continue
      own = on(cfg, methods.Variant(name, 2.0), settings.train_length)
      reports |= {
        f"{scheme}, {name}, {length}": core_report(own, length, seq_len=length) for length in settings.lengths
      }
  return reports


def check_tables_differ(settings: Settings, models: Models) -> None:
  """Refuse a method that makes the same model as `none` of every model at the longest length."""
  for name in unchanged(settings, models):
    raise ConfigError(
      f"--methods={name}: at {max(settings.lengths)}, the longest of --lengths, its frequencies and scale are those of the "
      "model as it is; leave it out, or give other --factors"
    )


def unchanged(settings: Settings, models: Models) -> tuple[str, ...]:
  """The methods whose frequencies and scales at the longest length are those of every model as it is.

  A factor of 1 that was asked for is a control; what has a program of its own differs by that.
  """
  longest, train = max(settings.lengths), settings.train_length
  found = []
  for name in settings.methods:
    method = methods.METHODS[name]
    on_there = [
      v
      for v in methods.variants([name], settings.factors, train, longest)
      if methods.is_on(v, settings.factors, train, longest) and not (method.stretches and v.factor == 1.0)
    ]
    applies = [scheme for scheme, how in models.schemes.items() if not methods.not_applicable(how, name)]
    if not (on_there and applies):
      continue
    changed = (
      changes(models.tested[scheme], models.schemes[scheme], v, settings.factors, train, longest)
      for scheme in applies
      for v in on_there
    )
    if not any(changed):
      found.append(name)
  return tuple(found)
