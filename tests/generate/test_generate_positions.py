"""Greedy text is the argmax of full forward passes without a cache, for every position method."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxllm.errors import ConfigError
from jaxllm.generate.loop import generate
from jaxllm.nn import Transformer
from jaxllm.position import POSITIONS, LogN, Rope

core = pytest.mark.core
NEW = (
  20  # prompts are 5, 11 and 16 tokens long, and the trained length 12: each row crosses it or starts beyond
)
METHODS = [  # name, fields, query scale
  ("nope", {}, None),
  ("sinusoidal", {"base": 2.0}, None),
  (
    "learned",
    {"max_length": 36},
    None,
  ),  # to the last row of the table: 16 tokens of a prompt and 20 new ones
  ("t5", {"max_distance": 20}, None),
  ("alibi", {}, None),
  pytest.param("rope", {}, None, marks=core),
  ("rope", {}, LogN(12)),
  ("pi", {"factor": 4.0}, None),
  ("ntk_old", {"factor": 4.0}, None),
  ("ntk", {"factor": 4.0}, None),
  ("ntk_fixed", {"factor": 4.0}, None),
  ("ntk_mixed", {"factor": 4.0}, None),
  ("dynamic_ntk", {"factor": 4.0}, None),
  pytest.param("yarn", {"factor": 4.0}, None, marks=core),
  ("ntk_by_parts", {"factor": 4.0}, None),
  ("llama3", {"factor": 4.0}, None),
  (
    "longrope",
    {"factor": 4.0, "short_factor": (1.0,) * 8, "long_factor": (1.0, 1.2, 1.5, 2, 2.5, 3, 3.5, 4)},
    None,
  ),
  ("proportional", {"proportion": 0.5}, None),
  ("xpos", {"scale_base": 16.0}, None),
  ("rerope", {"window": 5}, None),
  ("leaky_rerope", {"window": 5, "leak": 4.0}, None),
  ("inv_leaky_rerope", {"window": 5, "factor": 2.0}, None),
  ("self_extend", {"window": 5, "group": 3}, None),
  ("streaming", {"window": 5, "sinks": 2}, None),
  ("rope_2d", {}, None),
]


@functools.partial(jax.jit, static_argnames="model")
def forward(model, params, tokens_BT, rope):
  return model.apply({"params": params}, tokens_BT, rope=rope)[0]


def method_of(cfg, name, fields, query_scale=None):
  return dataclasses.replace(cfg.with_position(name, **fields), query_scale=query_scale)


def learned(cfg):
  """Tables for methods that the trained model has none for."""
  draw = lambda shape: np.random.default_rng(0).standard_normal(shape).astype(np.float32)
  tables = {
    str(i): {name: draw(shape) for name, (shape, _) in method.params(cfg).items()}
    for i, method in enumerate(cfg.learned_positions)
  }
  return {"positions": tables} if tables else {}


def assert_argmax(logits_BTV, prompts, tokens):
  """Each new token is the argmax after all before it: by induction the text of token-by-token full passes."""
  for row, (prompt, new) in enumerate(zip(prompts, tokens, strict=True)):
    start = len(prompt) - 1
    np.testing.assert_array_equal(new, np.argmax(logits_BTV[row, start : start + len(new)], axis=-1))


def joined(prompts, tokens):
  """Prompts with their new tokens, right-padded, [B, T]: padding comes after all that is compared."""
  rows = [[*prompt, *new] for prompt, new in zip(prompts, tokens, strict=True)]
  return np.array([row + [0] * (max(map(len, rows)) - len(row)) for row in rows], np.int32)


def test_every_method_is_here():
  names = [getattr(case, "values", case)[0] for case in METHODS]
  assert set(names) == set(POSITIONS)


@pytest.mark.parametrize(("name", "fields", "query_scale"), METHODS)
def test_greedy_is_the_argmax_of_full_forward_passes(deep, prompts, name, fields, query_scale):
  model, params = deep
  method = method_of(model.cfg, name, fields, query_scale)
  position = method.layers[0].position
  if isinstance(position, Rope) and not (
    position.needs_raw_keys or position.two_dimensional
  ):  # data for the program of the trained model
    rope = tables = method.rope_tables()
  else:
    model, rope, tables = Transformer(method), None, method.rope_tables(max_len=16 + NEW)
    params = params | learned(method)
  out = generate(model, params, prompts, max_new_tokens=NEW, rope=rope)
  assert out.reasons == ["length"] * 3 and [len(new) for new in out.tokens] == [NEW] * 3
  assert_argmax(forward(model, params, joined(prompts, out.tokens), tables), prompts, out.tokens)
  assert min(len(set(new)) for new in out.tokens) >= 5


def test_more_new_tokens_than_learned_positions_are_refused(deep, prompts):
  model, params = deep
  cfg = model.cfg.with_position("learned", max_length=20)
  with pytest.raises(
    ConfigError, match="longest prompt and max_new_tokens: found 21, expected at most max_length = 20"
  ):
    generate(Transformer(cfg), params | learned(cfg), prompts, max_new_tokens=5)
  out = generate(Transformer(cfg), params | learned(cfg), prompts, max_new_tokens=4)
  assert [len(new) for new in out.tokens] == [4] * 3


@core
def test_tables_equal_a_model_built_with_the_method_and_change_the_text(deep, prompts):
  model, params = deep
  method = method_of(model.cfg, "yarn", {"factor": 4.0})
  by_tables = generate(model, params, prompts, max_new_tokens=NEW, rope=method.rope_tables())
  assert generate(Transformer(method), params, prompts, max_new_tokens=NEW) == by_tables
  assert generate(model, params, prompts, max_new_tokens=NEW) != by_tables


@pytest.mark.parametrize("new", [pytest.param(112, marks=core), 150])
def test_the_cache_holds_a_full_bucket_and_all_new_tokens(shallow, prompts, new):
  # 16 + 112 slots are 128, and 150 need the next multiple: a write past the end would clamp to the last slot
  model, params = shallow
  out = generate(model, params, prompts, max_new_tokens=new)
  logits_BTV = forward(model, params, joined(prompts, out.tokens), model.cfg.rope_tables())
  assert [len(tokens) for tokens in out.tokens] == [new] * 3
  assert_argmax(logits_BTV, prompts, out.tokens)
