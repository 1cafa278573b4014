"""Several filters, one after the other, and the orders in which people chain them.

transformers' `generate`: bias, repetition penalty, n-grams, banned tokens, least length, forced tokens; then
temperature, top-k, top-p, min-p, typical, epsilon, eta.  It has no other kinds; text-generation-webui, which adds
them to it, takes presence and frequency with the repetition penalty, DRY among the penalties, XTC and mirostat after
the rest.

llama.cpp: bias; repetition, presence and frequency penalties, DRY; top-n-sigma, top-k, typical, top-p, min-p, XTC;
temperature last, so that what is kept does not depend on it.  With mirostat: bias, temperature, mirostat, and nothing
else.  What it does not have stands where transformers has it.
"""

from __future__ import annotations

import dataclasses

import jax

from jaxllm.errors import SamplingError
from jaxllm.sampling.base import ROOM, Sampler, as_pytree


@as_pytree
@dataclasses.dataclass(frozen=True)
class Chain(Sampler):
  """Applies its samplers' filters in the order given, then draws once.

  filter = filter_n o ... o filter_1; each sees the distribution that the one before left, renormalised.  The
  order matters: top-p before temperature keeps another set.  `in_order` gives those of transformers and of
  llama.cpp.  The state is a tuple, one a sampler.  An empty chain samples from the logits as they are.
  Raises SamplingError for a member that is not a sampler.
  Source: transformers' list of logits processors.
  """

  samplers: tuple[Sampler, ...] = ()

  def __post_init__(self):
    listed = isinstance(self.samplers, (tuple, list))
    if not listed or not all(isinstance(sampler, Sampler) for sampler in self.samplers):
      raise SamplingError(f"Chain: samplers must be a tuple of samplers; found {self.samplers!r}")
    object.__setattr__(self, "samplers", tuple(self.samplers))

  @property
  def by_chance(self):
    tossed = any(type(sampler).toss is not Sampler.toss for sampler in self.samplers)
    return tossed or not self.samplers or self.samplers[-1].by_chance

  def init(self, tokens, lengths, room=ROOM):
    return tuple(sampler.init(tokens, lengths, room) for sampler in self.samplers)

  def grown(self, state, more):
    return tuple(sampler.grown(own, more) for sampler, own in zip(self.samplers, state, strict=True))

  def toss(self, key_B, state):
    # each member has keys of its own, or two that toss would agree
    own_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))
    members = enumerate(zip(self.samplers, state, strict=True))
    return tuple(sampler.toss(own_keys(key_B, index), own) for index, (sampler, own) in members)

  def filter(self, logits_BV, state):
    logits_BV = super().filter(logits_BV, state)
    for sampler, own in zip(self.samplers, state, strict=True):
      logits_BV = sampler.filter(logits_BV, own)
    return logits_BV

  def update(self, tokens_B, state, logits_BV):
    members = zip(self.samplers, state, strict=True)
    return tuple(sampler.update(tokens_B, own, logits_BV) for sampler, own in members)
