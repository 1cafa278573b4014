"""Several filters, one after the other."""

from __future__ import annotations

import dataclasses

from jaxllm.errors import SamplingError
from jaxllm.sampling.base import Sampler, as_pytree


@as_pytree
@dataclasses.dataclass(frozen=True)
class Chain(Sampler):
  """Applies its samplers' filters in the order given, then draws once.

  filter = filter_n o ... o filter_1; each sees the distribution that the one before left, renormalised.  The
  order matters: top-p before temperature keeps another set.  transformers' order is temperature, top-k,
  top-p.  The state is a tuple, one a sampler.  An empty chain samples from the logits as they are.
  Raises SamplingError for a member that is not a sampler.
  Source: transformers' list of logits processors.
  """

  samplers: tuple[Sampler, ...] = ()

  def __post_init__(self):
    listed = isinstance(self.samplers, (tuple, list))
    if not listed or not all(isinstance(sampler, Sampler) for sampler in self.samplers):
      raise SamplingError(f"Chain: samplers must be a tuple of samplers; found {self.samplers!r}")
    object.__setattr__(self, "samplers", tuple(self.samplers))

  def init(self, tokens, lengths):
    return tuple(sampler.init(tokens, lengths) for sampler in self.samplers)

  def filter(self, logits_BV, state):
    logits_BV = super().filter(logits_BV, state)
    for sampler, own in zip(self.samplers, state, strict=True):
      logits_BV = sampler.filter(logits_BV, own)
    return logits_BV

  def update(self, tokens_B, state):
    return tuple(sampler.update(tokens_B, own) for sampler, own in zip(self.samplers, state, strict=True))
