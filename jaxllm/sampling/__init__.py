"""Samplers: frozen dataclasses whose parameters are pytree leaves, so that changing one never recompiles.

  sampler = Chain((Temperature(0.8), TopK(50), TopP(0.95)))      # the usual order, and the order applied
  state = sampler.init(tokens, lengths)
  tokens_B, state = sampler(jax.random.split(key, B), logits_BV, state)

A parameter is a scalar or one number a row ([B]).  Concrete values are checked when the sampler is built
(SamplingError); traced ones cannot be, so whoever computes them answers for their range.

Which tokens survive where logits are equal:

  greedy, temperature 0    the first of the largest
  top_k                    every token equal to the k-th largest: more than k can survive (as transformers)
  top_p                    exactly the smallest set, lower ids first (transformers: no order)
"""

from jaxllm.sampling.base import Sampler, check_logits
from jaxllm.sampling.chain import Chain
from jaxllm.sampling.greedy import Greedy
from jaxllm.sampling.temperature import Temperature
from jaxllm.sampling.top_k import TopK
from jaxllm.sampling.top_p import TopP

SAMPLERS = {
  "greedy": Greedy,
  "temperature": Temperature,
  "top_k": TopK,
  "top_p": TopP,
  "chain": Chain,
}

__all__ = ["SAMPLERS", "Chain", "Greedy", "Sampler", "Temperature", "TopK", "TopP", "check_logits"]
