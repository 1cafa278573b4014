"""Matrices held as [out, in]: everything that takes parameters gives what it gives for [in, out]."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from model_cases import MODELS, params, tables, tokens
from model_checks import full, positions, relative_error

from jaxllm import tree
from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.leaf import Matrix, dense
from jaxllm.nn import Context, Transformer
from jaxllm.nn.transformer import head
from jaxllm.ops.einsum import einsum
from jaxllm.ops.losses import cross_entropy
from jaxllm.train.checkpoint import Checkpoints
from jaxllm.train.step import TrainConfig

W = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
X = np.random.default_rng(1).standard_normal((3, 6)).astype(np.float32)
ONE = dataclasses.replace(MODELS["rope"], num_layers=1, layers=MODELS["rope"].layers[:1])


def stored(params, layout="oi"):
  """The tree with every matrix in a `Matrix`; the embedding is a table of rows, and stays."""
  is_matrix = lambda path: path == "head" or path.endswith("/w")
  value = lambda w: np.ascontiguousarray(w.T) if layout == "oi" else w
  flat = tree.flatten(params)
  return tree.unflatten({p: Matrix(value(w), layout) if is_matrix(p) else w for p, w in flat.items()})


def logical(params):
  return {path: np.asarray(dense(w)) for path, w in tree.flatten(params).items()}


def assert_equal_trees(found, expected, rtol=0.0):
  found, expected = logical(found), logical(expected)
  assert found.keys() == expected.keys()
  for path in expected:
    size = np.abs(expected[path]).max()
    np.testing.assert_allclose(found[path], expected[path], rtol=0, atol=rtol * size, err_msg=path)


@pytest.mark.core
@pytest.mark.parametrize("layout", ["oi", "io"])
def test_a_matrix_quacks_like_its_logical_array(layout):
  held = np.stack([W, 2 * W])
  held = Matrix(held.swapaxes(1, 2).copy() if layout == "oi" else held, layout)
  assert held.shape == (2, 6, 4) and held.ndim == 3 and held.size == 48
  assert held.dtype == np.float32 and held.nbytes == 192
  half = held.astype(jnp.bfloat16)
  assert (half.shape, half.stored, half.nbytes) == (held.shape, layout, 96)
  np.testing.assert_array_equal(dense(held), [W, 2 * W])
  assert np.shares_memory(dense(held), held.value)
  assert dense(W) is W


@pytest.mark.parametrize("equation", ["CD,DF->CF", "...D,DF->...F"])
def test_einsum_takes_either_layout(equation):
  expected = einsum(equation, X, W)
  for held in (Matrix(np.ascontiguousarray(W.T)), Matrix(W, "io")):
    np.testing.assert_allclose(einsum(equation, X, held), expected, rtol=1e-6)
  many = einsum("LCD,LDF->LCF", np.stack([X, X]), Matrix(np.stack([W.T, 3 * W.T])))
  np.testing.assert_allclose(many, [expected, 3 * expected], rtol=1e-6)
  with pytest.raises(ValueError):
    einsum(equation, X, Matrix(W))


def test_no_transposed_copy_is_made():
  """The program multiplies the array it is given; the negative control transposes it."""
  operations = lambda f: {equation.primitive.name for equation in jax.make_jaxpr(f)(X, W.T).eqns}
  assert "transpose" not in operations(lambda x, value: einsum("CD,DF->CF", x, Matrix(value)))
  assert "transpose" in operations(lambda x, value: einsum("CD,DF->CF", x, value.T))


def test_another_layout_is_refused():
  with pytest.raises(ConfigError, match=r"Matrix.stored: found 'ohi', expected one of oi, io"):
    Matrix(W, "ohi")


@pytest.mark.core
@pytest.mark.parametrize("name", ["deepnorm"])
def test_logits_are_those_of_arrays(name):
  """With biases and a head of its own; every matrix of the model is a Matrix."""
  cfg, weights = MODELS[name], params(MODELS[name])
  held = stored(weights)
  assert sum(isinstance(w, Matrix) for w in tree.flatten(held).values()) == 1 + 7 * cfg.num_layers
  run = jax.jit(
    lambda p: Transformer(cfg).apply({"params": p}, tokens(), Context(pos=positions()), rope=tables(cfg))[0]
  )
  assert relative_error(run(held), full(cfg, tokens())) <= 1e-6


def loss_of(cfg, scan=False):
  def loss(p):
    hidden_BTD, _ = Transformer(cfg, scan=scan).apply({"params": p}, tokens(), logits=None)
    return jnp.mean(cross_entropy(hidden_BTD, head(cfg, p), tokens(1))[0])

  return loss


def test_gradients_and_scanned_layers_keep_the_layout():
  """The gradient of a Matrix is one, through a scan too, and stacked leaves have a leading axis of layers."""
  cfg = dataclasses.replace(MODELS["rope"], num_layers=2, layers=MODELS["rope"].layers[:1])
  weights = params(cfg)
  loss, expected = jax.jit(jax.value_and_grad(loss_of(cfg)))(weights)
  stacked = tree.stack_layers(stored(weights), 1)
  assert stacked["blocks"]["0"]["mlp"]["down"]["w"].shape == (2, cfg.mlp_dim, cfg.embed_dim)
  assert_equal_trees(tree.unstack_layers(stacked), weights)
  scanned, found = jax.jit(jax.value_and_grad(loss_of(cfg, scan=True)))(stacked)
  assert abs(scanned - loss) <= 1e-6 * loss
  assert jax.tree.structure(found) == jax.tree.structure(stacked)
  assert_equal_trees(tree.unstack_layers(found), expected, rtol=1e-5)


def test_an_optimizer_step_and_a_checkpoint(tmp_path):
  """AdamW decays and clips the same matrices, its state has the leaves of the parameters, and comes back as it was saved."""
  weights, optimizer = params(ONE), TrainConfig(2, 1, 8, warmup=0.0, weight_decay=0.5).optimizer()

  @jax.jit
  def step(p):
    grads = jax.tree.map(lambda x: x**2 + 1, p)
    updates, state = optimizer.update(grads, optimizer.init(p), p)
    return optax.apply_updates(p, updates), state

  expected, _ = step(weights)
  found, state = step(stored(weights))
  assert_equal_trees(found, expected, rtol=1e-6)
  saved = {"params": found, "opt": state}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, saved)
    back = checkpoints.restore(jax.tree.map(jnp.zeros_like, saved))
    assert jax.tree.structure(back) == jax.tree.structure(saved)
    assert_equal_trees(back["params"], found)
    with pytest.raises(CheckpointError, match=r"mu/head: found nothing, expected float32"):
      checkpoints.restore({"params": weights, "opt": optimizer.init(weights)})


def test_vmap_over_a_leading_axis():
  held = Matrix(np.stack([W.T, 3 * W.T]))
  found = jax.vmap(lambda w: einsum("CD,DF->CF", X, w))(held)
  np.testing.assert_allclose(found, [X @ W, 3 * (X @ W)], rtol=1e-5)


def test_trees_are_compared_by_logical_shape_and_counted_alike():
  weights = params(ONE)
  assert tree.num_parameters(stored(weights)) == tree.num_parameters(weights)
  assert tree.diff(weights, stored(weights)) == []
  flat = tree.flatten(weights)
  turned = tree.unflatten(flat | {"head": Matrix(flat["head"]), "embed": flat["embed"].astype(jnp.bfloat16)})
  lines = ["dtype: embed is bfloat16, expected float32", "shape: head is (29, 24), expected (24, 29)"]
  assert tree.diff(weights, turned) == lines
  assert tree.diff(weights, turned, dtypes=False) == lines[1:]


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_of_its_own_and_a_tied_one(tied):
  """A tied head is the embedding [V, D] as it is held, which is a Matrix of [D, V]; rows that pad either are cut off."""
  cfg = dataclasses.replace(ONE, tie_embeddings=tied)
  weights = params(dataclasses.replace(ONE, tie_embeddings=False))
  w_DV = weights["embed"].T if tied else weights["head"]
  hidden = np.random.default_rng(2).standard_normal((2, cfg.embed_dim)).astype(np.float32)
  held = weights if tied else stored(weights)
  more = np.ones((3, cfg.embed_dim), np.float32)
  padded = {
    "embed": np.concatenate([weights["embed"], more]),
    "head": Matrix(np.concatenate([weights["head"].T, more])),
  }
  for p in (held, padded):
    np.testing.assert_allclose(head(cfg, p)(hidden), hidden @ w_DV, rtol=0, atol=1e-5)
