"""Eta sampling."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxllm.sampling.base import Sampler, as_pytree, at_least, checked, entropy, log_probs, per_row


@as_pytree
@dataclasses.dataclass(frozen=True)
class Eta(Sampler):
  """Epsilon sampling whose cutoff falls where the distribution is flat.

  eta = min(epsilon, sqrt(epsilon) exp(-H)), H = -sum p log p; keep_v = (p_v >= eta) or (p_v = max p).  epsilon: a
  scalar or [B] in [0, 1]; 0 is off.  The authors use 3e-4 to 4e-3.  Raises SamplingError for epsilon outside
  [0, 1] or NaN.
  Source: Hewitt, Manning and Liang (2022), arXiv 2210.15191, section 4; transformers' eta_cutoff.
  """

  epsilon: Any = 0.0

  def __post_init__(self):
    checked(self, "epsilon", lambda e: (e >= 0) & (e <= 1), "a number in [0, 1]")

  def filter(self, logits_BV, state):
    logits_BV = logits_BV.astype(jnp.float32)
    log_BV = log_probs(logits_BV)
    log_epsilon = jnp.log(per_row(self.epsilon, logits_BV))
    return at_least(logits_BV, log_BV >= jnp.minimum(log_epsilon, log_epsilon / 2 - entropy(log_BV)))
