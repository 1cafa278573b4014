"""No n-gram twice."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxllm.sampling.base import as_pytree, checked, per_row
from jaxllm.sampling.history import Remembers, largest, repeats


@as_pytree
@dataclasses.dataclass(frozen=True)
class NoRepeatNgram(Remembers):
  """Excludes every token that would end an n-gram which the text, prompt included, has already.

  exclude_v = there is a c with tokens[c] = v and tokens[c - n + 1 .. c - 1] equal to the newest n - 1 tokens.
  n: an integer or [B] of them; 0 is off, 1 excludes every token seen.  It may exclude all that the model allows.
  Raises SamplingError for a negative or fractional n.
  Source: Paulus, Xiong and Socher (2017), section 2.5 (n = 3); transformers' no_repeat_ngram_size.
  """

  n: Any = 0

  def __post_init__(self):
    checked(self, "n", lambda n: n >= 0, "an integer >= 0 (0 is off)", dtype=np.int32)

  def filter(self, logits_BV, state):
    logits_BV = logits_BV.astype(jnp.float32)
    n = per_row(self.n, logits_BV, jnp.int32)
    ends_BC = (n > 0) & (repeats(state.tokens_BC, n - 1) >= n - 1)
    seen_BV = largest(state.tokens_BC, ends_BC.astype(jnp.int32), logits_BV.shape[-1]) > 0
    return jnp.where(seen_BV, -jnp.inf, logits_BV)
