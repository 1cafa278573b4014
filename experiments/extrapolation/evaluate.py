"""The cells of the length-extrapolation sweep: a trained model a scheme and seed, and what its methods make of long text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from jaxllm.config import ModelConfig
from jaxllm.errors import CheckpointError, JaxllmError
from jaxllm.evaluate.windows import bits_per_byte, cut_windows, repeat_last_block, score_windows
from jaxllm.nn.cores import core_report
from jaxllm.nn.transformer import Transformer
from jaxllm.position import LogN, PositionTables
from jaxllm.study import methods, rows
from jaxllm.study.cells import Group
from jaxllm.study.files import write_json
from jaxllm.study.progress import Progress
from jaxllm.study.stop import StopFlag
from jaxllm.train.checkpoint import move_aside, restore_tree
from jaxllm.train.loop import fit
from jaxllm.train.step import TrainConfig


@dataclasses.dataclass
class Trained:
  """Parameters by scheme and seed, trained (or read) when they are first asked for; the last ones are kept.

  `configs` are the models that are trained, and `tested` the ones that are tested with their parameters.
  """

  out: Path
  configs: dict[str, ModelConfig]
  tested: dict[str, ModelConfig]
  train_config: Callable[[str], TrainConfig]
  text: np.ndarray
  progress: Progress
  stop: StopFlag
  _last: tuple = (None, None)

  def params(self, scheme: str, seed: int):
    """The trained parameters; raises the error of a training that failed, again each time it is asked for."""
    if self._last[0] != (scheme, seed):
      try:
        self._last = (scheme, seed), self._train(scheme, seed)
      except JaxllmError as e:
        self._last = (scheme, seed), e
    found = self._last[1]
    if isinstance(found, JaxllmError):
      raise found
    return found

  def keep(self, scheme: str, seed: int) -> None:
    """See that the trained model is on disk: what is missing or cannot be read is trained again, from an intact step on."""
    directory = self._directory(scheme, seed)
    step = 0
    if directory.exists():
      try:
        step = restore_tree(directory)[0]
      except CheckpointError:
        move_aside(directory, f"{directory}: no step can be read")
    if step < self.train_config(scheme).steps or not (directory / "model.json").exists():
      self._last = (None, None)  # what is in memory would hide what is not on disk
      self.params(scheme, seed)

  def _directory(self, scheme: str, seed: int) -> Path:
    return self.out / "checkpoints" / f"{scheme}-{seed}"

  def _train(self, scheme: str, seed: int):
    config, model = self.train_config(scheme), Transformer(self.configs[scheme])
    directory = self._directory(scheme, seed)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "model.json", self.tested[scheme].to_dict())
    shown = []

    def on_start(start: int) -> None:
      tokens = config.batch_size * config.length
      shown.append(self.progress.training(f"train {scheme}, seed {seed}", config.steps, start, tokens))

    state = fit(
      model,
      config,
      self.text,
      seed,
      directory,
      on_start=on_start,
      on_step=lambda step, loss: shown[0].update(step, loss),
      check_stop=self.stop.check,
    )
    return state["params"]


def compute(settings, trained: Trained, text: np.ndarray, group: Group) -> list[dict]:
  """One row for each cell of a group."""
  scheme, seed, length, program, _ = group.name.split("/")
  if program == "none":
    return [rows.not_applicable(c, reason(c)) for c in group.cells]
  length, block = int(length), settings.train_length
  if program == "in_length":
    model, params = (
      Transformer(dataclasses.replace(trained.tested[scheme], query_scale=None)),
      trained.params(scheme, int(seed)),
    )
    tables = stack([trained.tested[scheme].rope_tables(seq_len=length)], 1)
    nats, _ = score_windows(model, params, in_length_windows(text, length), tables)
    return [rows.ok(cell, bits_per_byte(np.asarray(nats))) for cell in group.cells]
  members = dict.fromkeys(methods.Variant(c["method"], c["factor"]) for c in group.cells)
  params = trained.params(scheme, int(seed))
  cfg = trained.tested[scheme]
  # what the tables say, the program need not: without its query scale one program serves every RoPE scheme
  program_cfg = dataclasses.replace(cfg, query_scale=None)
  if program != "tables":
    program_cfg = on(program_cfg, next(iter(members)))
  tables = stack(
    [tables_of(cfg, v, settings.factors, block, length) for v in members],
    methods.program_size(scheme, program),
  )
  windows = cut_windows(text, length, max(settings.lengths), settings.windows)
  wanted = {c["metric"] for c in group.cells}
  scored = {}
  if wanted - {"accuracy_repeated"}:
    scored["natural"] = jax.device_get(score_windows(Transformer(program_cfg), params, windows, tables))
  if "accuracy_repeated" in wanted:
    repeated = repeat_last_block(windows, block)
    scored["repeated"] = jax.device_get(score_windows(Transformer(program_cfg), params, repeated, tables))
  place = {variant: i for i, variant in enumerate(members)}
  return [
    rows.ok(c, value(c, place[methods.Variant(c["method"], c["factor"])], scored, block)) for c in group.cells
  ]


def reason(cell: dict) -> str:
  """Why a cell of a group without a program has no value."""
  own = methods.not_applicable(cell["scheme"], cell["method"])
  return own or methods.beyond_table(cell["scheme"], cell["train_length"], cell["length"])


def in_length_windows(text: np.ndarray, train_length: int) -> np.ndarray:
  """Windows of the training length from all over the text: enough of them for an error of a hundredth of a bit."""
  return cut_windows(
    text, train_length, train_length, min(methods.IN_LENGTH_WINDOWS, (len(text) - 1) // train_length - 1)
  )


def tables_of(
  cfg: ModelConfig, variant: methods.Variant, factors, train_length: int, length: int
) -> PositionTables:
  """The position tables of a variant at a length: data for the program of its group."""
  if methods.is_on(variant, factors, train_length, length):
    cfg = on(cfg, variant)
    if methods.METHODS[variant.method].log_n:
      cfg = dataclasses.replace(cfg, query_scale=LogN(train_length, floor=1.0))
  return cfg.rope_tables(seq_len=length)


def core_reports(settings, configs: dict[str, ModelConfig]) -> dict[str, str]:
  """{scheme, method and length: which attention core it takes, and why}; ConfigError where a forced one cannot serve."""
  reports = {}
  for scheme, cfg in configs.items():
    for name in settings.methods:
      if methods.not_applicable(scheme, name):
        continue
      own = on(cfg, methods.Variant(name, 2.0))
      reports |= {
        f"{scheme}, {name}, {length}": core_report(own, length, seq_len=length) for length in settings.lengths
      }
  return reports


def on(cfg: ModelConfig, variant: methods.Variant) -> ModelConfig:
  """The config with the variant's position method on its RoPE layers."""
  method = methods.METHODS[variant.method]
  if method.position is None:
    return cfg
  return cfg.with_position(method.position, **({"factor": variant.factor} if method.stretches else {}))


def stack(tables: list[PositionTables], size: int) -> PositionTables:
  """Tables on a new first axis, padded to `size` with the first one."""
  padded = tables + [tables[0]] * (size - len(tables))
  return jax.tree.map(lambda *leaves: np.stack(leaves), *padded)


def value(cell: dict, member: int, scored: dict, block: int) -> float:
  """The value of a cell from losses and hits [M, W, T]."""
  if cell["metric"] == "accuracy_repeated":
    return float(np.mean(scored["repeated"][1][member], dtype=np.float64))
  nats, hits = (x[member] for x in scored["natural"])
  match cell["metric"]:
    case "accuracy":
      return float(np.mean(hits, dtype=np.float64))
    case "bpb":
      return bits_per_byte(nats)
    case "bpb_last":
      return bits_per_byte(nats[:, -block:])
    case methods.BY_WINDOW:
      return bits_per_byte(nats[cell["window"], -block:])
    case methods.BY_POSITION:
      start = cell["position"]
      return bits_per_byte(nats[:, start : start + methods.bin_size(block)])
  raise AssertionError(cell["metric"])
