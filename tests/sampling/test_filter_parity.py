"""Element by element against transformers' logits processors: random logits, ties, excluded tokens, float16, many sizes."""

import filter_reference
import generation_table
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from components import measured

from jaxllm.sampling import (
  BannedTokens,
  Epsilon,
  Eta,
  ForcedTokens,
  LogitBias,
  MinNewTokens,
  MinP,
  NoRepeatNgram,
  RepetitionPenalty,
  Typical,
  token_mask,
)

torch = pytest.importorskip("torch")
process = pytest.importorskip("transformers.generation.logits_process")
core = pytest.mark.core
LENGTH, STOP = 24, [2, 3]

CASES = [  # name, sampler of a vocabulary, theirs (which keep its size), parameters of the float64 form
  *[
    ("min_p", lambda V, x=x: MinP(x), lambda x=x: process.MinPLogitsWarper(x), {"min_p": x})
    for x in (0.01, 0.1, 0.5)
  ],
  *[
    ("typical", lambda V, x=x: Typical(x), lambda x=x: process.TypicalLogitsWarper(x), {"p": x})
    for x in (0.2, 0.9, 0.99)
  ],
  *[
    ("epsilon", lambda V, x=x: Epsilon(x), lambda x=x: process.EpsilonLogitsWarper(x), {"epsilon": x})
    for x in (3e-4, 0.02, 0.9)
  ],
  *[
    ("eta", lambda V, x=x: Eta(x), lambda x=x: process.EtaLogitsWarper(x), {"epsilon": x})
    for x in (4e-3, 0.3, 0.9)
  ],
  *[
    (
      "repetition_penalty",
      lambda V, x=x: RepetitionPenalty(x),
      lambda x=x: process.RepetitionPenaltyLogitsProcessor(x),
      {},
    )
    for x in (1.2, 0.7, 5.0)
  ],
  *[
    (
      "no_repeat_ngram",
      lambda V, n=n: NoRepeatNgram(n),
      lambda n=n: process.NoRepeatNGramLogitsProcessor(n),
      {},
    )
    for n in (1, 2, 3, LENGTH, LENGTH + 1)
  ],
  (
    "logit_bias",
    lambda V: LogitBias.of({1: -1.5, 7: 3.0, 8: -np.inf}, V),
    lambda: process.SequenceBiasLogitsProcessor([[[1], -1.5], [[7], 3.0], [[8], -np.inf]]),
    {},
  ),
  (
    "banned_tokens",
    lambda V: BannedTokens(token_mask([1, 5, 6], V)),
    lambda: process.SuppressTokensLogitsProcessor([1, 5, 6]),
    {},
  ),
  (
    "banned_tokens",
    lambda V: BannedTokens(token_mask([1, 5], V)),
    lambda: process.NoBadWordsLogitsProcessor([[1], [5]]),
    {},
  ),
  *[
    (
      "min_new_tokens",
      lambda V, n=n: MinNewTokens(n, token_mask(STOP, V)),
      lambda n=n: process.MinNewTokensLengthLogitsProcessor(LENGTH - 2, n, STOP),
      {},
    )
    for n in (0, 2, 3)
  ],
  (
    "forced_tokens",
    lambda V: ForcedTokens([-1, -1, 5]),
    lambda: process.ForcedEOSTokenLogitsProcessor(LENGTH + 1, 5),
    {},
  ),
]
KINDS = {
  "as they come": lambda z: z,
  "ties": np.round,
  "excluded": lambda z: np.where(np.arange(z.shape[1]) % 3 == 1, -np.inf, z).astype(np.float32),
  "float16": lambda z: z.astype(np.float16).astype(np.float32),
}


def texts(rows, vocabulary, seed=1):
  """[rows, LENGTH] ids, of ten tokens mostly, so that n-grams repeat."""
  rng = np.random.default_rng(seed)
  few = rng.integers(0, min(10, vocabulary), (rows, LENGTH))
  return np.where(rng.random((rows, LENGTH)) < 0.1, rng.integers(0, vocabulary, (rows, LENGTH)), few)


@jax.jit
def ours(sampler, logits_BV, text_BT):
  """The filter after a prompt of all but two tokens, which were drawn: half-precision logits as they are."""
  lengths = jnp.full(len(text_BT), LENGTH - 2)
  state = sampler.init(text_BT[:, :-2], lengths, 2)
  for step in (-2, -1):
    state = sampler.update(text_BT[:, step], state, logits_BV)
  return sampler.filter(logits_BV, state)


def compare(name, make, theirs, told, kind, rows, vocabulary):
  generation_table.about("samplers", name)
  logits_BV = KINDS[kind]((3 * np.random.default_rng(vocabulary).normal(size=(rows, vocabulary))).astype("f"))
  text_BT = texts(rows, vocabulary)
  given = logits_BV.astype(np.float16) if kind == "float16" else logits_BV
  found_BV = np.asarray(ours(make(vocabulary), given, text_BT))
  # Over a full vocabulary transformers' own float32 errs, by up to 59 tokens of typical at 0.99: there it gets float64.
  wide = bool(told) and vocabulary > 1000
  scores = torch.tensor(logits_BV.astype(np.float64) if wide else logits_BV)
  wanted_BV = theirs()(torch.tensor(text_BT), scores).numpy()
  decided = np.ones(rows, bool)
  if told:  # where a cutoff is within float32 rounding of a token, either set is right
    form = lambda row: getattr(filter_reference, name)(row.astype(np.float64), [], 0, **told)[1] > 1e-5
    decided = np.array([form(row) for row in logits_BV])
    assert wide or decided.mean() > 0.8
  wrong_B = (np.isfinite(found_BV) != np.isfinite(wanted_BV)).sum(-1)
  np.testing.assert_array_equal(wrong_B[decided], 0)
  assert not wide or wrong_B.max() <= 2  # the tokens at the cutoff
  kept = np.isfinite(wanted_BV) & decided[:, None]
  # the penalty: torch divides, and we multiply by the inverse: two roundings of 2^-24
  np.testing.assert_allclose(
    found_BV[kept], wanted_BV[kept], rtol=1.2e-7 if name == "repetition_penalty" else 0
  )
  if not kept.any():
    return
  size = np.where(found_BV[kept] == wanted_BV[kept], 1, np.abs(wanted_BV[kept]))
  error = np.max(np.abs(found_BV[kept] - wanted_BV[kept]) / size)
  measured(name, "transformers", error)
  generation_table.measured("samplers", name, worst_difference=error, logits=found_BV[decided].size, cases=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", range(len(CASES)))
def test_the_filtered_logits_are_those_of_transformers(case, kind):
  compare(*CASES[case], kind, rows=200, vocabulary=50)


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("vocabulary", [10, 1000, pytest.param(151_936, marks=pytest.mark.slow)])
def test_of_every_size(case, vocabulary):
  compare(*CASES[case], "as they come", rows=4 if vocabulary > 1000 else 20, vocabulary=vocabulary)


def test_the_first_forced_token():
  logits_BV = np.random.default_rng(0).normal(size=(5, 12)).astype("f")
  state = ForcedTokens([7]).init(np.full((5, 1), 3), np.ones(5, int))
  theirs = process.ForcedBOSTokenLogitsProcessor(7)(torch.full((5, 1), 3), torch.tensor(logits_BV))
  np.testing.assert_array_equal(ForcedTokens([7]).filter(logits_BV, state), theirs.numpy())
