"""The presence and frequency penalties of OpenAI's interface."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxllm.sampling.base import as_pytree, checked, per_row
from jaxllm.sampling.history import Remembers, counts


class CountPenalty(Remembers):
  """z_v <- z_v - penalty * weight(c_v), c_v = how often v is among the tokens that count."""

  def weight(self, count_BV):
    """How many times a token of each count pays the penalty."""
    return count_BV

  def __post_init__(self):
    largest = float(np.finfo(np.float32).max)
    checked(self, "penalty", lambda p: np.abs(p) <= largest, "a finite number (0 is off)")
    checked(self, "last_n", lambda n: n >= -1, "an integer >= -1 (-1 is all)", dtype=np.int32)
    checked(self, "prompt", lambda _: True, "True or False", dtype=np.bool_)

  def filter(self, logits_BV, state):
    logits_BV = logits_BV.astype(jnp.float32)
    last_n = per_row(self.last_n, logits_BV, jnp.int32)
    tokens_BC = state.recent(last_n, per_row(self.prompt, logits_BV, jnp.bool_))
    weight_BV = self.weight(counts(tokens_BC, logits_BV.shape[-1])).astype(jnp.float32)
    return logits_BV - per_row(self.penalty, logits_BV) * weight_BV


@as_pytree
@dataclasses.dataclass(frozen=True)
class PresencePenalty(CountPenalty):
  """Lowers the logit of each token that was drawn before, once.

  z_v <- z_v - penalty [c_v > 0], c_v = how often v was drawn.  penalty: a scalar or [B], finite; 0 is off, below 0
  favours what was drawn (OpenAI allows -2 to 2).  last_n: how many of the newest tokens count, an integer or [B];
  -1 is all.  prompt: whether those of the prompt count too, True, False or [B]: False is OpenAI's and vLLM's way,
  True llama.cpp's.  Raises SamplingError for other values.
  Source: OpenAI's API reference (2023), presence_penalty; llama.cpp's penalties.
  """

  penalty: Any = 0.0
  last_n: Any = -1
  prompt: Any = False

  def weight(self, count_BV):
    return count_BV > 0


@as_pytree
@dataclasses.dataclass(frozen=True)
class FrequencyPenalty(CountPenalty):
  """Lowers the logit of each token by the number of times that it was drawn before.

  z_v <- z_v - penalty c_v, c_v = how often v was drawn.  Fields as of PresencePenalty; the two add up.
  Raises SamplingError for other values.
  Source: OpenAI's API reference (2023), frequency_penalty; llama.cpp's penalties.
  """

  penalty: Any = 0.0
  last_n: Any = -1
  prompt: Any = False
