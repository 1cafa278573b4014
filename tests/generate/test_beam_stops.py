"""Beam search in a Markov chain beside its definition, where many of the best continuations end."""

import numpy as np
import pytest
from markov_case import markov

from jaxllm.generate import beam


def reference_beams(logs_VV, start, K, stops, length_penalty, steps):
  """Beam search in a Markov chain that "never" stops early, of all continuations at each step: (scores, texts)."""
  unfinished, ended = [(0.0, ())], []
  for step in range(1, steps + 1):
    found = [
      (score + logs_VV[(start, *text)[-1], v], (*text, v))
      for score, text in unfinished
      for v in range(len(logs_VV))
    ]
    found = sorted(found, reverse=True)
    ends = [text[-1] in stops or step == steps for _, text in found]
    new = [
      (score / step**length_penalty, text) for (score, text), end in zip(found[:K], ends, strict=False) if end
    ]
    ended = sorted(ended + new, reverse=True)[:K]
    unfinished = [one for one, end in zip(found, ends, strict=True) if one[1][-1] not in stops][:K]
    if len(ended) == K and unfinished[0][0] / steps**length_penalty <= ended[-1][0]:
      break
  return ended


@pytest.mark.parametrize("stops", [(1, 4), (0, 1, 4)])
def test_as_many_beams_go_on_however_many_could_end(stops):
  """Each stop id is likelier than all other ids, so that every beam's continuations by them come before those that go on."""
  logits_VV = np.random.default_rng(0).uniform(0, 0.3, (7, 7))
  logits_VV[:, stops] += 1
  logs_VV = logits_VV - np.log(np.exp(logits_VV).sum(1, keepdims=True))
  usual = dict(num_beams=3, num_return=3, length_penalty=2.0, early_stopping="never")
  usual |= dict(max_new_tokens=5, stop_ids=stops)
  out = beam.generate(*markov(logits_VV), [[2], [6, 3]], **usual)
  for start, texts, scores in zip((2, 3), out.tokens, out.scores, strict=True):
    expected = reference_beams(logs_VV, start, 3, stops, 2.0, 5)
    assert [tuple(text) for text in texts] == [text for _, text in expected]
    np.testing.assert_allclose(scores, [score for score, _ in expected], rtol=1e-4)
  assert max(len(text) for texts in out.tokens for text in texts) == 5
