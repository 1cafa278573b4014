"""What a long forward pass holds at once: the compiler's own count of temporary bytes, for tiles linear in the length."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest

from jaxllm.config import Layer, ModelConfig
from jaxllm.nn import Transformer
from jaxllm.nn.transformer import head
from jaxllm.ops.attention import Plain
from jaxllm.ops.blockwise import Blockwise
from jaxllm.ops.losses import cross_entropy
from jaxllm.position import POSITIONS

SWEEP = dict(
  vocab_size=256, embed_dim=128, num_layers=3, num_heads=2, num_kv_heads=2, head_dim=64, mlp_dim=352
)
OWN = dict(original_length=128, max_length=1 << 15, factor=8.0)
OWN |= dict(short_factor=(1.0,) * 32, long_factor=(2.0,) * 32)


@functools.cache
def temporary_bytes(name, core, length, layers=1):
  """Of losses of the sweep's model on `length` tokens, dynamic methods at one pinned length; nothing is run."""
  fields = {field: value for field, value in OWN.items() if field in POSITIONS[name].__dataclass_fields__}
  cfg = ModelConfig(
    **SWEEP | dict(num_layers=layers), layers=(Layer(POSITIONS[name](**fields)),), attention=core
  )
  model, tables = Transformer(cfg), cfg.rope_tables(seq_len=length)

  def losses(params, ids):
    hidden, _ = model.apply({"params": params}, ids, rope=tables, logits=None)
    return cross_entropy(hidden, head(cfg, params), ids)[0]

  ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
  params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
  return jax.jit(losses).lower(params, ids).compile().memory_analysis().temp_size_in_bytes


def test_the_sweeps_model_at_32768_tokens():
  """Under 2 GB, and linear: twice the length takes at most 2.1 times as much."""
  sizes = [temporary_bytes("rope", Blockwise(), length, layers=3) for length in (8192, 16384, 32768)]
  assert sizes[2] < 2e9
  assert all(b <= 2.1 * a for a, b in itertools.pairwise(sizes)), sizes


NAMES = ["alibi", "t5", "rope", "rerope"]  # a bias, one that is looked up, none, and two scores a pair


@pytest.mark.parametrize(
  "name",
  [*NAMES, *(pytest.param(n, marks=pytest.mark.slow) for n in POSITIONS if n not in NAMES)],
)
def test_no_method_holds_a_square_array(name):
  """16384 x 16384 float32 of one head are 1 GB; tiles hold less than a tenth of that."""
  assert temporary_bytes(name, Blockwise(), 16384) < 0.1 * 4 * 16384**2


def test_all_scores_at_once_are_square():
  """The count sees what it is for: without tiles there are at least the scores of both heads."""
  assert temporary_bytes("alibi", Plain(), 4096) > 2 * 4 * 4096**2
