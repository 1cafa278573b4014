"""The cells of the length-extrapolation sweep: what the methods on a model make of long text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np

from experiments.extrapolation.models import Models
from experiments.extrapolation.settings import Settings
from jaxllm.config import Layer, ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.evaluate.windows import bits_per_byte, repeat_last_block, score_windows
from jaxllm.nn.cores import core_report
from jaxllm.nn.transformer import Transformer
from jaxllm.position import LogN, PositionTables, Rope
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


def with_variant(
  cfg: ModelConfig, variant: methods.Variant, factors, train_length: int, length: int
) -> ModelConfig:
  """The model with a variant at a length: as it is, where the variant is not switched on there."""
  if methods.is_on(variant, factors, train_length, length):
    cfg = on(cfg, variant, train_length)
    if methods.METHODS[variant.method].log_n:
      cfg = dataclasses.replace(cfg, query_scale=LogN(train_length, floor=1.0))
  return cfg


def on(cfg: ModelConfig, variant: methods.Variant, train_length: int) -> ModelConfig:
  """The config with the variant's position method on its RoPE layers, which were trained at `train_length`."""
  method = methods.METHODS[variant.method]
  if method.position is None:
    return cfg
  factor = {"factor": variant.factor} if method.stretches else {}
  return cfg.with_position(method.position, original_length=train_length, **factor)


def shared_program(cfg: ModelConfig) -> ModelConfig:
  """The config of the program that all methods which are tables run through: plain RoPE on the layers over all keys.

  Where windowed layers have that very RoPE, which keeps its own table, the others are told apart by a name of their own.
  """
  plain = cfg.with_position("rope")
  windowed = {layer.position for layer in plain.layers if layer.window is not None}
  everywhere = {layer.position for layer in plain.layers if layer.window is None and is_rope(layer)}
  return cfg.with_position("pi", factor=1.0) if windowed & everywhere else plain


def is_rope(layer: Layer) -> bool:
  """Whether a layer turns queries and keys by one position a token."""
  return isinstance(layer.position, Rope) and not layer.position.two_dimensional


def aligned(cfg: ModelConfig, program: ModelConfig, length: int) -> PositionTables:
  """The tables of `cfg` for windows of `length`, in the places that the program of another config has for its layers."""
  tables = cfg.rope_tables(seq_len=length)
  places = [
    next(i for i, layer in enumerate(program.layers) if layer.position == rope) for rope in program.ropes
  ]
  ropes = tuple(tables.ropes[cfg.ropes.index(cfg.layers[i].position)] for i in places)
  return dataclasses.replace(tables, ropes=ropes)


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
  """Refuse a method whose frequencies and scales at the longest length are those of every model as it is.

  A factor of 1 that was asked for is a control; what has a program of its own differs by that.
  """
  longest, train = max(settings.lengths), settings.train_length
  for name in settings.methods:
    method = methods.METHODS[name]
    on_there = [
      v
      for v in methods.variants([name], settings.factors, train, longest)
      if methods.is_on(v, settings.factors, train, longest) and not (method.stretches and v.factor == 1.0)
    ]
    applies = [scheme for scheme, how in models.schemes.items() if not methods.not_applicable(how, name)]
    if not (on_there and applies and method.tables_only):
      continue
    if not any(_changes(settings, models, scheme, v, longest) for scheme in applies for v in on_there):
      raise ConfigError(
        f"--methods={name}: at {longest}, the longest of --lengths, its frequencies and scale are those of the model as it is; "
        "leave it out, or give other --factors"
      )


def _changes(settings: Settings, models: Models, scheme: str, variant: methods.Variant, length: int) -> bool:
  cfg, how = models.tested[scheme], models.schemes[scheme]
  program = shared_program(cfg) if how.plain_rope else cfg
  changed = with_variant(cfg, variant, settings.factors, settings.train_length, length)
  tables = (jax.tree.leaves(aligned(one, program, length)) for one in (cfg, changed))
  return not all(np.array_equal(x, y) for x, y in zip(*tables, strict=True))
