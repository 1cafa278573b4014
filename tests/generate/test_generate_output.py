"""Between chunks: what on_tokens is told, where stop ends a row, and the log-probabilities of what was drawn."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from method_cases import joined

from jaxllm.errors import ConfigError
from jaxllm.generate import speculative
from jaxllm.generate.draft import PromptLookup
from jaxllm.generate.loop import generate
from jaxllm.nn import STORES, Context, Transformer
from jaxllm.position import Rope2d, glm_positions, next_glm_positions
from jaxllm.sampling import BannedTokens, Chain, Greedy, NoRepeatNgram, Temperature, TopK, Xtc

core = pytest.mark.core
NEW = 20


@pytest.mark.parametrize("chunk", [1, 7, pytest.param(32, marks=core)])
def test_on_tokens_is_told_all_new_ids_in_order(shallow, prompts, chunk):
  model, params = shallow
  told = [[] for _ in prompts]
  calls = []

  def on_tokens(row, ids):
    calls.append((row, len(ids)))
    told[row] += ids

  stop = generate(model, params, prompts, max_new_tokens=NEW).tokens[0][8]
  usual = dict(max_new_tokens=NEW, stop_ids=(stop,), chunk=chunk)
  out = generate(model, params, prompts, on_tokens=on_tokens, **usual)
  assert told == out.tokens == generate(model, params, prompts, **usual).tokens
  assert all(1 <= n <= chunk for _, n in calls)
  if chunk == 1:
    assert len(calls) == sum(map(len, out.tokens))


@pytest.mark.parametrize("chunk", [1, 5, 32])
def test_stop_ends_a_row_where_it_says_whatever_the_chunk(shallow, prompts, chunk):
  """Row 0 at its 7th new id, keeping 5 of 7; row 2 at its first, keeping none; row 1 goes on as without."""
  model, params = shallow
  whole = generate(model, params, prompts, max_new_tokens=NEW, stop_ids=()).tokens
  asked = [[] for _ in prompts]

  def stop(row, ids):
    assert ids == whole[row][: len(ids)]
    asked[row].append(len(ids))
    return {(0, 7): 5, (2, 1): 0}.get((row, len(ids)))

  told = [[] for _ in prompts]
  out = generate(
    model,
    params,
    prompts,
    max_new_tokens=NEW,
    stop_ids=(),
    chunk=chunk,
    stop=stop,
    logprobs=0,
    on_tokens=lambda row, ids: told[row].extend(ids),
  )
  assert out.tokens == [whole[0][:5], whole[1], []]
  assert out.reasons == ["stop", "length", "stop"]
  assert [len(row) for row in out.logprobs] == [5, NEW, 0]
  assert asked == [list(range(1, 8)), list(range(1, NEW + 1)), [1]]
  assert told[1] == whole[1] and told[2] == []


def test_a_row_that_met_a_stop_id_stays_ended_when_stop_ends_another(shallow, prompts):
  """The last row in the first chunk, row 1 in the second, keeping all; row 0 goes on through a third."""
  model, params = shallow
  usual = dict(max_new_tokens=NEW, chunk=7)
  whole = generate(model, params, prompts, stop_ids=(), **usual).tokens
  own = next(token for token in whole[2][:7] if token not in whole[0] + whole[1])
  out = generate(
    model,
    params,
    prompts,
    stop_ids=(own,),
    stop=lambda row, ids: 9 if (row, len(ids)) == (1, 9) else None,
    **usual,
  )
  assert out.tokens == [whole[0], whole[1][:9], whole[2][: whole[2].index(own) + 1]]
  assert out.reasons == ["length", "stop", "stop"]


def test_the_loop_ends_when_stop_has_ended_all_rows(shallow, prompts):
  model, params = shallow
  told = []
  out = generate(
    model,
    params,
    prompts,
    max_new_tokens=10_000,
    stop_ids=(),
    chunk=4,
    stop=lambda row, ids: 3 if len(ids) >= 3 else None,
    on_tokens=lambda row, ids: told.append(len(ids)),
  )
  assert [len(row) for row in out.tokens] == [3] * 3 and sum(told) <= 3 * 5


@pytest.mark.parametrize("answer", [9, -1, True, "x"])
def test_what_is_no_number_of_ids_is_refused(shallow, prompts, answer):
  model, params = shallow
  with pytest.raises(
    ConfigError, match=r"stop: found .* for row 0, expected None or how many of its 1 ids to keep"
  ):
    generate(model, params, prompts, max_new_tokens=3, stop=lambda row, ids: answer)


@pytest.mark.parametrize("k", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_log_probabilities_are_those_of_the_model_before_any_filter(deep, prompts, k):
  model, params = deep
  sampler = Chain((Temperature(2.0), TopK(9)))
  plain = generate(model, params, prompts, sampler=sampler, key=jax.random.key(1), max_new_tokens=NEW)
  out = generate(
    model, params, prompts, sampler=sampler, key=jax.random.key(1), max_new_tokens=NEW, logprobs=k, chunk=6
  )
  assert out.tokens == plain.tokens and plain.logprobs is plain.likeliest is None
  all_logits = np.asarray(forward(model, params, joined(prompts, out.tokens), Context()), np.float64)
  for row, (prompt, new) in enumerate(zip(prompts, out.tokens, strict=True)):
    logits = all_logits[row, len(prompt) - 1 :][:NEW]
    expected = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    np.testing.assert_allclose(out.logprobs[row], expected[np.arange(NEW), new], rtol=0, atol=1e-4)
    if not k:
      assert out.likeliest is None
      continue
    for t, tops in enumerate(out.likeliest[row]):
      order = np.argsort(-expected[t])[:k]
      np.testing.assert_allclose(
        expected[t][[one for one, _ in tops]], expected[t][order], rtol=0, atol=1e-4
      )  # or ties
      np.testing.assert_allclose([value for _, value in tops], expected[t][order], rtol=0, atol=1e-4)


@pytest.mark.parametrize("value", [-1, 1.5, True])
def test_more_log_probabilities_than_tokens_are_refused(shallow, prompts, value):
  with pytest.raises(ConfigError, match=r"logprobs: found .*, expected None or an integer from 0 to 64"):
    generate(*shallow, prompts, logprobs=value)


@functools.partial(jax.jit, static_argnames="model")
def forward(model, params, ids_BT, context):
  return model.apply({"params": params}, ids_BT, context)[0]


METHODS = {
  "rope": {},
  "dynamic_ntk": {"factor": 4.0},
  "rerope": {"window": 5},
  "alibi": {},
  "streaming": {"window": 5, "sinks": 2},
}


DEFAULT = {"dynamic_ntk": [core]}


@pytest.mark.parametrize(
  "name", [pytest.param(name, marks=DEFAULT.get(name, [pytest.mark.slow])) for name in METHODS]
)
def test_prompts_in_parts_and_windowed_layers_give_the_same_text(deep, prompts, name):
  """Parts of 4 tokens, of which a layer with a window of 6 keeps 10, against one part and caches that hold all."""
  model, params = deep
  cfg = model.cfg.with_position(name, **METHODS[name])
  (layer,) = cfg.layers
  cfg = dataclasses.replace(cfg, layers=(layer, dataclasses.replace(layer, window=6), layer))
  model, longer = (
    Transformer(cfg),
    [*prompts[:2], [7, *prompts[2]]],
  )  # 17 tokens: five parts, of which one is of one token
  whole = generate(model, params, longer, max_new_tokens=NEW)
  assert generate(model, params, longer, max_new_tokens=NEW, part=4) == whole
  assert min(len(set(new)) for new in whole.tokens) >= 3


def test_a_cache_of_integers_gives_nearly_the_same_log_probabilities(deep, prompts):
  model, params = deep
  full, int8, int4 = (
    generate(model, params, prompts, max_new_tokens=1, part=4, store=STORES[name], logprobs=63).likeliest
    for name in ("full", "int8", "int4")
  )

  def error(found):
    """The largest difference of a log-probability, by the spread of a row's."""
    pairs = [(dict(a[0]), dict(b[0])) for a, b in zip(found, full, strict=True)]
    spread = max(max(b.values()) - min(b.values()) for _, b in pairs)
    return max(abs(a[one] - b[one]) for a, b in pairs for one in a.keys() & b.keys()) / spread

  assert 1e-6 < error(int8) < 0.05 < error(int4) < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("two_dimensional", [True, False])
def test_positions_and_prefix_of_a_caller(deep, two_dimensional):
  """GLM prompts: the text is the argmax of full forward passes with the positions of all, and the prefix in both directions."""
  model, params = deep
  if two_dimensional:
    model = Transformer(
      dataclasses.replace(model.cfg, layers=(dataclasses.replace(model.cfg.layers[0], position=Rope2d()),))
    )
  bos, gmask = 62, 63
  texts = [[1, 2, 3, 4, 5, gmask, bos], [9, 8, gmask, bos], [*range(20, 34), gmask, bos]]
  places = [
    glm_positions(text, bos=bos, mask=61, gmask=gmask, two_dimensional=two_dimensional) for text in texts
  ]
  prefix = [len(text) - 1 for text in texts]
  out = generate(model, params, texts, max_new_tokens=NEW, positions=places, prefix=prefix)
  ids = joined(texts, out.tokens)
  pos = np.stack([np.concatenate([p, next_glm_positions(p, ids.shape[1] - len(p))]) for p in places])
  logits = forward(model, params, ids, Context(pos=pos, prefix=np.array(prefix)))
  for row, text in enumerate(texts):
    np.testing.assert_array_equal(out.tokens[row], np.argmax(logits[row, len(text) - 1 :][:NEW], axis=-1))
  assert out != generate(model, params, texts, max_new_tokens=NEW)
  assert out != generate(model, params, texts, max_new_tokens=NEW, positions=places)


@pytest.mark.parametrize(
  ("given", "message"),
  [
    (dict(positions=[[0, 1]]), r"positions: found 1, expected 2, one a prompt"),
    (
      dict(positions=[[0, 1], [0]]),
      r"positions\[1\]: found int64 of shape \(1,\), expected integers from 0",
    ),
    (dict(positions=[[0, 1], [0, -1, 2]]), r"positions\[1\]: found int64 of shape \(3,\)"),
    (dict(positions=[[0.0, 1.0], [0, 1, 2]]), r"positions\[0\]: found float64"),
    (
      dict(positions=[[[0, 1], [0, 2]], [0, 1, 2]]),
      r"positions: found \[T\] for some prompts and \[T, 2\] for others",
    ),
    (dict(prefix=[1]), r"prefix: found 1, expected 2, one a prompt"),
    (dict(prefix=[1, 4]), r"prefix\[1\]: found 4, expected an integer from 0 to 3"),
    (
      dict(prefix=[1, 3], part=2),
      r"prefix\[1\]: found 3, expected an integer from 0 to 2, the tokens of the first part",
    ),
  ],
)
def test_what_does_not_fit_the_prompts_is_refused(shallow, given, message):
  with pytest.raises(ConfigError, match=message):
    generate(*shallow, [[1, 2], [3, 4, 5]], max_new_tokens=3, **given)


@core
def test_a_row_of_which_the_sampler_leaves_nothing_ends_there_and_the_others_go_on(shallow, prompts):
  """Row 1 may draw five ids, each once; speculative decoding ends it in the same place."""
  model, params = shallow
  banned = np.zeros((3, 64), bool)
  banned[1, 5:] = True
  sampler = Chain((BannedTokens(banned), NoRepeatNgram([0, 1, 0]), Greedy()))
  seen = [row for row in set(prompts[1]) if row < 5]
  out = generate(model, params, prompts, sampler=sampler, max_new_tokens=NEW, stop_ids=(), logprobs=0)
  assert out.reasons == ["length", "exhausted", "length"]
  assert sorted(out.tokens[1] + seen) == [0, 1, 2, 3, 4] and len(out.logprobs[1]) == len(out.tokens[1])
  usual = dict(max_new_tokens=NEW, stop_ids=())
  plain = generate(model, params, prompts, **usual)
  assert [out.tokens[row] == plain.tokens[row] for row in range(3)] == [True, False, True]
  found = speculative.generate(model, params, prompts, PromptLookup(), sampler=sampler, **usual)
  assert (found.tokens, found.reasons) == (out.tokens, out.reasons)
  with pytest.raises(ConfigError, match=r"key: found None, expected jax.random.key"):
    generate(model, params, prompts, sampler=Chain((Xtc(0.5), Greedy())), **usual)
