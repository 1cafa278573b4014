"""Mixtures of experts: products by groups, routing, and the layer against a loop over tokens and experts in float64."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from model_checks import relative_error

from jaxllm.activation import ClampedGlu, Glu, Mlp, Xielu
from jaxllm.config import Layer, ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.experts import Moe, SoftmaxRouter
from jaxllm.leaf import Matrix
from jaxllm.ops.experts import experts
from jaxllm.ops.grouped import _native, group, grouped_dot

SIZES = ((3, 0, 70, 1, 0), (0, 0, 5, 0, 0), (32, 33, 31, 0, 64), (1, 1, 1, 1, 1))
"""Rows of each group: none, one, blocks of 32 that are full and that are not."""


def operands(sizes, D=6, F=10):
  rng = np.random.default_rng(len(sizes) + sum(sizes))
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  return draw(sum(sizes), D), draw(len(sizes), D, F), np.array(sizes, np.int32)


def by_hand(x, w, sizes):
  """Each row with its own matrix, float64."""
  owner = np.repeat(np.arange(len(sizes)), sizes)
  return np.einsum("RD,RDF->RF", x.astype(np.float64), w.astype(np.float64)[owner])


@pytest.mark.core
@pytest.mark.parametrize("sizes", SIZES)
def test_each_row_with_the_matrix_of_its_group(sizes):
  x, w, counts = operands(sizes)
  stored = Matrix(jnp.asarray(np.ascontiguousarray(w.swapaxes(1, 2))))
  for weight in (w, stored):
    assert relative_error(jax.jit(grouped_dot)(x, weight, counts), by_hand(x, w, sizes)) <= 1e-6
  assert relative_error(_native(jnp.asarray(x), jnp.asarray(w), counts, "io"), by_hand(x, w, sizes)) <= 1e-6
  turned = _native(jnp.asarray(x), stored.value, counts, "oi")
  assert relative_error(turned, by_hand(x, w, sizes)) <= 1e-6


@pytest.mark.parametrize("stored", ["io", "oi"])
@pytest.mark.parametrize("sizes", SIZES)
def test_gradients_of_the_loops_are_those_of_plain_products(sizes, stored):
  x, w, counts = operands(sizes)
  owner = np.repeat(np.arange(len(sizes)), sizes)
  value = w if stored == "io" else np.ascontiguousarray(w.swapaxes(1, 2))
  plain = lambda x, value: jnp.einsum("RD,RDF->RF" if stored == "io" else "RD,RFD->RF", x, value[owner])
  loops = lambda x, value: grouped_dot(x, Matrix(value, stored), counts)
  loss = lambda f: jax.jit(jax.grad(lambda *args: jnp.sum(jnp.sin(f(*args))), argnums=(0, 1)))(x, value)
  for found, expected in zip(loss(loops), loss(plain), strict=True):
    assert relative_error(found, expected) <= 1e-5


def test_rows_are_sorted_and_put_back():
  index = np.array([2, 0, 2, 1, 0, 2], np.int32)
  order, inverse, sizes = group(index, 4)
  assert order.tolist() == [1, 4, 3, 0, 2, 5] and sizes.tolist() == [2, 1, 3, 0]
  np.testing.assert_array_equal(np.arange(6)[order][inverse], np.arange(6))


@pytest.mark.parametrize("renormalize", [True, False])
def test_weights_of_experts(renormalize):
  """Those of the softmax over all, in float64; of equal logits the first."""
  logits = np.random.default_rng(0).standard_normal((50, 7)).astype(np.float32)
  logits[0] = 0.0
  weights, index = SoftmaxRouter(renormalize)(jnp.asarray(logits), 3)
  p = np.exp(logits.astype(np.float64))
  p /= p.sum(axis=1, keepdims=True)
  best = np.argsort(-p, axis=1, kind="stable")[:, :3]
  np.testing.assert_array_equal(index, best)
  expected = np.take_along_axis(p, best, 1)
  expected = expected / expected.sum(axis=1, keepdims=True) if renormalize else expected
  np.testing.assert_allclose(weights, expected, rtol=1e-6)


MIXTURES = {
  "softmax": Moe(Glu(), 5, 2),
  "softmax over all": Moe(Glu("gelu"), 6, 3, SoftmaxRouter(False)),
  "clamped": Moe(ClampedGlu(limit=1.0), 4, 4),
  "one": Moe(Mlp("relu2"), 3, 1),
}
D, F, C = 8, 12, 90


@functools.cache
def parameters(name):
  moe = MIXTURES[name]
  rng = np.random.default_rng(3)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  shapes = dict.fromkeys(moe.expert.inputs, (D, F)) | {"down": (F, D)}
  E = moe.num_experts
  parts = {one: {"w": draw(E, *shape), "bias": draw(E, shape[1])} for one, shape in shapes.items()}
  return draw(C, D), {"router": {"w": draw(D, E), "bias": draw(E)}, **parts}


@functools.cache
def program(name):
  moe = MIXTURES[name]
  route = lambda logits: moe.router(logits, moe.top_k)
  return jax.jit(lambda x, p: experts(x, p, route, lambda *inputs: moe.expert({}, *inputs)))


def nested(p):
  return {"router": p["router"], "experts": {name: part for name, part in p.items() if name != "router"}}


@pytest.mark.parametrize("name", MIXTURES)
def test_the_layer_is_a_loop_over_tokens_and_experts(name):
  x, p = parameters(name)
  expected = oracle.mixture(MIXTURES[name], oracle.float64(nested(p)), x.astype(np.float64))
  assert relative_error(program(name)(x, p), expected) <= 1e-6


@pytest.mark.parametrize("name", MIXTURES)
def test_the_order_of_experts_changes_nothing(name):
  x, p = parameters(name)
  order = np.random.default_rng(1).permutation(MIXTURES[name].num_experts)
  moved = {
    one: {kind: leaf[order] for kind, leaf in part.items()} for one, part in p.items() if one != "router"
  }
  moved["router"] = {kind: leaf[..., order] for kind, leaf in p["router"].items()}
  assert relative_error(program(name)(x, moved), program(name)(x, p)) <= 1e-6


@pytest.mark.parametrize("name", MIXTURES)
def test_a_token_does_not_depend_on_the_others(name):
  """Bit for bit, whatever they are; were all of them with one expert, none would be dropped."""
  x, p = parameters(name)
  whole = np.asarray(program(name)(x, p))
  others = np.repeat(x[:1] * 7, C, axis=0)
  others[10] = x[10]
  others[20:30] = np.nan  # padding may be anything
  np.testing.assert_array_equal(np.asarray(program(name)(others, p))[10], whole[10])


@pytest.mark.parametrize("name", ["softmax", "one"])
def test_no_tokens_are_no_outputs_and_no_gradients(name):
  x, p = parameters(name)
  assert program(name)(x[:0], p).shape == (0, D)
  grads = jax.grad(lambda x, p: jnp.sum(program(name)(x, p)), argnums=(0, 1))(x[:0], p)
  assert grads[0].shape == (0, D)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", MIXTURES)
def test_gradients_go_through_the_router_and_the_experts(name):
  """Against finite differences of the loop in float64, in a direction of all parameters."""
  x, p = parameters(name)
  loss = lambda x, p: jnp.sum(jnp.sin(program(name)(x, p)))
  grads = jax.grad(loss, argnums=(0, 1))(x, p)
  direction = jax.tree.map(lambda a: np.random.default_rng(a.size).standard_normal(a.shape), (x, p))
  wide = lambda step: jax.tree.map(lambda a, d: a.astype(np.float64) + step * d, (x, p), direction)

  def by_loop(step):
    moved_x, moved_p = wide(step)
    return np.sum(np.sin(oracle.mixture(MIXTURES[name], nested(moved_p), moved_x)))

  step = 1e-7  # so small that no token changes its experts
  slope = (by_loop(step) - by_loop(-step)) / (2 * step)
  pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True)
  found = sum(float(np.sum(np.asarray(g, np.float64) * d)) for g, d in pairs)
  assert abs(found - slope) <= 1e-4 * max(abs(slope), 1.0), (found, slope)


BAD = [
  (dict(num_experts=0), "Moe.num_experts: found 0, expected an integer of at least 1"),
  (dict(num_experts=True), "Moe.num_experts: found True"),
  (dict(num_experts=2, top_k=3), "Moe.top_k: found 3, expected at most num_experts = 2"),
  (dict(expert=Xielu()), "Moe.expert: found Xielu"),
  (dict(router="softmax"), "Moe.router: found 'softmax', expected one of SoftmaxRouter"),
  (dict(mlp_dim=-1), "Moe.mlp_dim: found -1"),
]


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_bad_mixtures(fields, message):
  with pytest.raises(ConfigError, match=message):
    Moe(**fields)


@pytest.mark.parametrize("name", MIXTURES)
def test_json_there_and_back(name):
  shape = dict(vocab_size=31, embed_dim=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=12)
  cfg = ModelConfig(**shape, mlp=MIXTURES[name], layers=(Layer(), Layer(mlp=Glu())))
  assert ModelConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
