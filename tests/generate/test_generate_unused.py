"""What nobody reads changes no text: slots of the cache that hold no token, and the ids of padding."""

import dataclasses

import pytest
from cache_cases import CACHES, spoiled
from generation_table import same_text

from jaxllm.generate import loop, request
from jaxllm.nn import Transformer

NEW = 24


@pytest.fixture(scope="module")
def windowed(shallow):
  """A model with a window of 6, past which a ring comes round."""
  model, params = shallow
  (layer,) = model.cfg.layers
  return Transformer(dataclasses.replace(model.cfg, layers=(dataclasses.replace(layer, window=6),))), params


DEFAULT = {"ring": [pytest.mark.core], "int4": []}


@pytest.mark.parametrize(
  "kind", [pytest.param(kind, marks=DEFAULT.get(kind, [pytest.mark.slow])) for kind in CACHES]
)
def test_nan_in_unused_slots_and_other_padding_change_no_token(shallow, windowed, prompts, monkeypatch, kind):
  """In every chunk of decoding, in every slot that holds no token yet or any more; log-probabilities to the last bit."""
  model = shallow if kind == "full" else windowed
  text = lambda: loop.generate(
    *model, prompts, max_new_tokens=NEW, stop_ids=(), chunk=5, logprobs=0, **CACHES[kind].arguments
  )
  usual, decode, padded, seen = text(), loop.decode, request.padded, []

  def poisoned(*args):
    *before, state, chunk = args
    cache = spoiled(state.cache)
    seen.append(cache)
    return decode(*before, dataclasses.replace(state, cache=cache), chunk)

  def otherwise(*args):
    tokens_BT, length_B = padded(*args)
    for tokens, length in zip(tokens_BT, length_B, strict=True):
      tokens[length:] = 33
    return tokens_BT, length_B

  monkeypatch.setattr(loop, "decode", poisoned)
  monkeypatch.setattr(request, "padded", otherwise)
  found = text()
  assert found == usual
  same_text(f"NaN in unused slots, ids of padding: {kind}", found.tokens, usual.tokens)
  assert len(seen) == 5 and min(len(set(new)) for new in usual.tokens) >= 5
  assert len({slots.call for slots in seen[0].slots} - {None}) == (kind != "full")
