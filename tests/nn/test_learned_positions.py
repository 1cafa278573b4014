"""Parameters of position methods: one set for all layers that share a method, bound outside the layers and the scan."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from model_cases import MODELS, B, Layer, T, params, position, tokens
from model_checks import full, relative_error

from jaxllm.errors import ConfigError
from jaxllm.nn import Transformer, init_cache
from jaxllm.position import POSITIONS
from jaxllm.tree import flatten, stack_layers, unstack_layers

LEARNED, T5, ALIBI = position("learned"), position("t5"), position("alibi")
OTHER_T5 = POSITIONS["t5"](4, 9)
MIXED = dataclasses.replace(
  MODELS["rope"], num_layers=4, layers=(Layer(ALIBI), Layer(T5, 9), Layer(LEARNED), Layer(OTHER_T5))
)
"""Two tables of biases and an embedding that one layer in four names."""


def shapes(cfg, **kwargs):
  init = lambda key: Transformer(cfg, **kwargs).init(key, tokens())["params"]
  return {path: leaf.shape for path, leaf in flatten(jax.eval_shape(init, jax.random.key(0))).items()}


@pytest.mark.core
def test_where_parameters_live():
  """positions/<i>/<name>, i among the distinct methods that have some; nothing in the layers, scanned or not."""
  expected = {"positions/0/table": (10, 4), "positions/1/table": (T + 8, 24), "positions/2/table": (4, 4)}
  assert MIXED.learned_positions == (T5, LEARNED, OTHER_T5)
  found = shapes(MIXED)
  assert {path: shape for path, shape in found.items() if path.startswith("positions")} == expected
  assert found == {path: leaf.shape for path, leaf in flatten(params(MIXED)).items()}
  assert {p: s for p, s in shapes(MIXED, scan=True).items() if p.startswith("positions")} == expected
  for name in ("learned", "t5"):  # three layers, one table
    assert [path for path in shapes(MODELS[name]) if "table" in path] == ["positions/0/table"]
  assert not [path for path in shapes(MODELS["rope"]) if "positions" in path]


def test_each_layer_has_its_own_table_and_embeddings_are_the_models():
  ids = tokens()
  found = full(MIXED, ids)
  assert relative_error(found, oracle.logits(MIXED, params(MIXED), ids)) <= 5e-6
  for i in range(3):  # each table matters
    changed = params(MIXED) | {
      "positions": params(MIXED)["positions"]
      | {str(i): {"table": np.float32(0.5) + params(MIXED)["positions"][str(i)]["table"] ** 2}}
    }
    assert relative_error(full(MIXED, ids, weights=changed), found) > 0.01


def test_scan_is_unrolled_with_gradients_of_the_tables():
  ids, weights = tokens(), params(MIXED)

  def run(scan):
    def loss(weights, ids):
      logits = Transformer(MIXED, scan=scan).apply({"params": weights}, ids)[0]
      return jnp.mean(jax.nn.logsumexp(logits, -1) ** 2)

    return jax.jit(jax.value_and_grad(loss))

  unrolled, gradient = run(False)(weights, ids)
  scanned, found = run(True)(stack_layers(weights, 4), ids)
  assert relative_error(scanned, unrolled) <= 1e-6
  expected, found = flatten(gradient), flatten(unstack_layers(found))
  assert expected.keys() == found.keys()
  for path in expected:
    assert relative_error(found[path], expected[path]) <= 1e-5, path
    assert np.any(expected[path]), path


def test_initial_scales():
  cfg = dataclasses.replace(
    MIXED, layers=(Layer(POSITIONS["learned"](400)), Layer(POSITIONS["t5"](400, 401)))
  )
  init = jax.jit(lambda key: Transformer(cfg).init(key, tokens())["params"]["positions"])
  found = init(jax.random.key(0, impl="rbg"))
  for i, expected in (("0", 0.02), ("1", cfg.embed_dim**-0.5)):
    table = found[i]["table"]
    assert abs(np.std(table) / expected - 1) < 5 * (2 * table.size) ** -0.5  # five standard errors


@pytest.mark.core
def test_more_tokens_than_positions_are_refused():
  """On the host, wherever the length is known: a call, a cache."""
  cfg = MODELS["learned"]
  limit = cfg.length_limit
  long = np.zeros((B, limit + 1), np.int32)
  apply = lambda ids: jax.eval_shape(lambda p: Transformer(cfg).apply({"params": p}, ids)[0], params(cfg))
  assert apply(long[:, :-1]).shape == (B, limit, cfg.vocab_size)
  with pytest.raises(ConfigError, match=f"tokens: found {limit + 1}, expected at most max_length = {limit}"):
    apply(long)
  assert init_cache(cfg, B, limit).capacity == limit
  with pytest.raises(ConfigError, match=f"cache capacity: found {limit + 1}, expected at most max_length"):
    init_cache(cfg, B, limit + 1)
  assert MODELS["sinusoidal"].length_limit is None
  two = dataclasses.replace(cfg, num_layers=2, layers=(Layer(LEARNED), Layer(POSITIONS["learned"](9))))
  assert two.length_limit == 9
