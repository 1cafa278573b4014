"""A checkpoint that is loaded, as the one model of a sweep, on text in its own tokens."""

from __future__ import annotations

import dataclasses

import numpy as np

from experiments.checkpoint import Checkpoint, scheme_of
from experiments.extrapolation.evaluate import unchanged
from experiments.extrapolation.models import Models
from experiments.extrapolation.settings import LoadSettings
from jaxllm.errors import DataError
from jaxllm.study import describe, interval, methods
from jaxllm.train import data

IN_LENGTH_TOKENS = 128_000
"""About as many measure a model within its trained length: a thousand windows of 128, fifteen of 8192."""


class Loaded(Models):
  """The model of --model; its weights are read once, before the first cell, and not where all cells are recorded."""

  unit = "tokens"

  def __init__(self, settings: LoadSettings):
    self.checkpoint = Checkpoint.open(
      *(settings.model, settings.dtype, settings.attention, settings.mesh, settings.rules),
      verify=settings.verify,
    )
    cfg, scheme = self.checkpoint.cfg, scheme_of(self.checkpoint.cfg)
    self.settings = settings = settings.settled(scheme, self.checkpoint.trained_length)
    self.dtype = cfg.dtype
    self.schemes = {methods.LOADED: scheme}
    self.configs = self.tested = {methods.LOADED: cfg}
    self.left_out = unchanged(settings, self) if settings.asked in methods.GROUPS else ()
    kept = tuple(name for name in settings.methods if name not in self.left_out)
    self.settings = settings = dataclasses.replace(settings, methods=kept)
    self.in_length = max(1, min(methods.IN_LENGTH_WINDOWS, IN_LENGTH_TOKENS // settings.train_length))
    self.text, self._about = self._read()
    print("\n".join(self._in_force()))
    self._params = None

  def begin(self, progress, stop, left: int) -> None:
    if left:
      progress.note(f"loading {self.checkpoint.directory}")
      self._params = self.checkpoint.params()

  def params(self, scheme: str, seed: int):
    assert self._params is not None, "no cell was left"
    return self._params

  def scope(self):
    return self.checkpoint.scope()

  def record(self) -> dict:
    return {"corpus": self._about, "checkpoint": self.checkpoint.about()}

  def learnt(self, values, windows: np.ndarray) -> str:
    found = values[methods.LOADED]
    reached = f"{interval.mean(found):.3f}" if found else "failed"
    return f"Bits per byte at the trained length of {self.settings.train_length} tokens, on {len(windows)} windows: {reached}."

  def lines(self, config: dict) -> list[str]:
    text, devices = self._about, config["devices"]
    part = "all of it" if self.settings.text else f"its validation part ({text['split']})"
    return [
      f"- Text: {text['source']}, {text['files']} files, {part}: {text['tokens']} tokens for {text['token_bytes']} bytes, "
      f"SHA-256 {text['sha256'][:16]}.  Bits per byte are over the bytes that the scored tokens stand for.",
      *(f"- {line[0].upper()}{line[1:]}." for line in self._in_force()),
      f"- {len(devices)} x {devices[0]} with jax {config['libraries']['jax']}, Python {config['python']}.",
    ]

  def _read(self):
    settings = self.settings
    if settings.text is not None:
      string, about = data.load_text(settings.text)
      source = f"--text={settings.text}"
    else:
      corpus = data.load_corpus(settings.corpus)
      string, about = corpus.validation.tobytes().decode(), corpus.about
      source = f"--corpus={settings.corpus or 'the standard library'}, validation part"
    text = self.checkpoint.text(string, source)
    longest, needed = max(settings.lengths), settings.windows * settings.train_length
    if len(text) < longest + 1 + needed:
      raise DataError(
        f"{source}: found {len(text)} tokens, expected at least {longest + 1 + needed} for {settings.windows} windows of up to "
        f"{longest} whose last {settings.train_length} are apart; give more text, shorter --lengths or fewer --windows"
      )
    return text, about | {"tokens": len(text), "token_bytes": int(text.sizes.sum()), "begins": _int(text.bos)}

  def _in_force(self) -> list[str]:
    """The settings of the model that are in force, and how its methods are put on."""
    settings, checkpoint = self.settings, self.checkpoint
    lines = [f"checkpoint: {settings.model}, family {checkpoint.family}"]
    lines += describe.model_lines(checkpoint.cfg, max(settings.lengths))
    lines.append(f"trained length: {settings.train_length} tokens, from which factors and methods count")
    replaced = describe.replaced_line(checkpoint.cfg, settings.train_length)
    if replaced and any(methods.METHODS[name].position for name in settings.methods):
      lines.append(replaced)
    if self.left_out:
      names, longest = ", ".join(self.left_out), max(settings.lengths)
      lines.append(
        f"left out of --methods={settings.asked}: {names}, with which the model at {longest} is as it is by itself"
      )
    if checkpoint.mesh is not None:
      lines.append(f"mesh: {checkpoint.about_mesh()}")
    if self.text.bos is not None:
      lines.append(f"windows: each begins with token {self.text.bos}, as the tokenizer begins a text")
    return lines


def _int(number) -> int | None:
  return None if number is None else int(number)
