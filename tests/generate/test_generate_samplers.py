"""Samplers that remember, in the compiled loop: texts obey them, rows stay apart, parameters are data."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import compilations
from markov_case import markov

from jaxllm.generate import loop, request
from jaxllm.generate.loop import generate
from jaxllm.nn import Transformer
from jaxllm.position import Learned
from jaxllm.sampling import (
  BannedTokens,
  Chain,
  Dry,
  ForcedTokens,
  FrequencyPenalty,
  Greedy,
  LogitBias,
  MinNewTokens,
  Mirostat,
  NoRepeatNgram,
  PresencePenalty,
  RepetitionPenalty,
  Temperature,
  TopK,
  Xtc,
  in_order,
  token_mask,
)

core = pytest.mark.core
KEY, V = jax.random.key(7), 64
NONE = token_mask([], V)


def every(scale=1.0):
  """A chain of all kinds of state."""
  return in_order(
    [
      LogitBias(np.linspace(-scale, scale, V)),
      RepetitionPenalty(1.0 + 0.3 * scale),
      PresencePenalty(0.2 * scale),
      FrequencyPenalty(0.1 * scale, prompt=True),
      Dry(0.8 * scale, breakers=token_mask([3], V)),
      NoRepeatNgram(3),
      BannedTokens(token_mask([1, 2], V)),
      MinNewTokens(4, token_mask([5], V)),
      ForcedTokens([9, -1, 8]),
      Temperature(0.9),
      Xtc(0.5 * scale, 0.05),
      Mirostat(4.0),
    ]
  )


@pytest.fixture(scope="module")
def usual(shallow, prompts):
  model, params = shallow
  arguments = {"sampler": every(), "key": jax.random.split(KEY, 3), "max_new_tokens": 20, "stop_ids": ()}
  arguments |= {"model": model, "params": params, "prompts": prompts}
  return arguments, generate(**arguments).tokens


@core
def test_texts_obey_and_do_not_depend_on_the_batch_and_parameters_are_data(usual):
  arguments, together = usual
  for text in together:
    assert text[0] == 9 and text[2] == 8
    assert not {1, 2} & set(text)
  order = [2, 0, 1]
  at = {"prompts": [arguments["prompts"][row] for row in order], "key": arguments["key"][jnp.array(order)]}
  weaker = every(0.5)
  with compilations() as seen:
    moved = generate(**arguments | at).tokens
    other = generate(**arguments | {"sampler": weaker}).tokens
  assert not seen
  assert moved == [together[row] for row in order]
  assert other != together


@pytest.mark.slow
def test_texts_do_not_depend_on_chunk_and_bucket(usual):
  arguments, together = usual
  assert generate(**arguments, chunk=7).tokens == together
  longer = {"prompts": [list(range(10, 40)), arguments["prompts"][1]], "key": arguments["key"][:2]}
  assert generate(**arguments | longer).tokens[1] == together[1]


def grams(text, n):
  return [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]


def test_no_ngram_of_text_and_prompt_is_repeated(shallow):
  model, params = shallow
  prompts = [[1, 2, 3, 4, 5], [6, 7, 8], [9]]  # none of whose pairs occurs twice
  sampler = NoRepeatNgram([0, 2, 1])
  texts = generate(model, params, prompts, sampler=sampler, key=KEY, max_new_tokens=40).tokens
  whole = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
  for text, n in zip(whole[1:], (2, 1), strict=True):
    assert len(set(grams(text, n))) == len(grams(text, n))
  assert len(set(whole[0])) < len(whole[0])


def test_a_text_does_not_end_before_its_least_length(shallow, prompts):
  model, params = shallow
  stop = list(range(0, V, 2))
  sampler = MinNewTokens([0, 6, 11], token_mask(stop, V))
  out = generate(model, params, prompts, sampler=sampler, key=KEY, max_new_tokens=30, stop_ids=stop)
  assert out.reasons == ["stop"] * 3
  assert all(len(text) > least for text, least in zip(out.tokens, (0, 6, 11), strict=True))


def test_penalties_and_dry_change_the_greedy_text_of_a_repeating_model(shallow, prompts):
  model, params = shallow

  def repeated(repetition=1.0, presence=0.0, frequency=0.0, dry=0.0):
    """How many trigrams a greedy text has twice."""
    penalties = [
      RepetitionPenalty(repetition),
      PresencePenalty(presence),
      FrequencyPenalty(frequency),
      Dry(dry),
    ]
    sampler = in_order([*penalties, TopK(1)])
    out = generate(model, params, prompts, sampler=sampler, key=KEY, max_new_tokens=40, stop_ids=())
    return sum(len(grams(tokens, 3)) - len(set(grams(tokens, 3))) for tokens in out.tokens)

  greedy = repeated()
  assert greedy > 3
  for kind, strong in (("repetition", 5.0), ("presence", 20.0), ("frequency", 20.0), ("dry", 50.0)):
    assert repeated(**{kind: strong}) < greedy / 2, kind


def test_with_guidance_a_sampler_remembers_the_prompt_and_its_text_alone(monkeypatch):
  """The likeliest id that was not there, by definition: both prompts end alike, so guidance changes no logits.

  The text is longer than the memory is at first.
  """
  monkeypatch.setattr(request, "SLOTS", 16)
  monkeypatch.setattr(loop, "ROOM", 4)
  logits_VV = np.random.default_rng(2).normal(size=(40, 40))
  prompts, negative = [[1, 2, 3], [4, 5, 6, 7, 0]], [[8, 9, 10, 11, 3], [11, 0]]
  out = generate(
    *markov(logits_VV),
    prompts,
    negative_prompts=negative,
    guidance_scale=1.7,
    sampler=Chain((NoRepeatNgram(1), Greedy())),
    max_new_tokens=30,
    stop_ids=(),
    copies=2,
  )
  for prompt, *texts in zip(prompts, out.tokens[::2], out.tokens[1::2], strict=True):
    there = list(prompt)
    for _ in range(30):
      left = (int(token) for token in np.argsort(-logits_VV[there[-1]]) if token not in there)
      there.append(next(left))
    assert texts == [there[len(prompt) :]] * 2


@pytest.mark.slow
def test_a_row_that_has_ended_may_be_left_nothing(shallow):
  """The second row ends with the last id that it may draw, which the first may not."""
  model, params = shallow
  usual = {"key": KEY, "prompts": [[1], [2, 3, 4]], "model": model, "params": params}
  sampler = lambda *banned: in_order(
    [NoRepeatNgram([0, 1]), BannedTokens(np.stack([token_mask(banned, V), NONE]))]
  )
  first = generate(**usual, sampler=sampler(), max_new_tokens=V - 3, stop_ids=()).tokens[1]
  out = generate(**usual, sampler=sampler(first[-1]), max_new_tokens=90, stop_ids=first[-1:])
  assert out.reasons == ["length", "stop"]
  assert out.tokens[1] == first
  assert len(out.tokens[0]) == 90


@pytest.mark.slow
def test_a_history_holds_the_longest_text_that_a_learned_table_serves(shallow):
  """The cache ends with the table, below the bucket of the prompt and the new tokens."""
  model, _ = shallow
  cfg = dataclasses.replace(
    model.cfg, layers=(dataclasses.replace(model.cfg.layers[0], position=Learned(40)),)
  )
  model = Transformer(cfg)
  params = model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
  text = generate(
    model, params, [[1, 2, 3, 4, 5]], sampler=NoRepeatNgram(1), key=KEY, max_new_tokens=35
  ).tokens[0]
  assert len(set(text) | {1, 2, 3, 4, 5}) == 40
