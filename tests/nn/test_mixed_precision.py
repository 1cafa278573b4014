"""A model in half types keeps positions apart: integers and angles are never in a half type, shown on the traced program.

The bug this is about rounds positions to the type of the model, in which many of them are one number.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import MODELS, Layer, params, position, tables, tokens
from model_checks import positions
from test_shift import RoundedRope

from jaxllm.activation import Xielu
from jaxllm.nn import Context, Transformer
from jaxllm.norm import LayerNorm, QkNorm, RMSNorm
from jaxllm.position import POSITIONS
from jaxllm.position.absolute import Learned
from jaxllm.position.phase import cos_sin, words
from jaxllm.position.tables import make_table
from jaxllm.tree import flatten

HALF = (jnp.bfloat16, jnp.float16)
ROPE = POSITIONS["rope"]()
INV_FREQ, _ = ROPE.frequencies(64)


def equations(jaxpr):
  """Every equation of a traced program, those of inner programs too."""
  for equation in jaxpr.eqns:
    yield equation
    for inner in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
    ):
      if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
        yield from equations(getattr(inner, "jaxpr", inner))


def trace(cfg):
  """(types of what cosines and sines are taken of, half types that integers were made)."""
  run = lambda p, ids, pos, rope: Transformer(cfg).apply({"params": p}, ids, Context(pos=pos), rope=rope)
  jaxpr = jax.make_jaxpr(run)(params(cfg), tokens(), positions(), tables(cfg)).jaxpr
  angles, rounded = [], []
  for equation in equations(jaxpr):
    kinds = [var.aval.dtype for var in equation.invars]
    if equation.primitive.name in ("cos", "sin"):
      angles += kinds
    if equation.primitive.name == "convert_element_type" and jnp.issubdtype(kinds[0], jnp.integer):
      rounded += [equation.params["new_dtype"]] * (equation.params["new_dtype"] in HALF)
  return angles, rounded


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
  "name",
  [pytest.param(n, marks=[pytest.mark.core] * (n == "rope")) for n in ("rope", "yarn", "alibi", "rerope")],
)
def test_angles_are_float32_and_positions_never_half(name, dtype):
  angles, rounded = trace(dataclasses.replace(MODELS[name], dtype=dtype))
  assert set(angles) == ({np.dtype("float32")} if name != "alibi" else set())
  assert not rounded


def test_rounded_positions_show_in_the_trace():
  """The negative control."""
  layers = tuple(Layer(RoundedRope(base=100.0), layer.window) for layer in MODELS["rope"].layers)
  _, rounded = trace(dataclasses.replace(MODELS["rope"], layers=layers, dtype="bfloat16"))
  assert rounded


@pytest.mark.parametrize(
  ("dtype", "length", "distinct"),
  [("bfloat16", 2048, 641), ("bfloat16", 4096, 769), ("float16", 4096, 3073)],
)
def test_how_many_positions_a_half_type_has(dtype, length, distinct):
  """The published counts, of rotations by positions in a half type; ours are all different."""
  pos, table = np.arange(length, dtype=np.int32), words(INV_FREQ)
  count = lambda pos: len(np.unique(np.concatenate(cos_sin(pos, *table), axis=1), axis=0))
  assert count(jnp.asarray(pos, dtype).astype(jnp.int32)) == distinct
  assert count(pos) == length


# every kind of leaf at once: tables, biases, gains, sinks, the numbers of xIELU
LEAVES = dict(
  num_layers=2,
  layers=(Layer(position("learned")), Layer(position("t5"))),
  norm=LayerNorm(scale="1+w"),
  mlp=Xielu(),
  biases=("q", "k", "v", "o", "up", "down", "head"),
  qk_norm=QkNorm(RMSNorm(multiply_in="input"), "each"),
  attention_sinks=True,
  embed_norm=True,
  embed_scale=3.0,
)


MOVES = {"gather", "transpose", "reshape", "broadcast_in_dim", "slice", "squeeze", "copy", "select_n"}


def computed_in(cfg, kind):
  """The operations of a float32 model, other than casts and moves, that have an operand of the type of its leaves."""
  held = jax.tree.map(lambda x: jnp.asarray(x, kind), params(cfg))
  run = lambda p: Transformer(cfg).apply({"params": p}, tokens(), Context(pos=positions()))[0]
  found = set()
  for equation in equations(jax.make_jaxpr(run)(held).jaxpr):
    is_program = any(
      hasattr(x, "eqns") or hasattr(x, "jaxpr") for x in jax.tree.leaves(list(equation.params.values()))
    )
    if not is_program and any(getattr(x.aval, "dtype", None) == kind for x in equation.invars):
      found.add(equation.primitive.name)
  return found - MOVES - {"convert_element_type"}


@pytest.mark.parametrize("half", HALF)
def test_nothing_is_computed_in_the_type_of_a_leaf(half):
  """Every kind of leaf is cast before it is used, so a checkpoint in a half type computes as the same numbers in float32."""
  cfg = dataclasses.replace(MODELS["rope"], **LEAVES)
  kinds = {path.split("/")[-1] for path in flatten(params(cfg))}
  assert kinds == {"embed", "table", "w", "bias", "scale", "sinks", "alpha_p", "alpha_n", "head", "head_bias"}
  assert not computed_in(cfg, half)


def test_a_sum_in_the_type_of_a_leaf_shows_in_the_trace(monkeypatch):
  """The negative control: positions added to embeddings as they are."""
  embed = lambda self, x, pos, p: x + (p["table"][pos] + p["table"][pos]).astype(x.dtype)
  monkeypatch.setattr(Learned, "embed", embed)
  assert computed_in(dataclasses.replace(MODELS["rope"], **LEAVES), jnp.bfloat16) == {"add"}


@pytest.mark.core
def test_turned_bfloat16_queries_are_rounded_once():
  """Of (1, 0), which gives cos and sin: half a unit in the last place of 1; by rounded angles the error is 2."""
  pos = np.arange(4096, dtype=np.int32)[None]
  q = np.zeros((1, 4096, 1, 64), np.float32)
  q[..., :32] = 1
  found = ROPE.rotate_q(jnp.asarray(q, jnp.bfloat16), pos, make_table([(INV_FREQ, 1.0)]))[0, :, 0]
  assert found.dtype == jnp.bfloat16
  angle = pos[0][:, None] * INV_FREQ
  expected = np.concatenate([np.cos(angle), np.sin(angle)], axis=-1)
  assert np.abs(np.asarray(found, np.float64) - expected).max() <= 2.0**-9 + 1e-6
  naive = jnp.asarray(pos[0], jnp.bfloat16)[:, None] * jnp.asarray(INV_FREQ, jnp.bfloat16)[None]
  assert np.abs(np.asarray(jnp.cos(naive), np.float64) - np.cos(angle)).max() > 1.9


def test_casting_a_tree_to_bfloat16_leaves_frequencies_alone():
  """They are integers, and no parameters: what casts weights cannot reach them."""
  table = make_table([(INV_FREQ, 1.0)])
  cast = jax.tree.map(
    lambda x: jnp.asarray(x, jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x, table
  )
  pos = np.arange(0, 10**6, 997, dtype=np.int32)
  for one, other in zip(cast.cos_sin(pos), table.cos_sin(pos), strict=True):
    np.testing.assert_array_equal(one, other)
