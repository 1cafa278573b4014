"""What the experiments need to know of a checkpoint that was not trained here."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np

from experiments.extrapolation.variants import aligned, changes, is_rope, shared_program, with_variant
from jaxllm import parallel
from jaxllm.config import ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.evaluate.text import Text, check_ids, of_tokens
from jaxllm.hf import header, loading, tokenizer
from jaxllm.nn.transformer import Transformer
from jaxllm.ops.choose import CORES
from jaxllm.position import POSITIONS, PiRope, PositionTables
from jaxllm.study import choices, methods

BLOCK, BLOCKS = 4096, 64
"""The digest of weights is of so many blocks of bytes a tensor, evenly spaced: all of a large file takes minutes to read."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A checkpoint whose settings are read and whose weights are not."""

  opened: loading.Opened
  cfg: ModelConfig
  mesh: jax.sharding.Mesh | None
  rules: str | None

  @classmethod
  def open(
    cls,
    model: str,
    dtype: str = "auto",
    attention: str = "auto",
    mesh: str | None = None,
    rules: str | None = None,
    rope_precision: str = "exact",
    verify: bool = True,
  ) -> Checkpoint:
    """The checkpoint of a directory or a repository; every error of settings, and none of weights, is raised here."""
    made = None if mesh is None else parallel.make_mesh(mesh)
    if rules is not None and rules not in parallel.RULES:
      near = choices.nearest(rules, list(parallel.RULES))
      raise ConfigError(f"--rules={rules}: not known{near}; expected one of {', '.join(parallel.RULES)}")
    if made is not None and rules is None:
      rules = parallel.default_rules(made)
    opened = loading.open_checkpoint(model, dtype, rope_precision, verify)
    if made is not None:
      for path, shape in opened.matched.shapes.items():
        parallel.place(path, shape, made, parallel.RULES[rules], opened.cfg)
    return cls(opened, dataclasses.replace(opened.cfg, attention=CORES[attention]()), made, rules)

  @property
  def directory(self) -> Path:
    """Where its files are."""
    return self.opened.checkpoint.directory

  @property
  def family(self) -> str:
    """Its name in FAMILIES."""
    return self.opened.family.name

  def params(self):
    """The parameters, on the mesh if there is one."""
    return self.opened.params(self.mesh, None if self.rules is None else parallel.RULES[self.rules])

  def text(self, text: str, source: str) -> Text:
    """A text as the model reads it; windows begin as its tokenizer begins a text."""
    own = tokenizer.load_tokenizer(self.directory, self.cfg, verify=bool(self.opened.kept.digests))
    ids, ends = own.encode_ends(text)
    ids = np.asarray(ids, np.int32)
    check_ids(ids, self.cfg.vocab_size, source)
    return of_tokens(text, ids, np.asarray(ends), own.bos_id if ids[0] == own.bos_id else None)

  def scope(self) -> contextlib.AbstractContextManager:
    """The mesh in scope, if there is one."""
    return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

  @property
  def trained_length(self) -> int | None:
    """The context that the model was trained at: what its RoPE says (of layers over all keys first), or else what it serves."""
    ropes = sorted(filter(is_rope, self.cfg.layers), key=lambda layer: layer.window is not None)
    told = (layer.position.original_length for layer in ropes)
    return next(filter(None, told), None) or self.cfg.context_length or self.cfg.length_limit

  @property
  def rows(self) -> int:
    """Into how many parts the mesh splits a batch."""
    return 1 if self.mesh is None else parallel.batch_shards(self.mesh)

  def about_mesh(self) -> str:
    """The mesh and its rule set, in words."""
    return f"{parallel.spell(self.mesh)} of {self.mesh.devices.flat[0].device_kind}, rules {self.rules}"

  def _digests(self) -> dict[str, str]:
    """{name of a file: SHA-256}: of all of the settings and the tokenizer, of a sample of each tensor of the weights."""
    found = {path.name: _digest(path) for path in self.directory.iterdir() if path.suffix in KEPT}
    by_file: dict[Path, list[header.Stored]] = {}
    for tensor in self.opened.checkpoint.tensors.values():
      by_file.setdefault(tensor.file, []).append(tensor)
    return dict(
      sorted((found | {path.name: sampled(path, tensors) for path, tensors in by_file.items()}).items())
    )

  def about(self) -> dict:
    """What tells this checkpoint and its layout from others, for config.json."""
    return {
      "family": self.family,
      "files": self._digests(),
      "config": self.cfg.to_dict(),
      "mesh": None if self.mesh is None else parallel.spell(self.mesh),
      "rules": self.rules,
    }


KEPT = (".json", ".model", ".txt")


def sampled(path: Path, tensors: Iterable[header.Stored]) -> str:
  """SHA-256 of a file's size, its header and a sample of each tensor: both ends and what is evenly spaced between, or all of
  BLOCKS * BLOCK bytes and less.

  Neither the path nor a time is in it, so a copy elsewhere has the same.  It catches other names, types or shapes, and any
  change that reaches a block, as training, merging, quantizing or overwriting a tensor does.  It misses a change wholly between
  two blocks of a tensor, such as one row of a large embedding: blocks begin (size - BLOCK) / (BLOCKS - 1) bytes apart.
  """
  tensors = sorted(tensors, key=lambda tensor: tensor.start)
  found = hashlib.sha256(str(path.stat().st_size).encode())
  with path.open("rb") as file:
    found.update(file.read(tensors[0].start))
    for tensor in tensors:
      last = tensor.stop - tensor.start - BLOCK
      if last <= BLOCK * (BLOCKS - 1):
        file.seek(tensor.start)
        found.update(file.read(tensor.stop - tensor.start))
        continue
      for i in range(BLOCKS):
        file.seek(tensor.start + last * i // (BLOCKS - 1))
        found.update(file.read(BLOCK))
  return found.hexdigest()


def _digest(path: Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def scheme_of(cfg: ModelConfig) -> methods.Scheme:
  """What can be put on a loaded model, and why not what cannot."""
  ropes = [layer for layer in cfg.layers if is_rope(layer)]
  everywhere = [layer for layer in ropes if layer.window is None]
  plain = [layer for layer in everywhere if layer.position.program is None]
  names = ", ".join(dict.fromkeys(map(_name, cfg.positions)))
  if not ropes:
    lacks = f"the model has no RoPE (its positions: {names})"
  elif not everywhere:
    windows = ", ".join(dict.fromkeys(str(layer.window) for layer in ropes))
    lacks = f"every RoPE layer of the model has a window ({windows} keys), beyond which it sees nothing"
  else:
    lacks = f"the model has no layer of plain RoPE over all keys (its positions: {names})"
  return methods.Scheme(
    methods.LOADED,
    _name(cfg.layers[0].position),
    log_n=cfg.query_scale is not None,
    plain_rope=bool(plain) and len(plain) == len(everywhere),
    lacks=lacks,
    linear=max(
      (
        layer.position.factor
        for layer in everywhere
        if isinstance(layer.position, PiRope) and layer.position.factor != 1.0
      ),
      default=None,
    ),
    sees_all=any(layer.window is None for layer in cfg.layers),
    max_length=cfg.length_limit,
    group_size=1,
  )


@dataclasses.dataclass(frozen=True)
class On:
  """A model with a method on it, for windows of one length: its config, and the program and tables that compute it."""

  variant: methods.Variant
  train_length: int
  tested: ModelConfig
  model: Transformer
  tables: PositionTables


def method_on(
  checkpoint: Checkpoint, name: str, factor: float | None, train_length: int | None, length: int
) -> On:
  """A loaded model with a method of the sweep; factor by default length / trained length.

  Raises ConfigError for a method that the model cannot have, or that changes nothing at this length.
  """
  cfg, scheme = checkpoint.cfg, scheme_of(checkpoint.cfg)
  if not train_length:
    methods.check_counts_from(scheme, name, checkpoint.trained_length, f"--method={name}")
  train = train_length or checkpoint.trained_length
  if train is None and name != "none":
    raise ConfigError(
      f"--method={name}: the settings of the model do not say how long a context it was trained at; give --train_length=TOKENS"
    )
  train = train or length
  factors = None if factor is None else (factor,)
  if reason := methods.not_applicable(scheme, name):
    raise ConfigError(f"--method={name}: {reason}")
  (variant,) = methods.variants([name], factors, train, length)
  tested = with_variant(cfg, variant, factors, train, length)
  control = name == "none" or (factors is not None and variant.factor == 1.0)
  if not control and not changes(cfg, scheme, variant, factors, train, length):
    raise ConfigError(
      f"--method={name} on windows of {length}: changes nothing, as the model was trained at {train}; give a longer --window, "
      "another --factor, or leave the method out"
    )
  program = shared_program(cfg) if scheme.plain_rope and methods.METHODS[name].tables_only else tested
  model = Transformer(dataclasses.replace(program, query_scale=None))
  return On(variant, train, tested, model, aligned(tested, program, length))


def _name(position) -> str:
  return next(name for name, kind in POSITIONS.items() if kind is type(position))
