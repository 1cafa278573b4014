"""Texts continued by a model with a position method on it, and how fast that was."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.extrapolation.variants import aligned, on, shared_program
from experiments.restored import load, trained_length
from jaxllm import hf
from jaxllm.config import ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.generate.output import Generated
from jaxllm.generate.text import StopStrings, broken_id
from jaxllm.nn import STORES, Transformer
from jaxllm.position import LogN, PositionTables
from jaxllm.sampling import Sampler
from jaxllm.study import methods

COMPILING = "/jax/core/compile/"


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

  def stop_ids(self, strings: Sequence[str]) -> tuple[int, ...]:
    """What ends a text: the ids that the settings or the tokenizer name, and each stop string that is a token by itself."""
    named = (self.tokenizer.added[one] for one in strings if one in self.tokenizer.added)
    ids = {*self.cfg.eos_ids, *self.tokenizer.eos_ids, *named}
    return tuple(sorted(one for one in ids if one < self.cfg.vocab_size))


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


@dataclasses.dataclass(frozen=True)
class Drawing:
  """How tokens are drawn, the same for all texts of a call of the script."""

  sampler: Sampler
  max_new_tokens: int
  stop_ids: tuple[int, ...]
  chunk: int
  store: str
  logprobs: int | None


@dataclasses.dataclass(frozen=True)
class Figures:
  """Seconds of one call, by the clock, and tokens; what was compiled on the way is counted apart."""

  first_token: float
  rest: float
  compiling: tuple[float, float]
  prompt_tokens: int
  first_tokens: int
  later_tokens: int

  @property
  def prompt_rate(self) -> float | None:
    """Prompt tokens a second, until the first new ones."""
    return _rate(self.prompt_tokens, self.first_token - self.compiling[0])

  @property
  def rate(self) -> float | None:
    """New tokens a second, from the second of a row on; None where there are none."""
    return _rate(self.later_tokens, self.rest - self.compiling[1])


def _rate(tokens: int, seconds: float) -> float | None:
  return tokens / seconds if tokens and seconds > 0 else None


def continued(
  source: Source,
  params: Any,
  method: On,
  drawing: Drawing,
  rows: Sequence[Sequence[int]],
  keys: jax.Array,
  stops: StopStrings,
  on_tokens: Callable[[int, list[int]], Any] | None = None,
) -> tuple[Generated, Figures]:
  """New ids of some rows, one call of `generate`, with its figures."""
  from jaxllm.generate.loop import generate

  times: list[float] = []

  def told(row: int, ids: list[int]) -> None:
    times.append(time.perf_counter())
    if on_tokens is not None:
      on_tokens(row, ids)

  with source.scope(), compile_spans() as spans:
    begin = time.perf_counter()
    out = generate(
      method.model,
      params,
      rows,
      sampler=drawing.sampler,
      key=keys,
      max_new_tokens=drawing.max_new_tokens,
      stop_ids=drawing.stop_ids,
      rope=method.tables,
      chunk=drawing.chunk,
      store=STORES[drawing.store],
      stop=stops if stops.strings else None,
      on_tokens=told,
      logprobs=drawing.logprobs,
    )
    end = time.perf_counter()
  first = times[0] if times else end
  compiling = covered(spans, begin, first), covered(spans, first, end)
  later = sum(max(0, len(ids) - 1) for ids in out.tokens)
  count = sum(map(len, out.tokens))
  return out, Figures(first - begin, end - first, compiling, sum(map(len, rows)), count - later, later)


@contextlib.contextmanager
def compile_spans() -> Iterator[list[tuple[float, float]]]:
  """(begin, end) of all tracing and compiling in its block, by time.perf_counter; spans may be within others."""
  spans: list[tuple[float, float]] = []

  open_ = True

  def listen(event: str, seconds: float, **_: Any) -> None:
    if open_ and event.startswith(COMPILING):
      now = time.perf_counter()
      spans.append((now - seconds, now))

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield spans
  finally:
    open_ = False
    if forget := getattr(
      jax.monitoring, "unregister_event_duration_listener", None
    ):  # older releases keep it
      forget(listen)


def covered(spans: Sequence[tuple[float, float]], begin: float, end: float) -> float:
  """Seconds between `begin` and `end` that are in any of the spans."""
  total, at = 0.0, begin
  for start, stop in sorted(spans):
    start, stop = max(start, at), min(stop, end)
    if stop > start:
      total, at = total + stop - start, stop
  return total
