"""Samplers: frozen dataclasses whose parameters are pytree leaves, so that changing one never recompiles.

  sampler = Chain((Temperature(0.8), TopK(50), TopP(0.95)))      # the usual order, and the order applied
  state = sampler.init(tokens, lengths)
  tokens_B, state = sampler(jax.random.split(key, B), logits_BV, state)

A parameter is a scalar or one number a row ([B]); a table of tokens is [V] or [B, V].  Concrete values are
checked when the sampler is built (SamplingError); traced ones cannot be, so whoever computes them answers for
their range.

Which tokens survive where logits are equal:

  greedy, temperature 0    the first of the largest
  top_k                    every token equal to the k-th largest: more than k can survive (as transformers)
  top_p                    exactly the smallest set, lower ids first (transformers: no order)
  typical                  all that are as far from the entropy as the last that fits (as transformers)
  min_p, epsilon, eta      all equals of the largest (as transformers)
  xtc                      of equal least ones the highest id stays
  mirostat                 where nothing is within mu, the first of the largest
"""

from jaxllm.sampling.banned_tokens import BannedTokens
from jaxllm.sampling.base import NOTHING, Sampler, check_logits
from jaxllm.sampling.chain import Chain
from jaxllm.sampling.count_penalty import FrequencyPenalty, PresencePenalty
from jaxllm.sampling.dry import Dry
from jaxllm.sampling.epsilon import Epsilon
from jaxllm.sampling.eta import Eta
from jaxllm.sampling.forced_tokens import ForcedTokens
from jaxllm.sampling.greedy import Greedy
from jaxllm.sampling.ids import token_mask
from jaxllm.sampling.logit_bias import LogitBias
from jaxllm.sampling.min_new_tokens import MinNewTokens
from jaxllm.sampling.min_p import MinP
from jaxllm.sampling.mirostat import Mirostat
from jaxllm.sampling.no_repeat_ngram import NoRepeatNgram
from jaxllm.sampling.order import in_order
from jaxllm.sampling.repetition_penalty import RepetitionPenalty
from jaxllm.sampling.temperature import Temperature
from jaxllm.sampling.top_k import TopK
from jaxllm.sampling.top_n_sigma import TopNSigma
from jaxllm.sampling.top_p import TopP
from jaxllm.sampling.typical import Typical
from jaxllm.sampling.xtc import Xtc

SAMPLERS = {
  "greedy": Greedy,
  "temperature": Temperature,
  "top_k": TopK,
  "top_p": TopP,
  "min_p": MinP,
  "typical": Typical,
  "epsilon": Epsilon,
  "eta": Eta,
  "top_n_sigma": TopNSigma,
  "repetition_penalty": RepetitionPenalty,
  "presence_penalty": PresencePenalty,
  "frequency_penalty": FrequencyPenalty,
  "no_repeat_ngram": NoRepeatNgram,
  "logit_bias": LogitBias,
  "banned_tokens": BannedTokens,
  "forced_tokens": ForcedTokens,
  "min_new_tokens": MinNewTokens,
  "xtc": Xtc,
  "dry": Dry,
  "mirostat": Mirostat,
  "chain": Chain,
}

__all__ = [
  "NOTHING",
  "SAMPLERS",
  "BannedTokens",
  "Chain",
  "Dry",
  "Epsilon",
  "Eta",
  "ForcedTokens",
  "FrequencyPenalty",
  "Greedy",
  "LogitBias",
  "MinNewTokens",
  "MinP",
  "Mirostat",
  "NoRepeatNgram",
  "PresencePenalty",
  "RepetitionPenalty",
  "Sampler",
  "Temperature",
  "TopK",
  "TopNSigma",
  "TopP",
  "Typical",
  "Xtc",
  "check_logits",
  "in_order",
  "token_mask",
]
