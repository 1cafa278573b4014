"""The table of edges: what each filter keeps of four tokens, and which parameters are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import SamplingError
from jaxllm.sampling import (
  NOTHING,
  SAMPLERS,
  BannedTokens,
  Chain,
  Dry,
  Epsilon,
  Eta,
  ForcedTokens,
  FrequencyPenalty,
  Greedy,
  LogitBias,
  MinNewTokens,
  MinP,
  Mirostat,
  NoRepeatNgram,
  PresencePenalty,
  RepetitionPenalty,
  Temperature,
  TopK,
  TopNSigma,
  Typical,
  Xtc,
  in_order,
  token_mask,
)

core = pytest.mark.core
INF, NAN = np.inf, np.nan
ALL = [0, 1, 2, 3]
FOUR = np.log([0.15, 0.5, 0.05, 0.3])  # descending: 1, 3, 0, 2
TIED = [1.0, 2.0, 2.0, 0.0]
FLAT = [0.0, 0.0, 0.0, 0.0]
ONE = [-INF, -INF, 0.5, -INF]
TWO = [-INF, 0.5, 0.5, -INF]
TEXT = [3, 1, 3]
MASK = token_mask([1, 3], 4)

KEPT = [  # sampler, logits, the ids it keeps after the text 3 1 3, of which nothing was drawn
  pytest.param(MinP(0.0), FOUR, ALL, marks=core),
  (MinP(0.11), FOUR, [0, 1, 3]),
  (MinP(0.59), FOUR, [1, 3]),
  (MinP(0.61), FOUR, [1]),
  (MinP(1), TIED, [1, 2]),
  (MinP(1), ONE, [2]),
  (MinP(0.5), [0.0, -200.0, -300.0, -1e30], [0]),
  (MinP(0.0), [0.0, -200.0, -300.0, -1e30], ALL),
  (Typical(1.0), FOUR, ALL),
  (Typical(0.0), FOUR, [3]),  # the entropy is 1.14 nats, and -log 0.3 = 1.20 is nearest
  (Typical(0.29), FOUR, [3]),
  (Typical(0.31), FOUR, [1, 3]),  # then -log 0.5 = 0.69: the likeliest is second
  (Typical(0.81), FOUR, [0, 1, 3]),
  (Typical(0.3), FLAT, ALL),
  (Typical(0.9), ONE, [2]),
  (Typical(0.2), [np.log(0.9), *np.log([0.1 / 3] * 3)], [0]),
  (Epsilon(0.0), FOUR, ALL),
  (Epsilon(0.051), FOUR, [0, 1, 3]),
  (Epsilon(0.9), FOUR, [1]),
  (Epsilon(1.0), TIED, [1, 2]),
  (Epsilon(1.0), ONE, [2]),
  (Eta(0.0), FOUR, ALL),
  (Eta(1.0), FOUR, [1]),  # exp(-1.14) = 0.32
  (Eta(0.8), FOUR, [1, 3]),  # 0.29
  (Eta(0.9), FLAT, ALL),  # sqrt(.9) / 4 = .237
  (Eta(0.5), ONE, [2]),
  (TopNSigma(0), FOUR, ALL),
  (TopNSigma(0.1), FOUR, [1]),
  (TopNSigma(1.0), FOUR, [1, 3]),  # sigma = 0.856
  (TopNSigma(100), FOUR, ALL),
  (TopNSigma(1.0), FLAT, ALL),
  (TopNSigma(1.0), ONE, [2]),
  (RepetitionPenalty(3e38), [1.0, 1.0, 0.0, 1.0], ALL),
  (RepetitionPenalty(2.0), ONE, [2]),
  (NoRepeatNgram(0), FOUR, ALL),
  (NoRepeatNgram(1), FOUR, [0, 2]),
  (NoRepeatNgram(2), FOUR, [0, 2, 3]),
  (NoRepeatNgram(3), FOUR, ALL),
  (NoRepeatNgram(2**40), FOUR, ALL),
  (NoRepeatNgram(1), TWO, [2]),
  (LogitBias([0.0, -INF, 0.0, 0.0]), FOUR, [0, 2, 3]),
  (LogitBias([100.0] * 4), ONE, [2]),
  (BannedTokens(MASK), FOUR, [0, 2]),
  (ForcedTokens([3, 0]), FOUR, [3]),
  (ForcedTokens([0]), ONE, [0]),  # whatever the model says
  (ForcedTokens([-1, 2]), FOUR, ALL),
  (MinNewTokens(1, MASK), FOUR, [0, 2]),
  (MinNewTokens(0, MASK), FOUR, ALL),
  (Xtc(1.0, 0.1), FOUR, [0, 2]),
  (Xtc(1.0, 0.2), FOUR, [0, 2, 3]),
  (Xtc(1.0, 0.49), FOUR, ALL),  # one alone is above
  (Xtc(1.0, 0.0), FOUR, [2]),
  (Xtc(1.0, 0.0), ONE, [2]),
  (Xtc(1.0, 0.1), FLAT, [3]),
  (Xtc(1.0, 0.51), FLAT, ALL),
  (Xtc(0.0, 0.1), FOUR, ALL),
  (Xtc(1.0, 0.1, keep=token_mask([1], 4)), FOUR, ALL),
  (Xtc(1.0, 0.1, keep=token_mask([0, 2], 4)), FOUR, [0, 2]),
  (Dry(1e38, 1e38, 1), FOUR, ALL),  # no penalty is infinite
  (Mirostat(0.51), FOUR, [1]),  # mu = 1.02 bits
  (Mirostat(0.9), FOUR, [1, 3]),
  (Mirostat(0.01), TIED, [1]),  # nothing is within 0.02 bits
  (Mirostat(100.0), FOUR, ALL),
  (Mirostat(1.0), ONE, [2]),
  (Chain((Xtc(1.0, 0.1), Greedy())), FOUR, [0]),
  (Chain((Temperature(0), Typical(0.1), MinP(0.5), Xtc(1.0, 0.1))), FOUR, [1]),
  (Chain((BannedTokens(MASK), MinP(0.5))), FOUR, [0]),  # .05 is a third of .15
  (Chain((MinP(0.29), BannedTokens(MASK))), FOUR, [0]),
]


@jax.jit
def filtered(sampler, key_B, logits_BV, text_BT):
  state = sampler.init(text_BT, jnp.array([len(TEXT)]))
  return sampler.filter(logits_BV, sampler.toss(key_B, state))


draw = jax.jit(Chain(()))


def run(sampler, logits):
  """(filtered [1, V], a token drawn from them)."""
  key_B = jax.random.split(jax.random.key(0), 1)
  with jax.debug_nans(True):
    filtered_BV = filtered(sampler, key_B, jnp.asarray([logits], jnp.float32), jnp.array([[*TEXT, 0]]))
  return filtered_BV, draw(key_B, filtered_BV, ())[0]


@pytest.mark.parametrize(("sampler", "logits", "kept"), KEPT)
def test_the_filter_keeps_exactly_these_tokens(sampler, logits, kept):
  filtered_BV, tokens_B = run(sampler, logits)
  np.testing.assert_array_equal(np.flatnonzero(filtered_BV[0] > -INF), kept)
  assert int(tokens_B[0]) in kept


EMPTY = [  # what leaves nothing of what the model allows
  (BannedTokens(token_mask([2], 4)), ONE),
  (MinNewTokens(1, token_mask([2], 4)), ONE),
  (LogitBias([0.0, 0.0, -INF, 0.0]), ONE),
  (NoRepeatNgram(1), [-INF, 0.0, -INF, 1.0]),
  (ForcedTokens([4]), FOUR),  # beyond the vocabulary
  (ForcedTokens(np.array([2**32 + 1])), FOUR),  # 1 in 32 bits
  (ForcedTokens(np.array([2**32 - 1], np.uint64)), FOUR),  # -1 in 32 bits
  (Chain((NoRepeatNgram(1), Mirostat())), [-INF, 0.0, -INF, 1.0]),
]


@pytest.mark.parametrize(("sampler", "logits"), EMPTY)
def test_where_nothing_is_left_the_token_says_so(sampler, logits):
  filtered_BV, tokens_B = run(sampler, logits)
  assert np.isneginf(filtered_BV).all()
  assert int(tokens_B[0]) == NOTHING


PENALTIES = [  # sampler, the change of each logit of [-1, 2, 0, 4] after the text 3 1 3
  (RepetitionPenalty(2.0), [0, -1, 0, -2]),
  (RepetitionPenalty(2.0, last_n=1), [0, 0, 0, -2]),
  (RepetitionPenalty(0.5), [0, 2, 0, 4]),
  (PresencePenalty(1.5), [0, 0, 0, 0]),  # nothing was drawn
  (PresencePenalty(1.5, prompt=True), [0, -1.5, 0, -1.5]),
  (FrequencyPenalty(1.5, prompt=True), [0, -1.5, 0, -3]),
  (FrequencyPenalty(-1.5, prompt=True, last_n=2), [0, 1.5, 0, 1.5]),
  (Dry(0.5, 2.0, 1), [0, -0.5, 0, 0]),  # 3 was followed by 1
  (Dry(0.5, 2.0, 2), [0, 0, 0, 0]),
  (Dry(0.5, 2.0, 1, last_n=2), [0, 0, 0, 0]),
  (Dry(0.5, 2.0, 1, breakers=token_mask([1], 4)), [0, 0, 0, 0]),
  (Dry(0.5, 2.0, 1, breakers=token_mask([3], 4)), [0, 0, 0, 0]),
]


@pytest.mark.parametrize(("sampler", "change"), PENALTIES)
def test_the_penalty_is_exactly_this(sampler, change):
  logits = np.array([-1.0, 2.0, 0.0, 4.0])
  np.testing.assert_array_equal(run(sampler, logits)[0][0] - logits, change)


def test_the_length_of_a_repeat_is_the_exponent_up_to_fifty():
  dry = jax.jit(lambda *prompts: Dry(1.0, 1.1, 1).filter(jnp.zeros((5, 4)), Dry().init(*prompts, 0)))
  # at the end ones, which were followed by 2
  texts = [[0, *[1] * length, 2, 3, *[1] * length] for length in (1, 2, 7, 50, 60)]
  tokens = np.array([text + [0] * (123 - len(text)) for text in texts])
  penalty_B = dry(tokens, np.array(list(map(len, texts))))[:, 2]
  np.testing.assert_allclose(penalty_B, -(1.1 ** np.array([0, 1, 6, 49, 49])), rtol=1e-5)


ID = {"stop": MASK}
REFUSED = [
  ("min_p", {"min_p": 1.1}),
  ("min_p", {"min_p": NAN}),
  pytest.param("typical", {"p": -0.1}, marks=core),
  ("typical", {"p": [0.5, NAN]}),
  ("epsilon", {"epsilon": 2}),
  ("eta", {"epsilon": -1e-9}),
  ("top_n_sigma", {"n": -1.0}),
  ("top_n_sigma", {"n": INF}),
  ("repetition_penalty", {"penalty": 0.0}),
  ("repetition_penalty", {"penalty": 1e-45}),
  ("repetition_penalty", {"penalty": INF}),
  ("repetition_penalty", {"last_n": -2}),
  ("presence_penalty", {"penalty": NAN}),
  ("presence_penalty", {"prompt": 1}),
  ("presence_penalty", {"prompt": "yes"}),
  ("frequency_penalty", {"penalty": INF}),
  ("frequency_penalty", {"last_n": 1.5}),
  ("no_repeat_ngram", {"n": -1}),
  ("no_repeat_ngram", {"n": 2.0}),
  ("logit_bias", {"bias": [0.0, NAN]}),
  ("logit_bias", {"bias": [0.0, INF]}),
  ("logit_bias", {"bias": np.array([1e39, 0.0])}),  # infinite in float32
  ("logit_bias", {"bias": [[1.0], [1.0, 2.0]]}),
  ("logit_bias", {"bias": [-INF, -INF]}),
  ("logit_bias", {"bias": 1.0}),
  ("logit_bias", {"bias": None}),
  ("banned_tokens", {"mask": [1, 5]}),  # ids, where a mask is meant
  ("banned_tokens", {"mask": [True, True]}),
  ("banned_tokens", {"mask": []}),
  ("forced_tokens", {"tokens": [-2]}),
  ("forced_tokens", {"tokens": [[1], [1, 2]]}),
  ("forced_tokens", {"tokens": [10**400]}),
  ("forced_tokens", {"tokens": [1.0]}),
  ("forced_tokens", {"tokens": 3}),
  ("min_new_tokens", {"number": -1} | ID),
  ("min_new_tokens", {"stop": [True], "number": 1}),
  ("xtc", {"probability": 1.1}),
  ("xtc", {"threshold": -0.1}),
  ("xtc", {"keep": [3]}),
  ("dry", {"multiplier": -1.0}),
  ("dry", {"base": 0.9}),
  ("dry", {"allowed_length": 0}),
  ("dry", {"last_n": -2}),
  ("dry", {"breakers": [5]}),
  ("mirostat", {"tau": 0.0}),
  ("mirostat", {"tau": INF}),
  ("mirostat", {"eta": -0.1}),
]


@pytest.mark.parametrize(("name", "kw"), REFUSED)
def test_a_wrong_parameter_is_refused_and_named(name, kw):
  with pytest.raises(SamplingError, match=rf"{SAMPLERS[name].__name__}: {next(iter(kw))} must be .*; found "):
    SAMPLERS[name](**kw)


def test_ids_and_tables_of_another_vocabulary_are_refused():
  for ids, named in (
    ([4], "token 4"),
    ([-1], "token -1"),
    (["a"], "token 'a'"),
    ([True], "True"),
    (None, "None"),
  ):
    with pytest.raises(
      SamplingError, match=f"found {named}|found token {named}, expected an integer from 0 to 3"
    ):
      token_mask(ids, 4)
  with pytest.raises(SamplingError, match="LogitBias: found bias None of token 1"):
    LogitBias.of({1: None}, 4)
  for huge in (10**400, -(10**400)):
    with pytest.raises(SamplingError, match=r"LogitBias: found bias -?10+ of token 1"):
      LogitBias.of({1: huge}, 4)
  with pytest.raises(SamplingError, match=r"LogitBias: found \[1\], expected a dict"):
    LogitBias.of([1], 4)
  with pytest.raises(SamplingError, match=r"shape \(4,\), the logits have shape \(1, 5\)"):
    BannedTokens(MASK).filter(jnp.zeros((1, 5)), ())
  state = ForcedTokens([[1], [2]]).init(np.ones((3, 1), int), np.ones(3, int))
  with pytest.raises(SamplingError, match="tokens has 2 rows, the logits have 3"):
    ForcedTokens([[1], [2]]).filter(jnp.zeros((3, 5)), state)


def test_the_orders_of_two_projects():
  given = [Xtc(0.5), MinP(0.1), Temperature(0.7), TopK(5), Dry(0.8), RepetitionPenalty(1.1), Typical(0.9)]
  names = lambda order: [type(sampler).__name__ for sampler in in_order(given, order).samplers]
  assert names("transformers") == [
    "RepetitionPenalty",
    "Dry",
    "Temperature",
    "TopK",
    "MinP",
    "Typical",
    "Xtc",
  ]
  assert names("llama.cpp") == ["RepetitionPenalty", "Dry", "TopK", "Typical", "MinP", "Xtc", "Temperature"]
  assert in_order([TopK(3), TopK(2)]).samplers == (TopK(3), TopK(2))
  for order in ("transformers", "llama.cpp"):
    every = in_order([object.__new__(kind) for name, kind in SAMPLERS.items() if name != "chain"], order)
    assert len(every.samplers) == len(SAMPLERS) - 1
  with pytest.raises(SamplingError, match=r"order must be one of transformers, llama\.cpp; found 'vllm'"):
    in_order(given, "vllm")
  with pytest.raises(SamplingError, match="found Chain"):
    in_order([Chain(())])
