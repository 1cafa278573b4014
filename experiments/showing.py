"""What experiments.generate writes: texts to standard output as they come, JSON lines, notes to standard error."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from typing import Any

from experiments.continuing import Figures
from experiments.source import On, Source
from jaxllm.generate.output import Generated
from jaxllm.generate.text import Stream
from jaxllm.study.prompts import Prompt


def write(text: str) -> None:
  """Text to standard output at once, as UTF-8 whatever the locale is."""
  sys.stdout.flush()
  sys.stdout.buffer.write(text.encode())
  sys.stdout.buffer.flush()


def note(text: str) -> None:
  """A line to standard error, which holds no text of a model."""
  print(text, file=sys.stderr, flush=True)


def summary(figures: Figures, reason: str) -> str:
  """How a text ended, and how fast it came."""
  rate = lambda value: "" if value is None else f" at {value:.4g}/s"
  compiling = sum(figures.compiling)
  apart = f", of which {figures.compiling[0]:.2f} s compiling" if compiling >= 0.005 else ""
  return (
    f"[{reason}: {figures.prompt_tokens} prompt tokens{rate(figures.prompt_rate)}, "
    f"{figures.first_tokens + figures.later_tokens} new{rate(figures.rate)}, first after {figures.first_token:.2f} s{apart}]"
  )


@dataclasses.dataclass(frozen=True)
class Asked:
  """A prompt: its number, the text that the model reads, and its ids."""

  number: int
  prompt: Prompt
  text: str
  ids: list[int]


def record(
  source: Source,
  method: On,
  asked: Asked,
  row: int,
  stream: Stream,
  out: Generated,
  figures: Figures,
  settings: dict[str, Any],
) -> str:
  """The JSON line of a row: prompt, text, ids, why it ended, figures of its batch, log-probabilities if asked, settings."""
  new = out.tokens[row]
  by: str | int | None = stream.stopped
  if by is None and out.reasons[row] == "stop":
    by = new[-1]
  found = {
    "row": asked.number,
    "method": method.name,
    "factor": method.factor,
    "prompt": asked.text,
    **({} if asked.prompt.messages is None else {"messages": list(asked.prompt.messages)}),
    "text": stream.text,
    "prompt_tokens": len(asked.ids),
    "tokens": len(new),
    "ids": new,
    "finish_reason": out.reasons[row],
    "stopped_by": by,
    "first_token_seconds": figures.first_token,
    "seconds": figures.first_token + figures.rest,
    "compile_seconds": sum(figures.compiling),
    "prompt_tokens_per_second": figures.prompt_rate,
    "tokens_per_second": figures.rate,
  }
  if out.logprobs is not None:
    found["logprobs"] = [_scored(source, out, row, t) for t in range(len(new))]
  return json.dumps({**found, "settings": settings}, ensure_ascii=False, allow_nan=False) + "\n"


def _scored(source: Source, out: Generated, row: int, t: int) -> dict[str, Any]:
  """A new token, its log-probability, and the likeliest in its place."""
  one = _token(source, out.tokens[row][t], out.logprobs[row][t])
  if out.likeliest is not None:
    one["top"] = [_token(source, *each) for each in out.likeliest[row][t]]
  return one


def _token(source: Source, one: int, logprob: float) -> dict[str, Any]:
  """JSON has no -inf: null is the log-probability of what cannot be."""
  known = one < source.tokenizer.vocab_size
  return {
    "id": one,
    "token": source.tokenizer.decode([one]) if known else "",
    "logprob": logprob if math.isfinite(logprob) else None,
  }
