"""Texts continued by a model, and how fast that was."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from experiments.source import On, Source
from jaxllm.generate.output import Generated
from jaxllm.generate.text import StopStrings
from jaxllm.nn import STORES
from jaxllm.sampling import Sampler

COMPILING = "/jax/core/compile/"


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
  count: int | None = None,
) -> tuple[Generated, Figures]:
  """New ids of some rows, one call of `generate`, with figures of the first `count` rows (None: all)."""
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
  counted, read = out.tokens[:count], rows[:count]
  later = sum(max(0, len(ids) - 1) for ids in counted)
  new = sum(map(len, counted))
  return out, Figures(first - begin, end - first, compiling, sum(map(len, read)), new - later, later)


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
