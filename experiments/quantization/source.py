"""The one model of a run and its text: trained here, of a run of the sweep, or loaded."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from pathlib import Path
from typing import Any

import jax
from absl import flags

from experiments import evaluate, export, length_extrapolation, restored
from experiments.checkpoint import Checkpoint, scheme_of
from experiments.extrapolation.evaluate import check_tables_differ, core_reports
from experiments.extrapolation.loaded import Loaded
from experiments.extrapolation.models import Models
from experiments.extrapolation.settings import SMOKE, Settings, TrainSettings
from experiments.extrapolation.trained import Trained
from jaxllm.config import ModelConfig
from jaxllm.errors import ConfigError, DataError
from jaxllm.evaluate.text import Text
from jaxllm.hf import saving
from jaxllm.study import describe, methods
from jaxllm.study.progress import Progress
from jaxllm.study.stop import StopFlag
from jaxllm.train import data

METRICS = ("bpb_last", "perplexity")
"""Of the joint table."""


class Restored(Trained):
  """A model that a sweep has trained; nothing is written to its run."""

  def __init__(self, settings: TrainSettings, dtype: str):
    super().__init__(settings, dtype)
    restored.check_corpus(Path(settings.out), self.corpus)

  def params(self, scheme: str, seed: int):
    return restored.load(Path(self.settings.out), scheme, seed)[1]


class Alone(Models):
  """A checkpoint on a text, where no length beyond its own is asked for."""

  unit = "tokens"

  def __init__(self, f: Any):
    self.checkpoint = Checkpoint.open(f.model, f.dtype, mesh=f.mesh, rules=f.rules, verify=f.verify)
    self.schemes = {methods.LOADED: scheme_of(self.checkpoint.cfg)}
    self.configs = self.tested = {methods.LOADED: self.checkpoint.cfg}
    string, self._about = data.load_text(f.text)
    self.text = self.checkpoint.text(string, f"--text={f.text}")
    print("\n".join(describe.model_lines(self.checkpoint.cfg)))

  def params(self, scheme: str, seed: int):
    return self.checkpoint.params()

  def scope(self):
    return self.checkpoint.scope()

  def record(self) -> dict:
    return {"corpus": self._about | {"tokens": len(self.text)}, "checkpoint": self.checkpoint.about()}


@dataclasses.dataclass
class Source:
  """scheme: how the model was trained; window: tokens it is scored on at once; settings: of the sweep, with --lengths."""

  models: Models
  scheme: str
  train_length: int
  window: int
  text: Text
  settings: Settings | None

  def __post_init__(self):
    self._params = None

  @property
  def cfg(self) -> ModelConfig:
    """The model as it is tested."""
    return self.models.tested[self.scheme]

  @property
  def checkpoint(self) -> Checkpoint | None:
    """What is loaded; None for a model that a sweep trains."""
    return getattr(self.models, "checkpoint", None)

  @property
  def rows(self) -> int:
    """Into how many parts a mesh splits a batch."""
    return self.checkpoint.rows if self.checkpoint else 1

  def disk_bytes(self, params: Any) -> int:
    """Of the weights' files as hf.save writes them, of a model of the sweep as experiments.export does; raises as hf.save."""
    if self.checkpoint:
      return saving.weight_bytes(self.cfg, params, family=self.checkpoint.family)
    return saving.weight_bytes(export.llama_config(self.cfg, self.train_length), params)

  def begin(self, progress: Progress, stop: StopFlag, left: int) -> None:
    """As of `Models`."""
    self.models.begin(progress, stop, left)

  def scope(self) -> contextlib.AbstractContextManager:
    """As of `Models`."""
    return self.models.scope()

  def params(self) -> Any:
    """The weights as they are, read or trained once."""
    if self._params is None:
      self._params = jax.block_until_ready(self.models.params(self.scheme, 0))
    return self._params

  def record(self) -> dict:
    """For config.json."""
    found = self.models.record()
    if self.settings is None:
      return found
    names = ("methods", "metrics", "lengths", "train_length", "windows")
    return found | {
      "sweep": {name: getattr(self.settings, name) for name in names}
      | {"attention": core_reports(self.settings, self.models)}
    }


def open_models(f: Any, out: Path) -> Source:
  """The model that the flags name, with nothing but its settings read; ConfigError for flags that do not fit it."""
  if f.model is not None:
    models, settings = _loaded(f)
  else:
    models, settings = _trained(f, out)
  scheme = next(iter(models.schemes))
  cfg = models.tested[scheme]
  if f.model is not None and (held := models.checkpoint.opened.matched.held):
    path, leaf = next(iter(held.items()))
    raise ConfigError(
      f"--model={f.model}: {path} is quantized already ({leaf.scheme}), expected a checkpoint of floats"
    )
  trained = settings.train_length if settings else f.train_length or models.checkpoint.trained_length
  window = f.window or min(evaluate.SMOKE_WINDOW if f.smoke else evaluate.LONGEST_DEFAULT, trained or 10**9)
  cfg.check_length(window, "--window")
  cfg.check_length(f.prompt + f.new, "--prompt and --new")
  if f.lengths is None and not f.smoke:
    settings = None
  if settings is not None:
    _check_sweep(settings, models, scheme)
  text = dataclasses.replace(
    models.text, ids=models.text.ids[: f.tokens], sizes=models.text.sizes[: f.tokens]
  )
  if len(text) < (least := max(3, f.batch * f.prompt)):
    raise DataError(f"text: found {len(text)} tokens, expected at least {least}; give more text")
  return Source(models, scheme, trained or window, window, text, settings)


def _check_sweep(settings: Settings, models: Models, scheme: str) -> None:
  how = models.schemes[scheme]
  for length in settings.lengths:
    if reason := methods.beyond_table(how, settings.train_length, length):
      raise ConfigError(f"--lengths={','.join(map(str, settings.lengths))}: {length}: {reason}")
  for name in settings.methods:
    if reason := methods.not_applicable(how, name):
      raise ConfigError(f"--methods={name}: {reason}")
  methods.check_methods_matter((how,), settings.methods, None, settings.train_length, settings.lengths)
  check_tables_differ(settings, models)


def _loaded(f: Any) -> tuple[Models, Settings | None]:
  if f.lengths is None:
    return Alone(f), None
  args = [f"--model={f.model}", f"--text={f.text}", f"--dtype={f.dtype}", f"--verify={f.verify}"]
  given = {"train_length": f.train_length, "mesh": f.mesh, "rules": f.rules}
  args += [f"--{name}={value}" for name, value in given.items() if value]
  models = Loaded(_sweep(f, args))
  models.settings = dataclasses.replace(models.settings, metrics=METRICS)
  return models, models.settings


def _trained(f: Any, out: Path) -> tuple[Models, Settings]:
  if f.run is None:
    settings = _sweep(f, [f"--out={out}", "--schemes=rope"])
    kind, dtype = Trained, length_extrapolation.default_dtype(jax.default_backend())
  else:
    found = restored.settings(Path(f.run))
    # the flags as the sweep reads them, and the model as the run has it
    scheme, trained = found["schemes"][0], found["train_length"]
    asked = _sweep(f, [f"--out={f.run}", f"--train_length={trained}"], scheme, trained)
    kind, dtype = Restored, found["dtype"]
    own = {
      field.name: found[field.name] for field in dataclasses.fields(TrainSettings) if field.name != "out"
    }
    own |= {name: getattr(asked, name) for name in ("out", "methods", "lengths", "factors", "windows")}
    settings = TrainSettings(**own | {"schemes": (scheme,)})
  models = kind(dataclasses.replace(settings, metrics=METRICS, attention="auto"), dtype)
  return models, models.settings


def _sweep(
  f: Any, args: list[str], scheme: str = "rope", train_length: int = SMOKE["train_length"]
) -> Settings:
  """The settings of the sweep, by its own flags; --smoke joins it on a model of its own."""
  values = copy.deepcopy(flags.FLAGS)
  if f.lengths is not None:
    args = [*args, f"--lengths={f.lengths}", f"--methods={f.methods}", f"--windows={f.windows}"]
  elif f.smoke:
    stretched = [] if methods.not_applicable(methods.SCHEMES[scheme], "yarn") else ["yarn"]
    args = [
      *args,
      f"--lengths={train_length},{2 * train_length}",
      f"--methods={','.join(['none', *stretched])}",
    ]
  if f.smoke:
    args = [*args, "--smoke"]
  values(["quantize", *args])
  return length_extrapolation.read_settings(values)
