"""Grouped-query attention is multi-head attention with repeated key and value heads."""

import dataclasses

import numpy as np
import pytest
from model_cases import MODELS, params, table_of_models, tokens
from model_checks import full, relative_error

from jaxllm.tree import flatten, unflatten


def repeat_heads(cfg, weights):
  """The weights of the same model with a key and value head for every query head."""

  def repeated(path, x):
    if path.split("/")[-2:] not in (["k", "w"], ["v", "w"]):
      return x
    heads = x.reshape(cfg.embed_dim, cfg.num_kv_heads, cfg.head_dim)
    return np.repeat(heads, cfg.num_heads // cfg.num_kv_heads, axis=1).reshape(cfg.embed_dim, -1)

  return unflatten({path: repeated(path, x) for path, x in flatten(weights).items()})


@pytest.mark.parametrize("num_kv_heads", [pytest.param(2, marks=pytest.mark.core), 1])
@table_of_models(["rope", "alibi"], core="rope")
def test_grouped_heads_are_repeated_heads(name, num_kv_heads):
  grouped = dataclasses.replace(MODELS[name], num_kv_heads=num_kv_heads)
  every = dataclasses.replace(grouped, num_kv_heads=grouped.num_heads)
  weights = params(grouped)
  found = full(grouped, tokens())
  assert relative_error(found, full(every, tokens(), weights=repeat_heads(grouped, weights))) <= 2e-6


def test_the_order_of_heads_is_a_convention():
  """Permuting the query heads of one group, with their rows of o, changes nothing."""
  cfg = MODELS["rope"]
  weights = params(cfg)
  heads = np.arange(cfg.num_heads).reshape(cfg.num_kv_heads, -1)[:, ::-1].ravel()
  columns = (heads[:, None] * cfg.head_dim + np.arange(cfg.head_dim)).ravel()
  flat = flatten(weights)
  moved = unflatten(
    {
      p: x[:, columns] if p.endswith("q/w") else x[columns] if p.endswith("o/w") else x
      for p, x in flat.items()
    }
  )
  assert relative_error(full(cfg, tokens(), weights=moved), full(cfg, tokens())) <= 2e-6
