"""Speculative draws of a Markov chain, whose texts have probabilities in closed form: every key and coin counts."""

import dataclasses

import jax
import numpy as np
import pytest
from markov_case import markov, texts
from sampling_reference import chi_square, chi_square_limit

from jaxllm.generate import speculative
from jaxllm.generate.draft import DraftModel, PromptLookup, draft_keys
from jaxllm.sampling import Chain, Xtc

P = np.array([[0.1, 0.6, 0.3], [0.3, 0.1, 0.6], [0.6, 0.3, 0.1]])
Q = np.array([[0.5, 0.4, 0.1], [0.1, 0.5, 0.4], [0.4, 0.1, 0.5]])  # half of its drafts are kept
CUT = np.select([P == 0.3, P == 0.1], [0.75, 0.25])  # by XTC, whose threshold the two likelier ids reach
STEPS, ROWS = 3, 4000
MODEL, DRAFT = markov(np.log(P)), markov(np.log(Q))
CASES = {  # draft, gamma, how often XTC acts; models and coins are data, so that one program serves the first two
  "another model": (DraftModel(*DRAFT), 2, 0.0),
  "itself, with a coin": (DraftModel(*MODEL), 2, 0.5),
  "lookup": (PromptLookup(2), 1, 0.0),
}


def drawn(name, gamma=None):
  """(chi-square by its limit, drafts that are kept of each text) of texts of a case, or of another gamma."""
  draft, usual_gamma, coin = CASES[name]
  usual = dict(gamma=gamma or usual_gamma, sampler=Chain((Xtc(coin, 0.2),)), key=jax.random.key(0))
  out = speculative.generate(*MODEL, [[0, 1, 2, 0]] * ROWS, draft, max_new_tokens=STEPS, stop_ids=(), **usual)
  place = np.array(out.tokens) @ len(P) ** np.arange(STEPS)[::-1]
  statistic, freedom = chi_square(place, texts((1 - coin) * P + coin * CUT, 0, STEPS))
  assert freedom > 20
  return statistic / chi_square_limit(freedom), np.array(out.accepted)


@pytest.mark.parametrize("name", CASES)
def test_texts_have_the_probabilities_of_the_chain(name):
  ratio, kept = drawn(name)
  assert ratio < 1
  if name == "itself, with a coin":  # tossed once a token: q is p, and every draft is kept
    assert (kept == STEPS - 1).all()


@pytest.mark.slow
def test_the_chi_square_sees_one_key_for_two_draws(monkeypatch):
  """With the key that decided about a draft for the draw in its place, in a program of this test alone."""
  alike = lambda *given: (keys := draft_keys(*given)) and dataclasses.replace(keys, last=keys.keep)
  monkeypatch.setattr(speculative, "draft_keys", alike)
  ratio, _ = drawn("lookup", gamma=3)
  assert ratio > 1.5


def test_no_two_draws_have_one_key():
  """Of rows, tokens and kinds of draws; of the rounds of a row they are those of its tokens, whatever was accepted."""
  key_B = jax.random.split(jax.random.key(0), 3)
  words = lambda *given: np.stack([jax.random.key_data(x) for x in dataclasses.astuple(draft_keys(*given))])
  keys_4GBW = words(key_B, np.array([1, 1, 7], np.int32), 5)
  assert len({tuple(one) for one in keys_4GBW.reshape(-1, 2).tolist()}) == 4 * 5 * 3
  np.testing.assert_array_equal(words(key_B, np.array([3, 4, 8], np.int32), 1)[:, 0, 0], keys_4GBW[:, 2, 0])
