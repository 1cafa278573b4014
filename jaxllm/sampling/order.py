"""Samplers put in the order that a project's users are used to."""

from __future__ import annotations

from jaxllm.errors import SamplingError
from jaxllm.sampling.banned_tokens import BannedTokens
from jaxllm.sampling.chain import Chain
from jaxllm.sampling.count_penalty import FrequencyPenalty, PresencePenalty
from jaxllm.sampling.dry import Dry
from jaxllm.sampling.epsilon import Epsilon
from jaxllm.sampling.eta import Eta
from jaxllm.sampling.forced_tokens import ForcedTokens
from jaxllm.sampling.greedy import Greedy
from jaxllm.sampling.logit_bias import LogitBias
from jaxllm.sampling.min_new_tokens import MinNewTokens
from jaxllm.sampling.min_p import MinP
from jaxllm.sampling.mirostat import Mirostat
from jaxllm.sampling.no_repeat_ngram import NoRepeatNgram
from jaxllm.sampling.repetition_penalty import RepetitionPenalty
from jaxllm.sampling.temperature import Temperature
from jaxllm.sampling.top_k import TopK
from jaxllm.sampling.top_n_sigma import TopNSigma
from jaxllm.sampling.top_p import TopP
from jaxllm.sampling.typical import Typical
from jaxllm.sampling.xtc import Xtc

PENALTIES = (LogitBias, RepetitionPenalty, PresencePenalty, FrequencyPenalty, Dry)
CONSTRAINTS = (NoRepeatNgram, BannedTokens, MinNewTokens, ForcedTokens)
TRANSFORMERS = (Temperature, TopNSigma, TopK, TopP, MinP, Typical, Epsilon, Eta, Xtc)
LLAMA_CPP = (TopNSigma, TopK, Typical, TopP, MinP, Epsilon, Eta, Xtc, Temperature)
ORDERS = {
  "transformers": (*PENALTIES, *CONSTRAINTS, *TRANSFORMERS, Mirostat, Greedy),
  "llama.cpp": (*PENALTIES, *CONSTRAINTS, *LLAMA_CPP, Mirostat, Greedy),
}
"""Kinds of samplers, first to last, by project; `chain` says which places are the project's own."""


def in_order(samplers, order="transformers"):
  """A Chain of `samplers` in the order of a project, each kind in the place it has there; equal kinds as given.

  Raises SamplingError for an unknown order, and for a sampler that has no place, such as a Chain.
  """
  if order not in ORDERS:
    raise SamplingError(f"in_order: order must be one of {', '.join(ORDERS)}; found {order!r}")
  for sampler in samplers:
    if type(sampler) not in ORDERS[order]:
      raise SamplingError(f"in_order: found {sampler!r}, expected samplers of SAMPLERS other than chain")
  return Chain(tuple(sorted(samplers, key=lambda sampler: ORDERS[order].index(type(sampler)))))
