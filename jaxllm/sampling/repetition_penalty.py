"""The repetition penalty of CTRL."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxllm.sampling.base import as_pytree, checked, per_row
from jaxllm.sampling.history import Remembers, counts


@as_pytree
@dataclasses.dataclass(frozen=True)
class RepetitionPenalty(Remembers):
  """Makes every token seen before less likely (penalty above 1) or more (below 1), however often it was seen.

  z_v <- z_v / penalty where z_v > 0, z_v * penalty elsewhere, for v in the prompt or drawn.  penalty: a scalar or
  [B], finite and above 0; 1 is off.  last_n: how many of the newest tokens count, an integer or [B] of them: -1 all,
  which is transformers' way; llama.cpp has 64 by default, and 0 as off.  The prompt counts in both.
  Raises SamplingError for other values.
  Source: Keskar et al. (2019), section 4.1; multiplied where negative as transformers and llama.cpp do, since a
  division would favour those tokens.
  """

  penalty: Any = 1.0
  last_n: Any = -1

  def __post_init__(self):
    limits = np.finfo(np.float32)
    valid = lambda p: (p >= float(limits.tiny)) & (p <= float(limits.max))
    checked(self, "penalty", valid, "a finite number > 0 (1 is off)")
    checked(self, "last_n", lambda n: n >= -1, "an integer >= -1 (-1 is all)", dtype=np.int32)

  def filter(self, logits_BV, state):
    logits_BV = logits_BV.astype(jnp.float32)
    penalty = per_row(self.penalty, logits_BV)
    tokens_BC = state.recent(per_row(self.last_n, logits_BV, jnp.int32))
    # Multiplied, because XLA replaces a division by this as it fuses: eager and compiled would differ.
    rate_BV = jnp.where(logits_BV > 0, 1 / penalty, penalty)
    return jnp.where(counts(tokens_BC, logits_BV.shape[-1]) > 0, logits_BV * rate_BV, logits_BV)
