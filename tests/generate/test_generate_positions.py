"""Greedy text is the argmax of full forward passes without a cache, for every position method."""

import pytest
from generation_table import about, measured
from method_cases import METHODS, NEW, assert_argmax, check_text, forward, joined, method_of

from jaxllm.generate.loop import generate
from jaxllm.nn import Transformer
from jaxllm.position import POSITIONS

core = pytest.mark.core


def test_every_method_is_here():
  names = [getattr(case, "values", case)[0] for case in METHODS]
  assert set(names) == set(POSITIONS)


@pytest.mark.parametrize(("name", "fields", "query_scale"), METHODS)
def test_greedy_is_the_argmax_of_full_forward_passes(deep, prompts, name, fields, query_scale):
  """Its log-probabilities are theirs."""
  model, params = deep
  row = name if query_scale is None else f"{name}, log-n"
  about("cache", row)
  method = method_of(model.cfg, name, fields, query_scale)
  error, text = check_text(model.cfg, method, params, prompts)
  assert min(len(set(new)) for new in text) >= 5
  measured("cache", row, text=error)


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
