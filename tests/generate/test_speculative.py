"""Speculative text is the model's own: token by token where it is greedy, and in distribution where it is drawn."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from sampling_reference import chi_square, chi_square_limit, distribution

from jaxllm.config import Layer
from jaxllm.errors import ConfigError, DataError, SamplingError, TokenizerError
from jaxllm.generate.draft import DraftModel, PromptLookup
from jaxllm.generate.loop import generate
from jaxllm.generate.speculative import generate as speculate
from jaxllm.nn import Transformer
from jaxllm.position import POSITIONS
from jaxllm.sampling import Chain, MinNewTokens, RepetitionPenalty, Temperature, TopK, Xtc

core = pytest.mark.core
NEW = 30


def near(params, size):
  """Parameters near those of the model: a draft that is often right."""
  rng = np.random.default_rng(9)
  return jax.tree.map(lambda x: (x + size * np.std(x) * rng.standard_normal(x.shape)).astype(x.dtype), params)


def drafts(model, params):
  return {
    "near": DraftModel(model, near(params, 0.05)),
    "itself": DraftModel(model, params),
    "wrong": DraftModel(model, jax.tree.map(lambda x: -x, params)),
    "broken": DraftModel(model, jax.tree.map(lambda x: np.full_like(x, np.nan), params)),
    "lookup": PromptLookup(3),
  }


SLOW = pytest.mark.slow


@pytest.mark.parametrize("gamma", [pytest.param(1, marks=SLOW), pytest.param(4, marks=core)])
@pytest.mark.parametrize("name", ["near", "itself", pytest.param("wrong", marks=SLOW), "lookup"])
def test_greedy_text_is_that_of_the_model(deep, prompts, name, gamma):
  model, params = deep
  plain = generate(model, params, prompts, max_new_tokens=NEW, stop_ids=())
  out = speculate(
    model, params, prompts, drafts(model, params)[name], gamma=gamma, max_new_tokens=NEW, stop_ids=()
  )
  assert (out.tokens, out.reasons) == (plain.tokens, plain.reasons)
  for row in range(len(prompts)):
    # every round gives the drafts that it keeps, and but for the last one another token
    assert 0 <= NEW - 1 - out.accepted[row] - (out.rounds[row] - 1) <= 1
  if name == "itself":
    assert out.rounds == [-(-(NEW - 1) // (gamma + 1))] * 3
  if name == "near":
    assert sum(out.accepted) > 0


@core
def test_stop_ids_end_rows_within_a_round_and_what_follows_is_dropped(shallow, prompts):
  model, params = shallow
  plain = generate(model, params, prompts, max_new_tokens=NEW, stop_ids=())
  stops = (plain.tokens[0][6], plain.tokens[2][11])
  expected = generate(model, params, prompts, max_new_tokens=NEW, stop_ids=stops)
  for name in ("near", "lookup"):
    draft = drafts(model, params)[name]
    out = speculate(model, params, prompts, draft, max_new_tokens=NEW, stop_ids=stops)
    assert (out.tokens, out.reasons) == (expected.tokens, expected.reasons)


def test_samplers_that_remember_filter_drafts_as_text(shallow, prompts):
  """A penalty on what was drafted before, and a stop id that may not come yet."""
  model, params = shallow
  stop = generate(model, params, prompts, max_new_tokens=4, stop_ids=()).tokens[0][2]
  mask = np.arange(64) == stop
  sampler = Chain((RepetitionPenalty(1.7), MinNewTokens(9, mask), Temperature(0.0)))
  usual = dict(sampler=sampler, key=jax.random.key(0), max_new_tokens=NEW, stop_ids=(stop,))
  plain = generate(model, params, prompts, **usual)
  assert plain.tokens != generate(model, params, prompts, **usual | dict(sampler=Temperature(0.0))).tokens
  for name in ("near", "lookup"):
    out = speculate(model, params, prompts, drafts(model, params)[name], **usual)
    assert (out.tokens, out.reasons) == (plain.tokens, plain.reasons)


@SLOW
def test_windowed_layers_and_long_prompts(deep, prompts):
  """Rings, which a rejected draft has written into, and prompts read in parts."""
  model, params = deep
  (layer,) = model.cfg.layers
  layers = (layer, dataclasses.replace(layer, window=6), layer)
  model = Transformer(dataclasses.replace(model.cfg, layers=layers))
  plain = generate(model, params, prompts, max_new_tokens=NEW)
  for name in ("near", "wrong", "lookup"):
    draft = drafts(model, params)[name]
    assert (
      speculate(model, params, prompts, draft, gamma=3, part=4, max_new_tokens=NEW).tokens == plain.tokens
    )


def test_stop_and_on_tokens_are_told_as_in_the_loop(shallow, prompts):
  """Also beside a stop id, which has ended the last row for good before `stop` ends another."""
  model, params = shallow
  stop = lambda row, ids: 5 if row == 1 and len(ids) == 7 else None
  usual = dict(max_new_tokens=NEW, stop=stop)
  whole = generate(model, params, prompts, stop_ids=(), **usual).tokens
  own = next(token for token in whole[2][:3] if token not in whole[0] + whole[1])
  for stop_ids in ((), (own,)):
    told = [[] for _ in prompts]
    out = speculate(
      model,
      params,
      prompts,
      DraftModel(model, params),
      on_tokens=lambda row, ids, told=told: told[row].extend(ids),
      stop_ids=stop_ids,
      **usual,
    )
    last = whole[2][: whole[2].index(own) + 1] if stop_ids else whole[2]
    assert out.tokens == [*whole[:2], last] and told[0] == out.tokens[0] and told[2] == last
    assert out.reasons == ["length", "stop", "stop" if stop_ids else "length"]


def test_lookup_drafts_what_followed_the_longest_and_latest_match():
  row = jax.jit(functools.partial(PromptLookup(3)._row, gamma=3))
  for text, expected in [
    ([1, 2, 3, 4, 5, 1, 2, 3], [4, 5, 1]),  # three tokens match
    ([1, 2, 9, 8, 2, 7, 6, 1, 2], [9, 8, 2]),  # two match before, one later
    ([5, 1, 5, 2, 5], [2, 5, 5]),  # one matches twice: the later; past the end the newest
    ([1, 2, 3], [3, 3, 3]),  # none
    ([4], [4, 4, 4]),
  ]:
    padded = np.array(text + [7] * (12 - len(text)), np.int32)
    assert row(padded, len(text)).tolist() == expected


STEPS = 3


PROMPT = [3, 1, 4, 1, 5]
SAMPLER = Chain((Temperature(1.5), TopK(4)))


@pytest.fixture(scope="module")
def truth(shallow):
  """(the place of each text of STEPS tokens that can come, their probabilities in float64)."""
  model, params = shallow
  texts, probs = [[]], [1.0]
  forward = jax.jit(lambda params, ids: model.apply({"params": params}, ids)[0][:, -1])
  for _ in range(STEPS):
    logits = np.asarray(forward(params, np.array([PROMPT + text for text in texts], np.int32)), np.float64)
    dists = [distribution(row, 1.5, 4)[0] for row in logits]
    grown = [
      ([*text, int(v)], p * dist[v])
      for text, p, dist in zip(texts, probs, dists, strict=True)
      for v in np.flatnonzero(dist)
    ]
    texts, probs = [text for text, _ in grown], [p for _, p in grown]
  return {tuple(text): i for i, text in enumerate(texts)}, np.array(probs)


def drawn(shallow, truth, name, N, gamma=2):
  """(chi-square by its limit, how many texts cannot come, the share of drafts that are kept) of N texts."""
  places, probs = truth
  draft, B, found, kept = drafts(*shallow)[name], min(N, 5000), [], 0
  for i in range(N // B):
    out = speculate(
      *shallow,
      [PROMPT] * B,
      draft,
      gamma=gamma,
      sampler=SAMPLER,
      key=jax.random.key(i),
      max_new_tokens=STEPS,
      stop_ids=(),
    )
    found += [places.get(tuple(row)) for row in out.tokens]
    kept += sum(out.accepted)
  inside = np.array([place for place in found if place is not None])
  statistic, freedom = chi_square(inside, probs)
  assert freedom > 10
  return statistic / chi_square_limit(freedom), N - len(inside), kept / (N * (STEPS - 1))


def check_distribution(*arguments):
  """The share of drafts that are kept, of texts that have the model's distribution."""
  ratio, outside, share = drawn(*arguments)
  assert ratio < 1 and outside == 0, (ratio, outside)
  return share


@pytest.mark.parametrize(
  "name", ["lookup", *(pytest.param(name, marks=SLOW) for name in ("near", "wrong", "broken"))]
)
def test_draws_have_the_models_distribution(shallow, truth, name):
  """Of the broken model no draft is kept: where it says NaN, there is no q that it was drawn from."""
  share = check_distribution(shallow, truth, name, 2500)
  low, high = {"near": (0.3, 1.0), "broken": (-1.0, 0.0)}.get(name, (-1.0, 0.9))
  assert low < share <= high


@pytest.mark.slow
@pytest.mark.parametrize("name", ["near", "itself", "wrong", "broken", "lookup"])
def test_200_000_draws_have_the_models_distribution(shallow, truth, name):
  check_distribution(shallow, truth, name, 200_000)


@SLOW
def test_the_chi_square_sees_drafts_that_are_kept_too_often(shallow, truth, monkeypatch):
  """With half of the acceptance test gone, in a program of this test alone: a draft that can come is kept."""
  zeros = lambda self: 0.0 * jax.vmap(jax.vmap(jax.random.uniform))(self.keep)
  monkeypatch.setattr("jaxllm.generate.draft.Keys.uniform", zeros)
  ratio, outside, _ = drawn(shallow, truth, "near", 2500, 3)
  assert ratio > 1.5 or outside > 0, (ratio, outside)


@pytest.mark.slow
def test_the_samplers_own_chance_is_drawn_once_a_token(shallow):
  """XTC at half of the draws: of the second token its share is that of plain text."""
  model, params = shallow
  sampler = Chain((Temperature(1.5), TopK(4), Xtc(0.5, 0.05)))
  usual = dict(sampler=sampler, max_new_tokens=STEPS, stop_ids=(), key=jax.random.key(5))
  prompts = [[3, 1, 4, 1, 5]] * 5000
  plain = generate(model, params, prompts, **usual).tokens
  for name in ("near", "lookup"):
    out = speculate(model, params, prompts, drafts(model, params)[name], gamma=2, **usual).tokens
    for place in range(STEPS):
      a, b = (np.bincount([row[place] for row in rows], minlength=64) for rows in (plain, out))
      seen = a + b >= 10
      statistic = ((a - b)[seen] ** 2 / (a + b)[seen]).sum()
      assert statistic < chi_square_limit(int(seen.sum())), (name, place, statistic)


@pytest.mark.parametrize(
  ("change", "error", "message"),
  [
    (dict(gamma=0), ConfigError, r"gamma: found 0, expected an integer of at least 1"),
    (dict(gamma=512), ConfigError, r"gamma: found 512, expected at most part - 1 = 511"),
    (dict(draft=None), ConfigError, r"draft: found NoneType, expected DraftModel\(model, params\) or"),
    (dict(prompts=[[1], []]), DataError, r"prompts\[1\]: found an empty prompt"),
    (dict(sampler=Temperature(1.0)), ConfigError, r"key: found None"),
    (dict(max_new_tokens=0), ConfigError, r"max_new_tokens: found 0"),
  ],
)
def test_what_is_refused(shallow, change, error, message):
  model, params = shallow
  given = dict(prompts=[[1, 2]], draft=PromptLookup()) | change
  prompts, draft = given.pop("prompts"), given.pop("draft")
  with pytest.raises(error, match=message):
    speculate(model, params, prompts, draft, **given)


def with_positions(model, limit):
  """(Transformer, params) with a learned table of so many positions, the first of which are those of any other."""
  model = Transformer(dataclasses.replace(model.cfg, layers=(Layer(POSITIONS["learned"](limit)),)))
  shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
  draw = lambda leaf: np.float32(np.random.default_rng(1).normal(size=leaf.shape) * 0.4)
  return model, jax.tree.map(draw, shapes)


@pytest.mark.parametrize("part", [512, pytest.param(16, marks=SLOW)])
def test_a_draft_model_needs_positions_for_the_text_alone(shallow, part):
  """Not for padding of the prompts, the room of a cache, or drafts beyond the end: one with fewer is as good as the model."""
  model, params = with_positions(shallow[0], 64)
  draft = DraftModel(*with_positions(shallow[0], 40))
  usual = dict(part=part, stop_ids=(), max_new_tokens=7)
  prompts = [list(range(33)), [5, 6]]
  out = speculate(model, params, prompts, draft, gamma=5, **usual)
  assert out.tokens == generate(model, params, prompts, **usual).tokens
  assert out.rounds == [1, 1] and out.accepted == [5, 5]
  message = "draft model: longest prompt and max_new_tokens: found 41, expected at most max_length = 40"
  with pytest.raises(ConfigError, match=message):
    speculate(model, params, prompts, draft, **usual | dict(max_new_tokens=8))


@pytest.mark.parametrize("kind", ["windowed", pytest.param("learned", marks=SLOW)])
def test_a_round_may_be_longer_than_a_short_prompt(shallow, kind):
  """In a windowed layer, whose ring must hold the window before all of a round, and past the end of a learned table."""
  model, params = shallow
  layers = (dataclasses.replace(model.cfg.layers[0], window=6),)
  windowed = Transformer(dataclasses.replace(model.cfg, layers=layers)), params
  (one, weights), new = {"windowed": (windowed, 60), "learned": (with_positions(model, 12), 10)}[kind]
  plain = generate(one, weights, [[1, 2]], max_new_tokens=new, stop_ids=())
  out = speculate(one, weights, [[1, 2]], PromptLookup(), gamma=21, max_new_tokens=new, stop_ids=())
  assert out.tokens == plain.tokens


def test_a_draft_of_another_vocabulary_and_an_ngram_of_none_are_refused(shallow):
  model, params = shallow
  other = Transformer(dataclasses.replace(model.cfg, vocab_size=65))
  with pytest.raises(TokenizerError, match=r"draft: found a vocabulary of 65, expected the model's 64"):
    speculate(model, params, [[1]], DraftModel(other, params))
  for ngram in (0, 1.5, True):
    with pytest.raises(ConfigError, match=r"PromptLookup.ngram: found"):
      PromptLookup(ngram)
  cut = DraftModel(model, params | {"embed": params["embed"][:-1]})
  with pytest.raises(ConfigError, match=r"^draft's params: found embed of shape"):
    speculate(model, params, [[1, 2]], cut, max_new_tokens=4)


def test_logits_that_are_no_numbers_are_told(shallow):
  model, params = shallow
  broken = jax.tree.map(lambda x: np.full_like(x, np.nan), params)
  with pytest.raises(SamplingError, match=r"row 0: found NaN, \+inf or nothing finite in the logits"):
    speculate(model, broken, [[1, 2]], PromptLookup(), max_new_tokens=5)
  # a draft model that is broken costs speed alone
  plain = generate(model, params, [[1, 2]], max_new_tokens=NEW, stop_ids=())
  out = speculate(model, params, [[1, 2]], DraftModel(model, broken), max_new_tokens=NEW, stop_ids=())
  assert out.tokens == plain.tokens
