"""A model that texts are continued with, and the position methods that are put on it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.extrapolation.variants import aligned, on, shared_program
from experiments.restored import load, trained_length
from jaxllm import hf
from jaxllm.config import ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.generate.text import broken_id
from jaxllm.nn import Transformer
from jaxllm.position import LogN, PositionTables
from jaxllm.study import methods


@dataclasses.dataclass(frozen=True)
class Source:
  """A model whose weights are not read yet.  scheme: what can be put on it; trained: its context, None: not known."""

  cfg: ModelConfig
  scheme: methods.Scheme
  trained: int | None
  tokenizer: hf.Tokenizer
  params: Callable[[], Any]
  scope: Callable[[], contextlib.AbstractContextManager]
  given_length: bool = False

  @classmethod
  def of_run(cls, run: Path, scheme: str, seed: int) -> Source:
    """A model of a run of the sweep, whose tokens are bytes."""
    cfg, params = load(run, scheme, seed)
    trained = trained_length(run)
    return cls(
      cfg, methods.SCHEMES[scheme], trained, hf.byte_tokenizer(), lambda: params, contextlib.nullcontext
    )

  @classmethod
  def of_checkpoint(cls, f: Any) -> Source:
    """That of --model, by its settings and its tokenizer."""
    from experiments.checkpoint import Checkpoint, scheme_of

    own = Checkpoint.open(f.model, f.dtype, mesh=f.mesh, rules=f.rules, verify=f.verify)
    if any(getattr(position, "two_dimensional", False) for position in own.cfg.positions):
      raise ConfigError(
        f"--model={f.model}: its positions are two a token and depend on the prompt's form (GLM); give them to loop.generate"
      )
    tokenizer = hf.load_tokenizer(own.directory, own.cfg, verify=bool(own.opened.kept.digests))
    trained = f.train_length or own.trained_length
    given = f.train_length is not None
    return cls(own.cfg, scheme_of(own.cfg), trained, tokenizer, own.params, own.scope, given)

  def decode(self, ids: Sequence[int]) -> str:
    """The text of some ids, without special tokens, and without what the embedding has beyond the tokenizer."""
    known = [one for one in ids if one < self.tokenizer.vocab_size]
    return self.tokenizer.decode(known, special_tokens=False)

  @functools.cached_property
  def broken(self) -> int | None:
    """An id that is a part of a character, None where there is none."""
    return broken_id(self.decode, self.tokenizer.vocab_size)

  def stop_ids(self, strings: Sequence[str], eos: bool = True) -> tuple[int, ...]:
    """What ends a text: each stop string that is a special token, and with eos what settings and tokenizer name."""
    named = (self.special_id(one) for one in strings)
    ends = {*self.cfg.eos_ids, *self.tokenizer.eos_ids} if eos else set()
    ids = ends | {one for one in named if one is not None}
    return tuple(sorted(one for one in ids if one < self.cfg.vocab_size))

  def special_id(self, text: str) -> int | None:
    """The id of a special token, which texts are shown without; None for other texts."""
    ids = self.tokenizer.encode(text, special_tokens=False)
    return ids[0] if len(ids) == 1 and self.tokenizer.decode(ids) == text and not self.decode(ids) else None


@dataclasses.dataclass(frozen=True)
class On:
  """A model with a position method on it: the program, and the tables that are its data, None: those of its own config."""

  name: str
  factor: float | None
  model: Transformer
  tables: PositionTables | None = None

  def __str__(self) -> str:
    return self.name if self.factor is None else f"{self.name}, factor {self.factor:g}"


def put_on(
  source: Source, name: str, factor: float | None, length: int | None, flag: str, must_change: bool = True
) -> tuple[On, ModelConfig]:
  """A method on the model, for texts of up to `length` tokens, None: not known; the factor by default length / trained length.

  Raises ConfigError, with `flag`, for one that the model cannot have, or that changes no number and so is no method.
  """
  method, cfg, scheme = methods.METHODS[name], source.cfg, source.scheme
  if reason := methods.not_applicable(scheme, name):
    raise ConfigError(f"{flag}: {name}: {reason}")
  if name == "none":
    return On(name, None, Transformer(cfg)), cfg
  if not source.given_length:
    methods.check_counts_from(scheme, name, source.trained, flag)
  if source.trained is None:
    raise ConfigError(
      f"{flag}: the settings of the model do not say how long a context it was trained at; give --train_length=TOKENS"
    )
  if method.stretches and factor is None and length is None:
    raise ConfigError(
      f"{flag}: how long a dialogue gets is not known before; give --factor, the context over {source.trained}"
    )
  own = None
  if method.stretches:  # dynamic NTK follows the length by itself: its factor comes on top
    own = 1.0 if name == "dynamic_ntk" else float(max(1, math.ceil((length or 0) / source.trained)))
    own = own if factor is None else float(factor)
  tested = on(cfg, methods.Variant(name, 1.0 if own is None else own), source.trained)
  if method.log_n:
    tested = dataclasses.replace(tested, query_scale=LogN(source.trained, floor=1.0))
  if must_change and factor is None and length is not None and not _changes(cfg, tested, length, name):
    raise ConfigError(
      f"{flag}: {name} changes nothing on {length} tokens, as the model was trained at {source.trained}; give --factor, "
      "a longer text, or --method=none"
    )
  return On(name, own, Transformer(tested)), tested


def _changes(cfg: ModelConfig, tested: ModelConfig, length: int, name: str) -> bool:
  if not methods.METHODS[name].tables_only:
    return tested != cfg
  leaves, others = (jax.tree.leaves(one.rope_tables(max_len=length)) for one in (cfg, tested))
  return any(x.shape != y.shape or (x != y).any() for x, y in zip(leaves, others, strict=True))


def put_on_all(source: Source, names: Sequence[str], factor: float | None, length: int) -> list[On]:
  """Several methods: those of fixed frequencies as tables for one program, which is compiled once."""
  program = shared_program(source.cfg) if source.scheme.plain_rope else source.cfg
  shared = Transformer(dataclasses.replace(program, query_scale=None))
  found = []
  for name in names:
    own = factor if methods.METHODS[name].stretches else None
    one, tested = put_on(source, name, own, length, f"--compare={','.join(names)}")
    fixed = methods.METHODS[name].tables_only and all(
      table.rows == 1 for table in tested.rope_tables(max_len=length).ropes
    )
    if fixed:
      one = dataclasses.replace(one, model=shared, tables=aligned(tested, program, length))
    found.append(one)
  return found
