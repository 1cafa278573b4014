"""Greedy text is that of transformers, token for token; near-ties are told apart and counted.

Both sides read the same directories, which hf.save wrote.  `pytest -m "" tests/hf/test_greedy_parity.py --generation` prints
the table: tokens compared, distinct ones a row, near-ties.
"""

import sys

import numpy as np
import pytest
import theirs
from generation_table import about, measured
from varied import opened, saved

from jaxllm.generate.loop import generate
from jaxllm.nn import Transformer

torch = theirs.torch
ROWS = (
  "llama",
  "mistral",
  "qwen3",
  "gemma2",
  "glm4",
  "gpt2",
  "gpt_neox",
  "bloom",
  "mpt",
  "falcon",
  "cohere2",
  "mixtral",
  "qwen2",
  "gptj",
  "falcon, RW form",
)
FAST = ("llama", "gemma2", "bloom")
PROMPTS = (5, 12)
"""Tokens of the prompts of the two rows."""
NEAR = 1e-4
"""Two logits this near each other, relative to the larger, are a near-tie: rounding decides which is taken."""


def prompts(vocab_size):
  rng = np.random.default_rng(1)
  return [rng.integers(3, vocab_size, n).tolist() for n in PROMPTS]


def gaps(model, params, their_model, ids, pair):
  """How near two tokens' logits are after the ids, with no cache, on either side."""
  with torch.no_grad():
    their_logits = their_model(torch.tensor([ids]), use_cache=False).logits[0, -1].double().numpy()
  logits, _ = model.apply({"params": params}, np.array([ids], np.int32), logits="last")
  for side in (np.asarray(logits[0, 0], np.float64), their_logits):
    one, other = side[list(pair)]
    yield abs(one - other) / max(abs(one), abs(other))


def compare(row, new, directory):
  """(least number of distinct tokens a row, the gap of each near-tie) of two rows of `new` tokens; raises where texts part.

  After a near-tie the text goes on with transformers' token.
  """
  cfg, params = saved(row, directory)
  model, their_model = Transformer(cfg), opened(row, directory)
  ties, distinct = [], []
  for prompt in prompts(cfg.vocab_size):
    text = []
    while len(text) < new:
      start = prompt + text
      ids = torch.tensor([start])
      usual = dict(attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0)
      with torch.no_grad():
        out = their_model.generate(ids, max_new_tokens=new - len(text), **usual)
      expected = out[0, len(start) :].tolist()
      found = generate(model, params, [start], max_new_tokens=new - len(text), stop_ids=()).tokens[0]
      same = next((i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b), len(expected))
      text += expected[:same]
      if same < len(expected):
        pair = found[same], expected[same]
        gap = max(gaps(model, params, their_model, prompt + text, pair))
        assert gap <= NEAR, f"{row}: token {len(text)}: {pair[0]} for {pair[1]}, logits {gap:.1e} apart"
        text.append(expected[same])
        ties.append(gap)
    distinct.append(len(set(text)))
  return min(distinct), ties


def check(row, new, directory):
  about("greedy", f"{row}, {new} new")
  distinct, ties = compare(row, new, directory)
  tokens = new * len(PROMPTS)
  assert distinct >= 5
  assert len(ties) <= 1 + tokens // 64
  numbers = dict(tokens_compared=tokens, distinct_a_row=distinct, near_ties=len(ties))
  measured("greedy", f"{row}, {new} new", **numbers, **({"widest_near_tie": max(ties)} if ties else {}))


@pytest.mark.parametrize("row", FAST)
def test_thirty_two_tokens(row, tmp_path):
  check(row, 32, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_a_hundred_and_twenty_eight_tokens(row, tmp_path):
  check(row, 128, tmp_path)


@pytest.mark.slow
def test_one_token_that_is_another_is_seen(monkeypatch, tmp_path):
  right = generate

  def wrong(*args, **kwargs):
    out = right(*args, **kwargs)
    out.tokens[0][-1] = (out.tokens[0][-1] + 1) % 199
    return out

  monkeypatch.setattr(sys.modules[__name__], "generate", wrong)
  with pytest.raises(AssertionError, match=r"llama: token 7: \d+ for \d+, logits"):
    compare("llama", 8, tmp_path)
