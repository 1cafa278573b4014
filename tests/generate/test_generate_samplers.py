"""Samplers that remember, in the compiled loop: texts obey them, rows stay apart, parameters are data."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_generate_compiles import compilations

from jaxllm.errors import SamplingError
from jaxllm.generate.loop import generate
from jaxllm.nn import Transformer
from jaxllm.position import Learned
from jaxllm.sampling import (
  BannedTokens,
  Dry,
  ForcedTokens,
  FrequencyPenalty,
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


@core
def test_a_row_does_not_depend_on_its_batch_and_parameters_are_data(shallow, prompts):
  model, params = shallow
  key_B = jax.random.split(KEY, 3)
  usual = {"max_new_tokens": 20, "sampler": every(), "key": key_B, "stop_ids": ()}
  together = generate(model, params, prompts, **usual).tokens
  order = [2, 0, 1]
  moved = generate(
    model, params, [prompts[row] for row in order], **(usual | {"key": key_B[jnp.array(order)]})
  ).tokens
  assert moved == [together[row] for row in order]
  with compilations() as seen:
    other = generate(model, params, prompts, **(usual | {"sampler": every(0.5)})).tokens
  assert not seen
  assert other != together
  assert generate(model, params, prompts, chunk=7, **usual).tokens == together
  for text in together:
    assert text[0] == 9 and text[2] == 8
    assert not {1, 2} & set(text)
  # alone, in a bucket of another length
  longer = [list(range(10, 40)), prompts[1]]
  two = generate(model, params, longer, **(usual | {"key": key_B[:2]})).tokens
  assert two[1] == together[1]


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
  usual = {"key": KEY, "max_new_tokens": 40, "stop_ids": ()}
  text = lambda sampler: generate(model, params, prompts, sampler=sampler, **usual).tokens
  cold = lambda sampler: in_order([sampler, TopK(1)])
  greedy = text(TopK(1))
  for strong in (RepetitionPenalty(5.0), PresencePenalty(20.0), FrequencyPenalty(20.0), Dry(50.0)):
    repeated = lambda texts: sum(len(tokens) - len(set(grams(tokens, 3))) for tokens in texts)
    assert repeated(text(cold(strong))) < repeated(greedy), strong


@core
def test_where_the_sampler_leaves_nothing_the_row_and_token_are_named(shallow):
  model, params = shallow
  sampler = NoRepeatNgram([0, 1])  # the second row may use each token once
  message = (
    rf"^row 1: .* in the logits of new token {V - 3}, .* of which the sampler leaves one; .* excludes$"
  )
  with pytest.raises(SamplingError, match=message):
    generate(model, params, [[1], [2, 3, 4]], sampler=sampler, key=KEY, max_new_tokens=100, stop_ids=())
  out = generate(model, params, [[1], [2, 3, 4]], sampler=sampler, key=KEY, max_new_tokens=V - 3, stop_ids=())
  assert sorted(out.tokens[1] + [2, 3, 4]) == list(range(V))


def test_a_row_that_has_ended_may_be_left_nothing(shallow):
  model, params = shallow
  usual = {"sampler": NoRepeatNgram([0, 1]), "key": KEY, "max_new_tokens": 90}
  first = generate(model, params, [[1], [2, 3, 4]], **(usual | {"max_new_tokens": V - 3}), stop_ids=()).tokens
  last = first[1][-1]
  # the second row ends with the last id that it may draw; the first, which draws that id too, when it does
  out = generate(model, params, [[1], [2, 3, 4]], **usual, stop_ids=(last,))
  assert out.reasons[1] == "stop" and out.tokens[1] == first[1]
  assert out.tokens[0][: V - 3] == first[0][: len(out.tokens[0])][: V - 3]


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
