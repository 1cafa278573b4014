"""Greedy text is that of transformers, token for token, on twelve families; near-ties are told apart and counted.

`pytest -m "" tests/hf/test_greedy_parity.py -rP` prints the table: tokens compared, distinct ones a row, near-ties.
"""

import functools

import numpy as np
import pytest
import theirs
from family_cases import built, from_tensors, settings, shapes

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
)
FAST = ("llama", "gemma2", "bloom")
PROMPTS = (5, 12)
"""Tokens of the prompts of the two rows."""
LAYERS = {"bloom": 8.0}
"""By how much the layers are larger, where it is not 2.5; the norm of its embedding undoes what is done there."""
NEAR = 1e-4
"""Two logits this near, by the largest, are a near-tie: rounding decides which is taken."""


def prompts(vocab_size):
  rng = np.random.default_rng(1)
  return [rng.integers(3, vocab_size, n).tolist() for n in PROMPTS]


@functools.cache
def varied(row):
  """(tensors, parameters) of a row whose layers outweigh the embedding: else the same token comes again and again."""
  model = built(row)
  tensors = dict(model.tensors)
  for name, path, shape in shapes(model.family, model.cfg):
    if path == "embed":
      tensors[name] = 0.2 * tensors[name]
    elif len(shape) > 1 and path != "head":
      tensors[name] = LAYERS.get(row, 2.5) * tensors[name]
  return tensors, from_tensors(model.family, model.cfg, tensors)


def next_logits(model, ids):
  """transformers' float32 logits after the ids, with no cache."""
  with torch.no_grad():
    return model(torch.tensor([ids])).logits[0, -1].double().numpy()


def compare(row, new):
  """(tokens compared, least number of distinct ones a row, near-ties) of two rows of `new` tokens; raises where texts part."""
  tensors, params = varied(row)
  cfg, ties, distinct = built(row).cfg, 0, []
  ours = Transformer(cfg)
  model = theirs.model(settings(row), tensors)
  model.generation_config.eos_token_id = None
  for prompt in prompts(cfg.vocab_size):
    text = []
    while len(text) < new:
      start = prompt + text
      with torch.no_grad():
        ids = torch.tensor([start])
        out = model.generate(
          ids,
          attention_mask=torch.ones_like(ids),
          max_new_tokens=new - len(text),
          do_sample=False,
          pad_token_id=0,
        )
      expected = out[0, len(start) :].tolist()
      found = generate(ours, params, [start], max_new_tokens=new - len(text), stop_ids=()).tokens[0]
      same = next((i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b), len(expected))
      text += expected[:same]
      if same < len(expected):  # the texts part: only a near-tie is allowed, and theirs goes on
        logits = next_logits(model, prompt + text)
        gap = abs(logits[found[same]] - logits[expected[same]]) / np.max(np.abs(logits))
        assert gap <= NEAR, (
          f"{row}: token {len(text)}: {found[same]} for {expected[same]}, logits {gap:.1e} apart"
        )
        text.append(expected[same])
        ties += 1
    distinct.append(len(set(text)))
  return new * len(PROMPTS), min(distinct), ties


def check(row, new):
  tokens, distinct, ties = compare(row, new)
  print(f"{row}: {tokens} tokens equal but for {ties} near-ties, at least {distinct} distinct a row")
  assert distinct >= 5
  assert ties <= 1 + tokens // 64


@pytest.mark.parametrize("row", FAST)
def test_thirty_two_tokens(row):
  check(row, 32)


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_a_hundred_and_twenty_eight_tokens(row):
  check(row, 128)
