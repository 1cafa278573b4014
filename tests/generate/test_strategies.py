"""Beam search, guidance and best-of-n beside transformers and exhaustive search; contrastive search beside its definition."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest

from jaxllm import hf
from jaxllm.errors import ConfigError, SamplingError
from jaxllm.generate import beam, best_of, contrastive, loop, speculative
from jaxllm.generate.draft import PromptLookup
from jaxllm.generate.loop import generate
from jaxllm.nn import STORES, Transformer
from jaxllm.sampling import Temperature

core = pytest.mark.core
NEW = 12


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
  """(their Llama, our model, our parameters), of weights so large that texts differ."""
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,
    max_position_embeddings=128,
    eos_token_id=None,
    pad_token_id=0,
  )
  theirs = transformers.LlamaForCausalLM(config).eval()
  path = tmp_path_factory.mktemp("llama")
  theirs.save_pretrained(path)
  cfg, params = hf.load(path)
  return theirs, Transformer(cfg), params


PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]]
STOP = 17


def of_theirs(theirs, prompts, **settings):
  """New ids of each prompt and result, without padding, and the scores."""
  import torch

  ids = torch.tensor(prompts)
  with torch.no_grad():
    out = theirs.generate(
      ids,
      attention_mask=torch.ones_like(ids),
      max_new_tokens=NEW,
      do_sample=False,
      pad_token_id=63,
      return_dict_in_generate=True,
      output_scores=True,
      **settings,
    )
  rows = [row[len(prompts[0]) :].tolist() for row in out.sequences]
  stop = settings.get("eos_token_id")
  cut = lambda row: row[: row.index(stop) + 1] if stop in row else row
  return [cut(row) for row in rows], None if out.get(
    "sequences_scores"
  ) is None else out.sequences_scores.tolist()


ENDS = {(1.0, False): [core], (0.0, True): [], (2.5, "never"): []}
"""Length penalty and early stopping in the default set, each value of which is in one."""


@pytest.mark.parametrize(
  ("length_penalty", "early_stopping"),
  [
    pytest.param(*pair, marks=ENDS.get(pair, [pytest.mark.slow]))
    for pair in itertools.product([1.0, 0.0, -1.0, 2.5], [False, True, "never"])
  ],
)
def test_beams_are_those_of_transformers(pair, length_penalty, early_stopping):
  theirs, model, params = pair
  for stop in (STOP, 40):
    settings = dict(num_beams=4, length_penalty=length_penalty, early_stopping=early_stopping)
    expected, scores = of_theirs(theirs, PROMPTS, eos_token_id=stop, num_return_sequences=3, **settings)
    out = beam.generate(
      model, params, PROMPTS, max_new_tokens=NEW, stop_ids=(stop,), num_return=3, **settings
    )
    assert [text for texts in out.tokens for text in texts] == expected
    np.testing.assert_allclose(np.ravel(out.scores), scores, rtol=1e-4)
  assert len({tuple(text) for texts in out.tokens for text in texts}) == 6


def test_one_beam_is_greedy_and_stop_ids_end_it(pair):
  _, model, params = pair
  plain = generate(model, params, PROMPTS, max_new_tokens=NEW, stop_ids=())
  out = beam.generate(model, params, PROMPTS, num_beams=1, max_new_tokens=NEW, stop_ids=())
  assert [texts[0] for texts in out.tokens] == plain.tokens


@functools.partial(jax.jit, static_argnames=("model", "logits"))
def forward(model, params, ids_BT, logits="all"):
  return model.apply({"params": params}, ids_BT, logits=logits)[0]


def log_probabilities(model, params, prompt, texts):
  """Sums of log p of each text, float64."""
  ids = np.array([prompt + list(text) for text in texts], np.int32)
  logits = np.asarray(forward(model, params, ids), np.float64)[:, len(prompt) - 1 : -1]
  logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  new = ids[:, len(prompt) :]
  return np.take_along_axis(logs, new[..., None], axis=-1)[..., 0]


def test_enough_beams_find_the_best_of_all_texts(pair):
  """64 beams and 3 tokens: of all 64 ** 3 texts, those of the 40 likeliest first tokens hold the best."""
  _, model, params = pair
  prompt = PROMPTS[0]
  out = beam.generate(model, params, [prompt], num_beams=64, num_return=5, max_new_tokens=2, stop_ids=())
  texts = list(itertools.product(range(64), repeat=2))
  sums = log_probabilities(model, params, prompt, texts).sum(1)
  order = np.argsort(-sums)[:5]
  np.testing.assert_allclose(out.scores[0], sums[order] / 2, rtol=1e-4)
  assert [tuple(text) for text in out.tokens[0]] == [texts[i] for i in order]


def test_there_may_be_fewer_texts_than_are_asked_for(pair):
  _, model, params = pair
  out = beam.generate(model, params, PROMPTS, num_beams=80, num_return=80, max_new_tokens=1, stop_ids=())
  for texts, scores in zip(out.tokens, out.scores, strict=True):
    assert sorted(texts) == [[token] for token in range(64)]
    np.testing.assert_allclose(np.exp(scores).sum(), 1, rtol=1e-5)


@pytest.mark.slow
def test_groups_without_a_penalty_are_searches_of_their_own_and_with_one_differ(pair):
  _, model, params = pair
  usual = dict(max_new_tokens=NEW, stop_ids=())
  alone = beam.generate(model, params, PROMPTS, num_beams=2, num_return=2, **usual)
  same = beam.generate(model, params, PROMPTS, num_beams=4, num_groups=2, num_return=4, **usual)
  for one, twice in zip(alone.tokens, same.tokens, strict=True):
    assert twice == [one[0], one[0], one[1], one[1]]
  apart = beam.generate(
    model, params, PROMPTS, num_beams=4, num_groups=4, num_return=4, diversity_penalty=50.0, **usual
  )
  for texts in apart.tokens:  # no token stands at the same place in two of them
    assert all(len({text[place] for text in texts}) == 4 for place in range(NEW))


def reference_groups(model, params, prompt, G, K, penalty, steps, stop=None):
  """Diverse beam search without a cache, in float64: each group's scores and texts, and how many groups ended early.

  A group ends with K ended texts, and takes no token from then on.
  """
  groups, ended, early = [[(0.0, ())] for _ in range(G)], [[] for _ in range(G)], 0
  for step in range(1, steps + 1):
    taken = np.zeros(64)
    for g in range(G):
      if len(ended[g]) == K:
        continue
      texts = [text for _, text in groups[g]]
      ids = np.zeros((K, len(prompt) + steps), np.int32)  # one shape: later tokens change nothing
      for row, text in enumerate(texts):
        ids[row, : len(prompt) + step - 1] = [*prompt, *text]
      logits = np.asarray(forward(model, params, ids), np.float64)[: len(texts), len(prompt) + step - 2]
      logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
      sums = np.array([score for score, _ in groups[g]])[:, None] + logs - penalty * taken
      best = np.argsort(-sums, axis=None, kind="stable")[: 2 * K]
      found = [(sums.flat[i], (*texts[i // 64], int(i % 64))) for i in best]
      ends = [(score / step, text) for score, text in found[:K] if text[-1] == stop or step == steps]
      ended[g] = sorted(ended[g] + ends, reverse=True)[:K]
      early += len(ended[g]) == K and step < steps
      groups[g] = [(score, text) for score, text in found if text[-1] != stop][:K]
      for _, text in groups[g]:
        taken[text[-1]] += 1
  return ended, early


@pytest.mark.parametrize("stop", [None, 14, pytest.param(40, marks=pytest.mark.slow)])
def test_groups_are_those_of_their_definition(pair, stop):
  _, model, params = pair
  out = beam.generate(
    model,
    params,
    PROMPTS,
    num_beams=6,
    num_groups=3,
    num_return=6,
    diversity_penalty=1.3,
    early_stopping=True,
    max_new_tokens=9,
    stop_ids=() if stop is None else (stop,),
  )
  ended_early = 0
  for b, prompt in enumerate(PROMPTS):
    ended, early = reference_groups(model, params, prompt, 3, 2, 1.3, 9, stop)
    ended_early += early
    expected = sorted(itertools.chain.from_iterable(ended), reverse=True)
    assert [tuple(text) for text in out.tokens[b]] == [text for _, text in expected]
    np.testing.assert_allclose(out.scores[b], [score for score, _ in expected], rtol=1e-4)
  assert (ended_early > 0) == (stop is not None)


@pytest.mark.parametrize(
  ("given", "message"),
  [
    (dict(num_beams=0), "num_beams: found 0"),
    (dict(num_groups=3), "num_groups: found 3, expected a divisor of num_beams = 4"),
    (dict(num_return=5), "num_return: found 5, expected at most num_beams = 4"),
    (dict(early_stopping="always"), "early_stopping: found 'always'"),
    (
      dict(early_stopping=1),
      "early_stopping: found 1, expected True",
    ),  # equals True, and would be taken for False
    (dict(length_penalty=np.nan), "length_penalty: found nan"),
    (dict(length_penalty=-1000), r"length_penalty: found -1000, expected a finite number from -11.4 to 11.4"),
    (dict(length_penalty=5, max_new_tokens=10**6), "length_penalty: found 5, expected .* from -4 to 4"),
    (dict(diversity_penalty="1"), "diversity_penalty: found '1'"),
    (dict(diversity_penalty=1e39), r"diversity_penalty: found 1e\+39, expected a finite number from -1e\+06"),
  ],
)
def test_beams_that_do_not_fit_are_refused(shallow, given, message):
  with pytest.raises(ConfigError, match=message):
    beam.generate(*shallow, [[1, 2]], **given)


def test_logits_that_are_no_numbers_are_told(shallow):
  model, params = shallow
  broken = jax.tree.map(lambda x: np.full_like(x, np.nan), params)
  for search in (beam, contrastive):
    with pytest.raises(SamplingError, match=r"row 0: found NaN, \+inf or nothing finite"):
      search.generate(model, broken, [[1, 2]], max_new_tokens=3)


@pytest.mark.parametrize("scale", [1.7, 0.5, 1.0])
def test_guided_text_is_that_of_transformers(pair, scale):
  import torch

  theirs, model, params = pair
  for prompt, negative in zip(PROMPTS, [[7, 7], [8]], strict=True):
    expected, _ = of_theirs(
      theirs, [prompt], guidance_scale=scale, negative_prompt_ids=torch.tensor([negative])
    )
    out = generate(
      model,
      params,
      [prompt],
      max_new_tokens=NEW,
      stop_ids=(),
      negative_prompts=[negative],
      guidance_scale=scale,
    )
    assert out.tokens == expected
  both = generate(
    model,
    params,
    PROMPTS,
    max_new_tokens=NEW,
    stop_ids=(),
    negative_prompts=[[7, 7], [8]],
    guidance_scale=[scale] * 2,
  )
  assert both.tokens[1] == out.tokens[0]
  plain = generate(model, params, PROMPTS, max_new_tokens=NEW, stop_ids=())
  assert (both.tokens == plain.tokens) == (scale == 1.0)


def test_what_one_of_the_two_excludes_is_never_steered_to():
  """u = -inf would be +inf of a token, and both -inf NaN."""
  c, u = np.array([[0.0, -np.inf, -np.inf, 0.0]]), np.array([[0.0, 0.0, -np.inf, -np.inf]])
  found = np.asarray(loop.guided(np.concatenate([c, u]), np.array([3.0])))[0]
  assert (found == -np.inf).tolist() == [False, True, True, False] and found[3] == np.float32(np.log(0.5))
  assert abs(found[0] - np.log(0.5)) < 1e-6


@pytest.mark.parametrize(
  ("given", "message"),
  [
    (dict(negative_prompts=[]), "negative_prompts: found 0, expected 1"),
    (dict(negative_prompts=[[1]], guidance_scale=np.inf), "guidance_scale: found inf"),
    (dict(negative_prompts=[[1]], guidance_scale=[1.0, 2.0]), r"guidance_scale: found \[1.0, 2.0\]"),
    (dict(negative_prompts=5), "negative_prompts: found 5, expected 1"),
    (dict(negative_prompts=[[1]], positions=[[0, 1]]), "negative_prompts: cannot be given with positions"),
    (dict(negative_prompts=[[1]], guidance_scale=[[1.0], [1.0, 2.0]]), "guidance_scale: found"),
    (
      dict(negative_prompts=[[1]], guidance_scale=1e39),
      r"guidance_scale: found 1e\+39, expected a number of size 1e\+06",
    ),
    (dict(positions=5), "positions: found 5, expected 1"),
    (dict(prefix=1), "prefix: found 1, expected 1, one a prompt"),
    (dict(chunk=3_000_000_000), "chunk: found 3000000000, expected at most"),
    (dict(copies=0), "copies: found 0"),
  ],
)
def test_guidance_that_does_not_fit_is_refused(shallow, given, message):
  with pytest.raises(ConfigError, match=message):
    generate(*shallow, [[1, 2]], **given)


@core
def test_copies_are_draws_of_one_prompt_and_the_best_of_them_is_the_likeliest(shallow, prompts):
  model, params = shallow
  usual = dict(sampler=Temperature(1.0), key=jax.random.key(3), max_new_tokens=NEW, stop_ids=())
  rows = [prompt for prompt in prompts for _ in range(4)]
  apart = generate(model, params, rows, logprobs=0, **usual)
  assert generate(model, params, prompts, copies=4, logprobs=0, **usual).tokens == apart.tokens
  for penalty in (0.0, 1.0, 2.0):
    out = best_of.generate(model, params, prompts, n=4, length_penalty=penalty, **usual)
    for b, prompt in enumerate(prompts):
      sums = log_probabilities(model, params, prompt, apart.tokens[4 * b : 4 * b + 4]).sum(1) / NEW**penalty
      order = np.argsort(-sums)
      assert out.tokens[b] == [apart.tokens[4 * b + i] for i in order]
      np.testing.assert_allclose(out.scores[b], sums[order], rtol=1e-4)
      assert out.reasons[b] == ["length"] * 4
  for given, message in (
    (dict(length_penalty=np.nan), "length_penalty: found nan"),
    (dict(length_penalty=1000), "length_penalty: found 1000, expected a finite number from"),
    (dict(n=0), "n: found 0, expected an integer of at least 1"),
    (dict(copies=3), "copies: found 3, expected none"),
    (dict(logprobs=None), "logprobs: found None, expected none"),
  ):
    with pytest.raises(ConfigError, match="^" + message):
      best_of.generate(model, params, prompts, **dict(n=2) | given, **usual)


def defined_contrastive(model, params, prompt, alpha, k, steps):
  """Contrastive search by its definition: everything anew at each step, in float64 from the hidden states on."""
  ids = list(prompt)
  for _ in range(steps):
    padded = np.array([ids + [0] * (40 - len(ids))], np.int32)  # later tokens change nothing
    logits = np.asarray(forward(model, params, padded), np.float64)[0, len(ids) - 1]
    p = np.exp(logits - logits.max())
    p /= p.sum()
    tops = np.argsort(-p, kind="stable")[:k]
    tried = np.array([[*ids, int(v)] + [0] * (39 - len(ids)) for v in tops], np.int32)
    hidden = np.asarray(forward(model, params, tried, None), np.float64)[:, : len(ids) + 1]
    hidden /= np.linalg.norm(hidden, axis=-1, keepdims=True)
    likeness = np.einsum("csd,cd->cs", hidden[:, :-1], hidden[:, -1]).max(1)
    ids.append(int(tops[np.argmax((1 - alpha) * p[tops] - alpha * likeness)]))
  return ids[len(prompt) :]


@pytest.mark.parametrize("alpha", [0.6, *(pytest.param(x, marks=pytest.mark.slow) for x in (0.0, 1.0))])
def test_contrastive_text_is_that_of_its_definition(pair, prompts, alpha):
  _, model, params = pair
  out = contrastive.generate(model, params, prompts, alpha=alpha, top_k=5, max_new_tokens=8, stop_ids=())
  for prompt, text in zip(prompts, out.tokens, strict=True):
    assert text == defined_contrastive(model, params, prompt, alpha, 5, 8)
  plain = generate(model, params, prompts, max_new_tokens=8, stop_ids=())
  assert (out.tokens == plain.tokens) == (alpha == 0)
  stop = out.tokens[0][3]
  ended = contrastive.generate(
    model, params, prompts, alpha=alpha, top_k=5, max_new_tokens=8, stop_ids=(stop,)
  )
  assert ended.tokens[0] == out.tokens[0][: out.tokens[0].index(stop) + 1] and ended.reasons[0] == "stop"


@pytest.mark.parametrize("given", [dict(alpha=1.1), dict(alpha=True), dict(top_k=0), dict(top_k=65)])
def test_contrastive_numbers_that_do_not_fit_are_refused(shallow, given):
  (name,) = given
  with pytest.raises(ConfigError, match=f"{name}: found"):
    contrastive.generate(*shallow, [[1, 2]], **given)


@pytest.mark.slow
def test_searches_take_windowed_layers(deep, prompts):
  model, params = deep
  (layer,) = model.cfg.layers
  model = Transformer(
    dataclasses.replace(model.cfg, layers=(layer, dataclasses.replace(layer, window=6), layer))
  )
  whole = beam.generate(model, params, prompts, num_beams=3, max_new_tokens=NEW, stop_ids=())
  parts = beam.generate(model, params, prompts, num_beams=3, max_new_tokens=NEW, stop_ids=(), part=4)
  assert parts.tokens == whole.tokens
  np.testing.assert_allclose(parts.scores, whole.scores, rtol=1e-4)


@pytest.mark.slow
def test_every_strategy_reads_a_cache_of_integers(deep, prompts):
  """One beam, no penalty and greedy drafts are the greedy text of the same cache, which is not that of another."""
  model, params = deep
  usual = dict(max_new_tokens=NEW, stop_ids=(), store=STORES["int4"])
  expected = generate(model, params, prompts, **usual).tokens
  assert expected != generate(model, params, prompts, **usual | {"store": STORES["full"]}).tokens
  found = beam.generate(model, params, prompts, num_beams=1, **usual)
  assert [texts[0] for texts in found.tokens] == expected
  assert contrastive.generate(model, params, prompts, alpha=0.0, **usual).tokens == expected
  assert speculative.generate(model, params, prompts, PromptLookup(), **usual).tokens == expected


@pytest.mark.slow
def test_copies_of_a_prompt_have_its_guidance(shallow, prompts):
  model, params = shallow
  twice = lambda rows: [row for row in rows for _ in range(2)]
  negative, scales = [[7, 7], [1], [3, 2, 5]], [0.2, 4.0, 1.5]
  call = lambda prompts, negative, scales, **more: generate(
    model,
    params,
    prompts,
    negative_prompts=negative,
    guidance_scale=scales,
    max_new_tokens=NEW,
    stop_ids=(),
    **more,
  )
  found = call(prompts, negative, scales, copies=2)
  assert found == call(twice(prompts), twice(negative), twice(scales))
  assert found.tokens[::2] != call(prompts, negative, 1.5).tokens
