"""Best of n: several draws of a prompt, the likeliest first."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from jaxllm.errors import ConfigError
from jaxllm.generate import loop, request
from jaxllm.generate.output import Reason
from jaxllm.nn import Transformer
from jaxllm.sampling import Sampler


@dataclasses.dataclass(frozen=True)
class Ranked:
  """For each prompt its texts, the best first: new ids, why each ended, and its score."""

  tokens: list[list[list[int]]]
  reasons: list[list[Reason]]
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
  of at least 1, a length_penalty that is no number or too large for texts of max_new_tokens, and those two.  A text without
  tokens comes last.
  Source: Stiennon et al. (2020), section 3.3, with the likelihood as the score; OpenAI's `best_of`.
  """
  n = request.count("n", n)
  most = request.count("max_new_tokens", arguments.get("max_new_tokens", loop.NEW_TOKENS))
  length_penalty = request.length_penalty(length_penalty, most)
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
    best = sorted(rows, key=lambda row: (len(out.tokens[row]) > 0, score(row)), reverse=True)
    ranked.tokens.append([out.tokens[row] for row in best])
    ranked.reasons.append([out.reasons[row] for row in best])
    ranked.scores.append([score(row) for row in best])
  return ranked
