"""What `rope=` may be: tables of any fixed-frequency method in one structure, and no others in silence."""

import jax
import numpy as np
import pytest

from jaxllm.config import Layer, ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.nn import Context, Transformer, init_cache
from jaxllm.position import POSITIONS

ROPE = ModelConfig(
  vocab_size=32,
  embed_dim=16,
  num_layers=1,
  num_heads=2,
  num_kv_heads=2,
  head_dim=8,
  mlp_dim=16,
  layers=(Layer(POSITIONS["rope"](original_length=16)),),
)
DYNAMIC = ROPE.with_position("dynamic_ntk", factor=2.0)
RE = ROPE.with_position("rerope", window=4)


def trace(cfg, tables, T, context=None, capacity=None, **kwargs):
  """Nothing but the trace: the tables are traced too, so only what is static can be checked."""

  def call(tables):
    cache = None if capacity is None else init_cache(cfg, 1, capacity)
    tokens = np.zeros((1, T), np.int32)
    return Transformer(cfg).init_with_output(jax.random.key(0), tokens, context, cache, tables, **kwargs)[0][
      0
    ]

  return jax.eval_shape(call, tables)


@pytest.mark.core
def test_tables_of_fixed_frequencies_have_one_structure():
  structures = {
    jax.tree.structure(cfg.rope_tables(seq_len=64))
    for cfg in (
      ROPE,
      DYNAMIC,
      *(ROPE.with_position(name, factor=4.0) for name in ("pi", "ntk", "ntk_mixed", "yarn")),
    )
  }
  assert len(structures) == 1


def test_tables_that_end_before_the_call_are_refused():
  for T, capacity, longest in ((64, None, "the tokens given"), (4, 64, "the capacity of the cache")):
    trace(DYNAMIC, DYNAMIC.rope_tables(max_len=64), T, capacity=capacity)
    for max_len, reach in ((63, 63), (10, 16)):  # a single row serves the trained length too
      with pytest.raises(ConfigError, match=f"up to {reach} tokens, expected 64 .{longest}.*max_len=64"):
        trace(DYNAMIC, DYNAMIC.rope_tables(max_len=max_len), T, capacity=capacity)
  trace(DYNAMIC, DYNAMIC.rope_tables(seq_len=64), 80)  # pinned on purpose
  trace(DYNAMIC, DYNAMIC.rope_tables(max_len=20), 64, Context(pos=np.zeros((1, 64), np.int32)))


def test_tables_of_a_method_that_is_no_set_of_frequencies_are_refused():
  trace(RE, RE.rope_tables(), 8)
  trace(RE, ROPE.rope_tables(), 8)  # other frequencies are data
  for tables in (RE.rope_tables(), RE.rope_tables(seq_len=8)):
    with pytest.raises(ConfigError, match="table of ReRope, which does not run in a model of Rope"):
      trace(ROPE, tables, 8)


def test_logits_are_one_of_three_choices():
  for logits, shape in (("all", (1, 8, 32)), ("last", (1, 1, 32)), (None, (1, 8, 16))):
    assert trace(ROPE, ROPE.rope_tables(), 8, logits=logits).shape == shape
  for logits in ("lats", "", True):
    with pytest.raises(ConfigError, match="logits: found"):
      trace(ROPE, ROPE.rope_tables(), 8, logits=logits)
