"""A packed row has the losses of its documents alone, and the gradient that is their mean by tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_cases

from jaxllm.config import Layer
from jaxllm.nn import Context, Transformer
from jaxllm.nn.transformer import head
from jaxllm.ops.blockwise import Blockwise
from jaxllm.ops.losses import cross_entropy
from jaxllm.position.rope_2d import Rope2d
from jaxllm.train.batches import lay_out, take
from jaxllm.train.objectives import BlankInfilling, Causal, PrefixLm
from jaxllm.train.order import stream
from jaxllm.train.tokens import Text

V, T = 64, 64
GLM = BlankInfilling(mask=60, sop=61, eop=62)
CFG = dataclasses.replace(train_cases.CFG, vocab_size=V)
ROPE_2D = dataclasses.replace(CFG, layers=(Layer(Rope2d()),))
CASES = {
  "causal": (CFG, Causal()),
  "prefix_lm": (CFG, PrefixLm()),
  "prefix_lm, tiles": (dataclasses.replace(CFG, attention=Blockwise(5, 7)), PrefixLm()),
  "glm": (ROPE_2D, GLM),
}


def text():
  rng = np.random.default_rng(0)
  ids = np.concatenate([[*rng.integers(2, 60, n - 1), 1] for n in (9, 14, 6, 20, 11, 8, 16, 12)])
  return Text(ids.astype(np.uint8), V, 1)


@functools.cache
def params(cfg):
  weights = jax.jit(Transformer(cfg).init)(jax.random.key(0), jnp.zeros((1, T), jnp.int32))["params"]
  return jax.tree.map(lambda x: x * (1.5 if x.ndim == 2 else 1), weights)  # scores that matter


def nll(cfg, weights, tokens, labels, context):
  hidden_BTD, _ = Transformer(cfg).apply({"params": weights}, tokens, context, logits=None)
  return cross_entropy(hidden_BTD, head(cfg, weights), labels)[0]


def alone(data, one, seed):
  """The documents of the rows, each in a row of its own, padded at its end: without segments, with a prefix a row."""
  examples = [
    data.objective.example(data.text.read(start, size), stream(seed, 0, row, number))
    for row in range(len(data.rows))
    for number, (start, size) in enumerate(data.rows.pieces(row))
  ]
  pad = lambda x: np.pad(x, [(0, T - len(x)), *[(0, 0)] * (x.ndim - 1)])
  tokens, labels, weights, pos = (
    np.stack([pad(getattr(e, name)) for e in examples]) for name in ("tokens", "labels", "weights", "pos")
  )
  prefix = None if one.context.prefix is None else np.array([e.prefix for e in examples], np.int32)
  return tokens, labels, weights, Context(pos=pos, prefix=prefix), [len(e.tokens) for e in examples]


@pytest.mark.parametrize("name", [pytest.param("causal", marks=pytest.mark.core), *list(CASES)[1:]])
def test_packed_is_alone(name):
  cfg, objective = CASES[name]
  data = lay_out(text(), objective, T, 2)
  one = take(data, range(len(data.rows)), seed=4)
  assert max(len(data.rows.pieces(row)) for row in range(len(data.rows))) >= 3
  tokens, labels, weights, context, sizes = alone(data, one, 4)
  program = jax.jit(functools.partial(nll, cfg))
  single = np.asarray(program(params(cfg), tokens, labels, context))

  def by_document(nll_BT):
    """The losses of the packed rows, document by document."""
    rows = [nll_BT[r][one.context.segment[r] == s] for r in range(len(nll_BT)) for s in range(1, 9)]
    return [row for row in rows if len(row)]

  packed = by_document(np.asarray(program(params(cfg), one.tokens, one.labels, one.context)))
  assert [len(row) for row in packed] == sizes
  gap = lambda rows: max(
    np.abs((row - single[d, : len(row)]) * weights[d, : len(row)]).max() for d, row in enumerate(rows)
  )
  assert gap(packed) <= 1e-5
  assert one.weights.sum() == weights.sum()
  # without segments, and with a prefix that is counted from the row's beginning, they are others
  wrong = [dataclasses.replace(one.context, segment=np.ones_like(one.context.segment))]
  if one.context.prefix is not None:
    first = np.where(one.context.segment > 0, one.context.prefix[:, :1], 0)
    wrong.append(dataclasses.replace(one.context, prefix=first))
  for other in wrong:
    assert gap(by_document(np.asarray(program(params(cfg), one.tokens, one.labels, other)))) > 1e-2


@pytest.mark.parametrize("name", ["causal", "glm"])
def test_the_gradient_is_the_mean_by_tokens(name):
  cfg, objective = CASES[name]
  data = lay_out(text(), objective, T, 2)
  one = take(data, range(len(data.rows)), seed=4)
  tokens, labels, weights, context, sizes = alone(data, one, 4)

  @jax.jit
  @jax.grad
  def mean(params, tokens, labels, weights, context):
    return jnp.sum(weights * nll(cfg, params, tokens, labels, context)) / jnp.sum(weights)

  packed = mean(params(cfg), one.tokens, one.labels, one.weights, one.context)
  total = jax.tree.map(jnp.zeros_like, packed)
  plain = total
  for d in range(len(sizes)):
    row = jax.tree.map(lambda x: x[d : d + 1], (tokens, labels, weights, context))  # noqa: B023
    grad = mean(params(cfg), *row)
    share = weights[d].sum() / weights.sum()
    total = jax.tree.map(lambda t, g: t + share * g, total, grad)  # noqa: B023
    plain = jax.tree.map(lambda t, g: t + g / len(sizes), plain, grad)
  largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(packed))
  gap = lambda a: max(
    float(jnp.abs(x - y).max()) for x, y in zip(*map(jax.tree.leaves, (a, packed)), strict=True)
  )
  assert gap(total) <= 1e-5 * largest
  assert gap(plain) > 1e-2 * largest  # each document with the same weight


def test_the_causal_objective_on_windows_is_the_loss_of_the_sweep():
  """Rows without documents: the same tokens, labels and mean as a step of today has, whose context is empty."""
  ids = text().ids
  data = lay_out(Text(ids, V), Causal(), 16, 2)
  one = take(data, [0, 3], seed=0)
  rows = np.stack([ids[:17], ids[48:65]]).astype(np.int32)
  assert (one.tokens == rows[:, :-1]).all() and (one.labels == rows[:, 1:]).all() and one.weights.all()
  assert one.context == Context()
