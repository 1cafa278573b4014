"""A bias on the logits of single tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxllm.errors import SamplingError
from jaxllm.sampling.base import Sampler, as_pytree, checked_table, per_token
from jaxllm.sampling.ids import checked_ids

LARGEST = float(np.finfo(np.float32).max)


@as_pytree
@dataclasses.dataclass(frozen=True)
class LogitBias(Sampler):
  """Adds a number to the logit of each token.

  z_v <- z_v + bias_v.  bias: [V], or [B, V] for one a row, finite or -inf, which excludes the token; what the model
  excludes stays excluded.  `LogitBias.of({id: bias}, vocab_size)` is 0 for the others.  Raises SamplingError for NaN,
  +inf, a row of -inf alone, and another shape than the logits'.
  Source: OpenAI's API reference (2023), logit_bias; transformers' sequence_bias of single tokens.
  """

  bias: Any

  def __post_init__(self):
    valid = lambda bias: (bias < np.inf).all() and np.isfinite(bias).any(axis=-1).all()
    checked_table(self, "bias", valid, "[V] or [B, V] of numbers or -inf, not all of a row -inf")

  @classmethod
  def of(cls, biases, vocab_size):
    """From a dict {id: bias}; raises SamplingError for what is not an id below vocab_size, or a wrong bias."""
    if not isinstance(biases, dict):
      raise SamplingError(f"LogitBias: found {biases!r}, expected a dict of biases by token id")
    ids = checked_ids("LogitBias", biases, vocab_size)
    for token, bias in biases.items():
      number = isinstance(bias, (int, float, np.integer, np.floating)) and not isinstance(bias, bool)
      if not number or not (bias == -np.inf or abs(bias) <= LARGEST):
        raise SamplingError(
          f"LogitBias: found bias {bias!r} of token {token}, expected a finite number or -inf"
        )
    bias_V = np.zeros(vocab_size, np.float32)
    bias_V[ids] = list(biases.values())
    return cls(bias_V)

  def filter(self, logits_BV, state):
    return logits_BV.astype(jnp.float32) + per_token(self.bias, logits_BV, jnp.float32)
