"""Greedy decoding."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jaxllm.sampling.base import NOTHING, Sampler, as_pytree, first_largest, only_argmax


@as_pytree
@dataclasses.dataclass(frozen=True)
class Greedy(Sampler):
  """The most likely token; of equal ones the lowest id.

  token = argmax_v z_v.  The keys are not read.  Source: transformers' `do_sample=False`.
  """

  @property
  def by_chance(self):
    return False

  def filter(self, logits_BV, state):
    return only_argmax(logits_BV.astype(jnp.float32))

  def __call__(self, key_B, logits_BV, state):
    logits_BV = logits_BV.astype(jnp.float32)
    left_B = jnp.any(logits_BV > -jnp.inf, axis=-1)
    tokens_B = jnp.where(left_B, first_largest(logits_BV), NOTHING)
    return tokens_B, self.update(tokens_B, state, self.filter(logits_BV, state))
