"""Models that the sweep trains itself, on bytes: one a scheme and seed, when it is first asked for."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np

from experiments.extrapolation.models import Models
from experiments.extrapolation.settings import TrainSettings
from jaxllm.config import Layer, ModelConfig, hwfa_layers
from jaxllm.errors import CheckpointError, JaxllmError
from jaxllm.evaluate import text
from jaxllm.evaluate.trigram import Trigram
from jaxllm.evaluate.windows import bits_per_byte
from jaxllm.nn.transformer import Transformer
from jaxllm.ops.choose import CORES
from jaxllm.position import POSITIONS, LogN
from jaxllm.study import interval, methods
from jaxllm.study.files import write_json
from jaxllm.train import data
from jaxllm.train.checkpoint import move_aside, restore_tree
from jaxllm.train.loop import Watch, fit
from jaxllm.train.step import TrainConfig


class Trained(Models):
  """Models by scheme and seed, trained (or read) when they are first asked for; the last one is kept."""

  unit = "bytes"
  in_length = methods.IN_LENGTH_WINDOWS

  def __init__(self, settings: TrainSettings, dtype: str):
    self.settings = settings
    self.corpus = data.load_corpus(settings.corpus)
    source = settings.corpus or "the standard library"
    data.check_size(
      self.corpus, f"--corpus={source}", settings.train_length, max(settings.lengths), settings.windows
    )
    self.text = text.of_bytes(self.corpus.validation)
    self.schemes = {name: methods.SCHEMES[name] for name in settings.schemes}
    config = functools.partial(model_config, settings, dtype=dtype)
    self.configs = {name: config(how, how.position) for name, how in self.schemes.items()}
    self.tested = {name: config(how, how.tested_as or how.position) for name, how in self.schemes.items()}
    self._last: tuple = (None, None)

  def begin(self, progress, stop, left: int) -> None:
    self._progress, self._stop = progress, stop

  def params(self, scheme: str, seed: int):
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
    """What is missing on disk, or cannot be read, is trained again, from an intact step on."""
    directory = self._directory(scheme, seed)
    step = 0
    if directory.exists():
      try:
        step = restore_tree(directory)[0]
      except CheckpointError:
        move_aside(directory, f"{directory}: no step can be read")
    if step < self.settings.steps_of(scheme) or not (directory / "model.json").exists():
      self._last = (None, None)  # what is in memory would hide what is not on disk
      self.params(scheme, seed)

  def record(self) -> dict:
    return {
      "corpus": self.corpus.about,
      "models": {scheme: config.to_dict() for scheme, config in self.configs.items()},
      "training": {scheme: train_config(self.settings, scheme).record() for scheme in self.configs},
    }

  def name(self, scheme: str) -> str:
    steps = {name: self.settings.steps_of(name) for name in self.schemes}
    return f"{scheme} ({steps[scheme]} steps)" if len(set(steps.values())) > 1 else scheme

  def learnt(self, values, windows: np.ndarray) -> str:
    """Beside the trigram model on the same windows."""
    settings, found = self.settings, []
    for scheme in self.schemes:
      reached = f"{interval.mean(values[scheme]):.3f}" if values[scheme] else "failed"
      count = len(values[scheme])
      some = "" if count in (0, settings.seeds) else f"; {count} of {settings.seeds} seeds"
      found.append(f"{scheme} {reached} ({settings.steps_of(scheme)} steps{some})")
    return (
      f"Bits per byte at the training length of {settings.train_length}, on {len(windows)} windows: {', '.join(found)}; "
      f"interpolated trigram model {self._trigram(windows):.3f}."
    )

  def lines(self, config: dict) -> list[str]:
    settings, corpus = self.settings, self.corpus.about
    return [
      f"- Text: {corpus['source']}, {corpus['files']} files, {corpus['bytes']} bytes, {corpus['split']} "
      f"({corpus['train_bytes']} for training, {corpus['validation_bytes']} for validation), SHA-256 {corpus['sha256'][:16]}.",
      f"- Training: {', '.join(f'{s} {settings.steps_of(s)} steps' for s in settings.schemes)} of {settings.batch_size} x "
      f"{settings.train_length} bytes; {settings.seeds} seed(s); {config['settings']['dtype']} compute, float32 parameters.",
      f"- Model: {settings.num_layers} layers, width {settings.embed_dim}, {settings.num_heads} heads, SwiGLU of "
      f"{settings.mlp_dim}, RMSNorm, {config['devices'][0]} with jax {config['libraries']['jax']}, Python {config['python']}.",
    ]

  def _trigram(self, windows: np.ndarray) -> float:
    return bits_per_byte(Trigram(self.corpus.train).nats(windows))

  def _directory(self, scheme: str, seed: int) -> Path:
    return Path(self.settings.out) / "checkpoints" / f"{scheme}-{seed}"

  def _train(self, scheme: str, seed: int):
    config, model = train_config(self.settings, scheme), Transformer(self.configs[scheme])
    directory = self._directory(scheme, seed)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "model.json", self.tested[scheme].to_dict())
    progress, tokens = self._progress, config.batch_size * config.length

    class Shown(Watch):
      def start(self, step: int) -> None:
        self.line = progress.training(f"train {scheme}, seed {seed}", config.steps, step, tokens)

      def step(self, step: int, metrics: dict) -> None:
        self.line.update(step, metrics["loss"])

    state = fit(
      model,
      config,
      data.Stretches(self.corpus.train, seed, config.batch_size, config.length),
      seed,
      directory,
      Shown(),
      self._stop,
    )
    return state["params"]


def model_config(settings: TrainSettings, how: methods.Scheme, position: str, dtype: str) -> ModelConfig:
  """The decoder of a scheme with `position`: the one it trains, or the one it is tested with."""
  length = settings.train_length
  cls = POSITIONS[position]
  fields = {"original_length": length, "max_length": length, "proportion": 0.25}
  known = {field.name for field in dataclasses.fields(cls)}
  method = cls(**{name: value for name, value in fields.items() if name in known})
  layers = (Layer(method),)
  if how.hwfa:
    layers = hwfa_layers(settings.num_layers, hwfa_window(settings), method)
  return ModelConfig(
    vocab_size=data.VOCAB_SIZE,
    embed_dim=settings.embed_dim,
    num_layers=settings.num_layers,
    num_heads=settings.num_heads,
    num_kv_heads=settings.num_heads,
    head_dim=settings.embed_dim // settings.num_heads,
    mlp_dim=settings.mlp_dim,
    layers=layers,
    query_scale=LogN(length) if how.log_n else None,
    embed_scale=settings.embed_dim**0.5,
    attention=CORES[settings.attention](),
    dtype=dtype,
  )


def hwfa_window(settings: TrainSettings) -> int:
  """The largest window whose reach over all layers but the last, (window - 1) (L - 1) + 1, is at most 3/4 of the length."""
  return (3 * settings.train_length // 4 - 1) // (settings.num_layers - 1) + 1


def train_config(settings: TrainSettings, scheme: str) -> TrainConfig:
  """How a scheme trains."""
  return TrainConfig(
    settings.steps_of(scheme),
    settings.batch_size,
    settings.train_length,
    learning_rate=settings.learning_rate,
  )
