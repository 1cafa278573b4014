"""Draws against the float64 distribution: chi-square at 1e-6, and no token outside the support."""

import itertools

import filter_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling_reference import check_drawn, chi_square, chi_square_limit, chi_square_p, distribution

from jaxllm.sampling import SAMPLERS, Chain, Temperature, TopK, TopP

V = 24
LOGITS_V = (1.5 * np.random.default_rng(11).normal(size=V)).astype(np.float32)
GRID = list(itertools.product([0.0, 0.5, 1.0, 2.0], [0, 5], [1.0, 0.9, 0.5], [0.0, 0.05], [1.0, 1.3]))
"""Temperature, top-k, top-p, min-p, and the penalty of what the prompt has."""
NAMES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
FIELDS = ("temperature", "k", "p", "min_p", "penalty")
TEXT = [3, 7, 3, 7, 9, 3]
"""The prompt."""


@jax.jit
def draw(sampler, key_B, logits_V):
  logits_BV = jnp.broadcast_to(logits_V[None], (key_B.shape[0], logits_V.shape[0]))
  return sampler(key_B, logits_BV, sampler.init(None, None))[0]


def tokens(temperature, k, p, number, seed=0):
  sampler = Chain((Temperature(temperature), TopK(k), TopP(p)))
  key_B = jax.random.split(jax.random.key(seed), number)
  return np.asarray(draw(sampler, key_B, LOGITS_V))


def marks(cell, number):
  """The default set has every cell of three filters, and one of all five."""
  core = cell == (1.0, 5, 0.9, 0.05, 1.3)
  default = number == 20_000 and (cell[3:] == (0.0, 1.0) or core)
  return [pytest.mark.core] * (core and default) + [pytest.mark.slow] * (not default)


@pytest.mark.parametrize(
  ("cell", "number"),
  [pytest.param(x, n, marks=marks(x, n), id=f"{x}-{n}") for x in GRID for n in (20_000, 200_000)],
)
def test_frequencies(cell, number):
  filters = [(name, {field: value}) for name, field, value in zip(NAMES, FIELDS, cell, strict=True)]
  filters = [filters[-1], *filters[:-1]]  # the penalty comes first
  filtered_V, margin = filter_reference.chained(LOGITS_V.astype(np.float64), TEXT, 0, filters)
  assert margin > 1e-5
  sampler = Chain(tuple(SAMPLERS[name](**kw) for name, kw in filters))
  key_B = jax.random.split(jax.random.key(GRID.index(cell)), number)
  drawn = np.asarray(draw_after(sampler, key_B, LOGITS_V))
  check_drawn(drawn, filter_reference.softmax(filtered_V), "temperature, top-k, top-p, min-p, penalty")


@pytest.mark.parametrize(
  ("error", "number"),
  [pytest.param(1.2, 20_000, marks=pytest.mark.core), pytest.param(1.05, 200_000, marks=pytest.mark.slow)],
)
def test_the_test_sees_a_wrong_temperature(error, number):
  probs, _ = distribution(LOGITS_V, 1.0)
  statistic, freedom = chi_square(tokens(error, 0, 1.0, number), probs)
  assert statistic > chi_square_limit(freedom)


STATED = [  # (name, parameters) in order, of the prompt TEXT
  [("min_p", {"min_p": 0.1})],
  [("temperature", {"temperature": 1.5}), ("min_p", {"min_p": 0.3})],
  [("typical", {"p": 0.8})],
  [("epsilon", {"epsilon": 0.03})],
  [("eta", {"epsilon": 0.3})],
  [("top_n_sigma", {"n": 1.0})],
  [("repetition_penalty", {"penalty": 1.3})],
  [
    ("presence_penalty", {"penalty": 1.0, "prompt": True}),
    ("frequency_penalty", {"penalty": 0.5, "prompt": True}),
  ],
  [("no_repeat_ngram", {"n": 2})],
  [("dry", {"multiplier": 0.8, "allowed_length": 1})],
  [("mirostat", {"tau": 1.5})],
  [
    ("repetition_penalty", {"penalty": 1.2}),
    ("temperature", {"temperature": 0.5}),
    ("top_k", {"k": 9}),
    ("top_p", {"p": 0.9}),
    ("min_p", {"min_p": 0.02}),
  ],
  [("xtc", {"probability": 0.3, "threshold": 0.08})],
]


@pytest.mark.parametrize(
  ("case", "number"),
  [(case, 20_000) for case in (0, 2, 5, 6, 9, 10, 11, 12)]
  + [pytest.param(case, 200_000, marks=pytest.mark.slow) for case in range(len(STATED))],
)
def test_frequencies_of_every_kind(case, number):
  filters = STATED[case]
  z = LOGITS_V.astype(np.float64)
  if filters[0][0] == "xtc":  # a mixture of both sides of the coin
    share = filters[0][1]["probability"]
    sides = [filter_reference.xtc(z, TEXT, 0, chance=chance, **filters[0][1]) for chance in (0.0, 1.0)]
    probs = share * filter_reference.softmax(sides[0][0]) + (1 - share) * filter_reference.softmax(
      sides[1][0]
    )
    margin = sides[0][1]
  else:
    filtered_V, margin = filter_reference.chained(z, TEXT, 0, filters)
    probs = filter_reference.softmax(filtered_V)
  assert margin > 1e-5
  assert not np.allclose(probs, distribution(LOGITS_V)[0])
  sampler = Chain(tuple(SAMPLERS[name](**kw) for name, kw in filters))
  key_B = jax.random.split(jax.random.key(case), number)
  drawn = np.asarray(draw_after(sampler, key_B, LOGITS_V))
  check_drawn(drawn, probs, "every kind, stated cells")


@jax.jit
def draw_after(sampler, key_B, logits_V):
  """A draw for each key, after the prompt TEXT."""

  def one(key):
    state = sampler.init(jnp.array([TEXT]), jnp.array([len(TEXT)]), 1)
    return sampler(key[None], logits_V[None], state)[0][0]

  return jax.vmap(one)(key_B)


def test_rows_of_one_batch_are_independent():
  number, few = 20_000, 5
  logits_BV = np.random.default_rng(4).normal(size=(2, few)).astype(np.float32)
  key_B = jax.random.split(jax.random.key(9), 2 * number)
  drawn, _ = jax.jit(TopP(1.0))(key_B, jnp.tile(logits_BV, (number, 1)), ())
  pairs = np.asarray(drawn).reshape(number, 2)
  joint = np.outer(distribution(logits_BV[0])[0], distribution(logits_BV[1])[0]).ravel()
  check_drawn(pairs[:, 0] * few + pairs[:, 1], joint, "two rows together")


@pytest.mark.slow
def test_a_long_tail_is_drawn_as_often_as_it_should():
  """151,935 tokens of probability 1e-7 each: 1.5 % of the draws, of which 23-bit Gumbel noise finds 0.6 %."""
  vocabulary, number, batch = 151_936, 4000, 50
  tail = 1e-7 * (vocabulary - 1)
  logits_V = jnp.full(vocabulary, np.log(1e-7), jnp.float32).at[-1].set(np.log1p(-tail))
  found = 0
  for seed in range(number // batch):
    drawn = draw(Chain(()), jax.random.split(jax.random.key(seed), batch), logits_V)
    found += int((drawn != vocabulary - 1).sum())
  spread = np.sqrt(number * tail * (1 - tail))
  assert abs(found - number * tail) < 4 * spread


@pytest.mark.parametrize(
  ("freedom", "quantile"),  # scipy.stats.chi2.isf(1e-6, freedom), scipy 1.17.1
  [pytest.param(4, 33.37684, marks=pytest.mark.core), (8, 42.70091), (23, 70.54956), (100, 182.12678)],
)
def test_the_limit_is_the_quantile_of_chi_square(freedom, quantile):
  assert 1 < chi_square_limit(freedom) / quantile < 1.06


@pytest.mark.parametrize("freedom", [4, 8, 23, 100])
def test_the_probability_is_1e_6_at_the_limit(freedom):
  assert abs(chi_square_p(chi_square_limit(freedom), freedom) / 1e-6 - 1) < 1e-3
