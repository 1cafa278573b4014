"""What holds for every filter: the float64 definition, dtypes, rows, programs, keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from components import measured
from filter_cases import B, CASES, FLAT, V, build, keys, logits, one_row, parameters, started, text

import filter_reference
from jaxllm.sampling import SAMPLERS, Chain

core = pytest.mark.core
every_filter = pytest.mark.parametrize(
  ("name", "index"), [pytest.param(*case, marks=core) if case == ("dry", 2) else case for case in FLAT]
)


@jax.jit
def compiled(sampler, key_B, logits_BV, state):
  filtered_BV = sampler.filter(logits_BV, state)
  return filtered_BV, sampler(key_B, logits_BV, state)[0]


def state_of_row(name, row, state):
  """What the float64 form must be told of a state of chance or of drawn probabilities."""
  return {"xtc": "chance", "mirostat": "mu"}.get(name) and {
    {"xtc": "chance", "mirostat": "mu"}[name]: float(state[row])
  }


def expected(name, index, logits_BV, state):
  """(float64 logits [B, V], margins [B])."""
  rows = []
  for row in range(B):
    kw = parameters(name, index, row) | (state_of_row(name, row, state) or {})
    rows.append(getattr(filter_reference, name)(np.asarray(logits_BV[row], np.float64), text(row), 3, **kw))
  return np.stack([logits_V for logits_V, _ in rows]), np.array([margin for _, margin in rows])


def test_every_sampler_but_the_old_ones_has_cases():
  assert CASES.keys() == SAMPLERS.keys() - {"greedy", "temperature", "top_k", "top_p", "chain"}


@every_filter
def test_the_filter_is_the_float64_one(name, index):
  """Of logits as they come, of ones with ties, and of ones the model excludes some of: no token more, none less."""
  sampler = build(name, index)
  state, worst, acted = started(sampler), 0.0, False
  for kind in range(4):
    logits_BV = logits(kind, scale=1.0 if kind == 2 else 2.0)
    if kind == 1:
      logits_BV = jnp.round(logits_BV)
    if kind == 3:
      logits_BV = logits_BV.at[:, ::4].set(-jnp.inf)
    found_BV = np.asarray(compiled(sampler, keys(), logits_BV, state)[0])
    wanted_BV, margin_B = expected(name, index, logits_BV, state)
    decided = margin_B > 2e-6
    assert decided.mean() >= 0.8
    kept = np.isfinite(wanted_BV) & decided[:, None]
    np.testing.assert_array_equal(np.isfinite(found_BV)[decided], np.isfinite(wanted_BV)[decided])
    np.testing.assert_allclose(found_BV[kept], wanted_BV[kept], rtol=3e-7, atol=3e-6)
    error = np.abs(found_BV[kept] - wanted_BV[kept]) / np.maximum(np.abs(wanted_BV[kept]), 1)
    worst = max(worst, error.max())
    acted |= not np.array_equal(wanted_BV, logits_BV)
  assert acted
  measured(name, "float64", worst)


@every_filter
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_filters_compute_in_float32(name, index, dtype):
  sampler = build(name, index)
  half_BV, state = logits().astype(dtype), started(sampler)
  filtered_BV = sampler.filter(half_BV, state)
  assert filtered_BV.dtype == jnp.float32
  np.testing.assert_array_equal(filtered_BV, sampler.filter(half_BV.astype(jnp.float32), state))


@every_filter
def test_jit_and_a_row_alone_and_vmap_are_the_eager_batch(name, index):
  sampler, logits_BV = build(name, index), logits()
  state = started(sampler)
  eager_BV, tokens_B = sampler.filter(logits_BV, state), sampler(keys(), logits_BV, state)[0]
  jitted_BV, jitted_B = compiled(sampler, keys(), logits_BV, state)
  np.testing.assert_allclose(jitted_BV, eager_BV, rtol=3e-7, atol=1e-6)  # XLA fuses a product and a sum
  np.testing.assert_array_equal(jitted_B, tokens_B)
  assert tokens_B.dtype == jnp.int32
  assert np.isfinite(np.take_along_axis(np.asarray(jitted_BV), np.asarray(tokens_B)[:, None], 1)).all()
  for row in (0, 3, 5):  # in a batch of one, whose prompts are padded to another width
    own, one = started(one_row(sampler, row), [row], width=17), slice(row, row + 1)
    alone_BV, alone_B = compiled(one_row(sampler, row), keys()[one], logits_BV[one], own)
    np.testing.assert_array_equal(alone_BV, jitted_BV[one])
    assert int(alone_B[0]) == int(jitted_B[row])

  def of_one(sampler, key, logits_V, state):
    sampler, state = (jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], x) for x in (sampler, state))
    filtered_BV = sampler.filter(logits_V[None], state)
    return filtered_BV[0], sampler(key[None], logits_V[None], state)[0][0]

  rows = jax.tree.map(lambda leaf: jnp.broadcast_to(jnp.asarray(leaf), (B, *np.shape(leaf))), sampler)
  rows = jax.tree.map(
    lambda whole, leaf: jnp.asarray(leaf) if np.ndim(leaf) and len(leaf) == B else whole, rows, sampler
  )
  mapped_BV, mapped_B = jax.jit(jax.vmap(of_one))(rows, keys(), logits_BV, state)
  np.testing.assert_allclose(mapped_BV, jitted_BV, rtol=3e-7, atol=1e-6)
  np.testing.assert_array_equal(mapped_B, jitted_B)


@every_filter
def test_the_same_key_draws_the_same_token_at_another_place_of_the_batch(name, index):
  if index == 0:  # parameters that all rows share
    sampler, order = build(name, index), np.array([4, 2, 0, 5, 1, 3])
    _, tokens_B = compiled(sampler, keys(), logits(), started(sampler))
    _, moved_B = compiled(sampler, keys()[order], logits()[order], started(sampler, list(order)))
    np.testing.assert_array_equal(moved_B, tokens_B[order])


@every_filter
def test_what_the_model_excludes_is_never_drawn(name, index):
  sampler, number = build(name, index), 40
  logits_BV = logits(4).at[:, ::2].set(-jnp.inf)
  state = started(sampler)
  many = jax.jit(jax.vmap(lambda key_B: sampler(key_B, logits_BV, sampler.toss(key_B, state))[0]))
  tokens = np.asarray(many(jnp.stack([keys(seed) for seed in range(number)])))
  if name != "forced_tokens":  # which says what is drawn whatever the model says
    assert (tokens % 2 == 1).all()
  assert ((tokens >= 0) & (tokens < V)).all()


@every_filter
def test_a_new_value_does_not_compile_again(name, index):
  traces, logits_BV = [], logits()

  @jax.jit
  def step(sampler, key_B, logits_BV, state):
    traces.append(1)
    return sampler(key_B, logits_BV, state)

  sampler = Chain((build(name, index),))
  state = started(sampler)
  for _ in range(3):
    changed = jax.tree.map(lambda leaf: leaf if np.ndim(leaf) == 0 else np.roll(leaf, 1, axis=0), sampler)
    _, state = step(changed, keys(), logits_BV, state)
    # a scalar's type stays, whatever NumPy or JAX gave it
    plain = {key: np.float64(x) if isinstance(x, float) else x for key, x in CASES[name][index].items()}
    _, state = step(Chain((SAMPLERS[name](**plain),)), keys(), logits_BV, state)
  assert len(traces) == 1


@every_filter
def test_a_tree_of_anything_is_rebuilt_without_checks(name, index):
  leaves, structure = jax.tree.flatten(build(name, index))
  for value in (None, -1.0, "name", jax.ShapeDtypeStruct((), jnp.float32)):
    again = jax.tree.unflatten(structure, [value] * len(leaves))
    assert jax.tree.leaves(again, is_leaf=lambda leaf: leaf is None)[: len(leaves)] == [value] * len(leaves)
