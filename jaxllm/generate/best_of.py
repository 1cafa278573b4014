"""Best of n: several draws of a prompt, the likeliest first."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np

from jaxllm.errors import ConfigError
from jaxllm.generate import loop, request
from jaxllm.nn import Transformer
from jaxllm.sampling import Sampler


@dataclasses.dataclass(frozen=True)
class Ranked:
  """For each prompt its texts, the best first: new ids, why each ended, and its score."""

  tokens: list[list[list[int]]]
  reasons: list[list[Literal["stop", "length"]]]
  scores: list[list[float]]


def generate(
  model: Transformer,
  params: Any,
  prompts: Sequence[Sequence[int]],
  *,
  n: int,
  sampler: Sampler,
  key: jax.Array,
  length_penalty: float = 1.0,
  **arguments: Any,
) -> Ranked:
  """n draws of each prompt, which is read once, ordered by sum_t log p(token_t) / T^length_penalty, T new tokens.

  p is the model's own distribution, before the sampler.  length_penalty: 0 is the sum, 1 the mean.  arguments: as
  `loop.generate` takes them, but for copies and logprobs, which are set here.  Raises ConfigError for an n that is no integer
  of at least 1, a length_penalty that is no finite number, and those two.
  Source: Stiennon et al. (2020), section 3.3, with the likelihood as the score; OpenAI's `best_of`.
  """
  if (
    isinstance(length_penalty, bool)
    or not isinstance(length_penalty, (int, float))
    or not np.isfinite(length_penalty)
  ):
    raise ConfigError(f"length_penalty: found {length_penalty!r}, expected a finite number")
  n = request.count("n", n)
  for name in ("copies", "logprobs"):
    if name in arguments:
      raise ConfigError(
        f"{name}: found {arguments[name]!r}, expected none, as n and the ranking set it; leave it out"
      )
  out = loop.generate(model, params, prompts, sampler=sampler, key=key, copies=n, logprobs=0, **arguments)
  ranked = Ranked([], [], [])
  for first in range(0, len(out.tokens), n):
    rows = range(first, first + n)
    score = lambda row: sum(out.logprobs[row]) / max(1, len(out.logprobs[row])) ** length_penalty
    best = sorted(rows, key=score, reverse=True)
    ranked.tokens.append([out.tokens[row] for row in best])
    ranked.reasons.append([out.reasons[row] for row in best])
    ranked.scores.append([score(row) for row in best])
  return ranked
