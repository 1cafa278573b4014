"""What holds for every filter: the float64 definition, dtypes, rows, programs, keys."""

import filter_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from components import measured
from filter_cases import CASES, FLAT, B, build, case, keys, logits, one_row, parameters, started, text

from jaxllm.sampling import SAMPLERS

core = pytest.mark.core
every_filter = pytest.mark.parametrize(
  ("name", "index"), [pytest.param(*both, marks=core) if both == ("dry", 2) else both for both in FLAT]
)


@jax.jit
def compiled(sampler, key_B, logits_BV, state):
  filtered_BV = sampler.filter(logits_BV, state)
  return filtered_BV, sampler(key_B, logits_BV, state)[0]


@jax.jit
def compiled_filter(sampler, logits_BV, state):
  return sampler.filter(logits_BV, state)


TOLD = {"xtc": "chance", "mirostat": "mu"}
"""What the float64 form is told: a state of chance, or of what was drawn."""


def expected(name, index, logits_BV, state):
  """(float64 logits [B, V], margins [B])."""
  rows = []
  for row in range(B):
    kw = parameters(name, index, row)
    if name in TOLD:
      kw[TOLD[name]] = float(state[row])
    rows.append(getattr(filter_reference, name)(np.asarray(logits_BV[row], np.float64), text(row), 3, **kw))
  return np.stack([logits_V for logits_V, _ in rows]), np.array([margin for _, margin in rows])


def test_every_sampler_but_the_old_ones_has_cases():
  assert CASES.keys() == SAMPLERS.keys() - {"greedy", "temperature", "top_k", "top_p", "chain"}


@every_filter
def test_the_filter_is_the_float64_one(name, index):
  """Of logits as they come, of ones with ties, and of ones the model excludes some of: no token more, none less."""
  sampler, state = case(name, index)
  worst, acted = 0.0, False
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
def test_filters_compute_in_float32(name, index):
  half_BV = logits().astype(jnp.bfloat16)
  sampler, state = case(name, index)
  filtered_BV = compiled_filter(sampler, half_BV, state)
  assert filtered_BV.dtype == jnp.float32
  np.testing.assert_array_equal(filtered_BV, compiled(sampler, keys(), half_BV.astype(jnp.float32), state)[0])


@every_filter
def test_eager_is_jit_and_what_is_excluded_is_never_drawn(name, index):
  sampler, state = case(name, index)
  for seed in range(8):
    logits_BV = logits(seed) if seed % 2 else logits(seed).at[:, ::2].set(-jnp.inf)
    filtered_BV, tokens_B = compiled(sampler, keys(seed), logits_BV, state)
    drawn_from_BV, _ = compiled(sampler, keys(seed), logits_BV, sampler.toss(keys(seed), state))
    assert tokens_B.dtype == jnp.int32
    assert np.isfinite(np.asarray(drawn_from_BV)[np.arange(B), tokens_B]).all()
    if name != "forced_tokens":  # which says what is drawn whatever the model says
      assert not np.isfinite(drawn_from_BV)[~np.isfinite(logits_BV)].any()
  eager_BV, eager_B = sampler.filter(logits_BV, state), sampler(keys(seed), logits_BV, state)[0]
  np.testing.assert_allclose(filtered_BV, eager_BV, rtol=3e-7, atol=1e-6)  # XLA fuses a product and a sum
  np.testing.assert_array_equal(eager_B, tokens_B)


@pytest.mark.parametrize("name", CASES)
def test_a_row_alone_and_vmap_are_the_batch(name):
  """With parameters of its own, in a batch of one whose prompt is padded to another width."""
  index, logits_BV = len(CASES[name]) - 1, logits()
  sampler, state = case(name, index)
  together_BV, tokens_B = compiled(sampler, keys(), logits_BV, state)
  for row in (0, 3, 5):
    own, one = started(one_row(sampler, row), [row], width=17), slice(row, row + 1)
    alone_BV, alone_B = compiled(one_row(sampler, row), keys()[one], logits_BV[one], own)
    np.testing.assert_array_equal(alone_BV, together_BV[one])
    assert int(alone_B[0]) == int(tokens_B[row])

  def of_one(sampler, key, logits_V, state):
    sampler, state = (jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], x) for x in (sampler, state))
    return compiled(sampler, key[None], logits_V[None], state)

  own_leaf = lambda leaf: np.ndim(leaf) and np.shape(leaf)[0] == B
  rows = lambda leaf: leaf if own_leaf(leaf) else np.broadcast_to(leaf, (B, *np.shape(leaf)))
  mapped_BV, mapped_B = jax.vmap(of_one)(jax.tree.map(rows, sampler), keys(), logits_BV, state)
  np.testing.assert_allclose(mapped_BV[:, 0], together_BV, rtol=3e-7, atol=1e-6)
  np.testing.assert_array_equal(mapped_B[:, 0], tokens_B)


@pytest.mark.parametrize("name", CASES)
def test_the_same_key_draws_the_same_token_at_another_place_of_the_batch(name):
  sampler, state = case(name, 0)  # parameters that all rows share
  order = np.array([4, 2, 0, 5, 1, 3])
  _, tokens_B = compiled(sampler, keys(), logits(), state)
  _, moved_B = compiled(sampler, keys()[order], logits()[order], started(sampler, list(order)))
  np.testing.assert_array_equal(moved_B, tokens_B[order])


COMPILED = "/jax/core/compile/backend_compile_duration"


@every_filter
def test_a_new_value_does_not_compile_again(name, index):
  sampler, state = case(name, index)
  changed = {key: np.roll(x, 1, axis=0) if np.ndim(x) else x for key, x in CASES[name][index].items()}
  others = [jax.tree.map(lambda leaf: leaf / 2 if isinstance(leaf, float) else leaf, sampler)]
  for form in (float, np.float32, jnp.float32):  # a scalar keeps its type, whatever NumPy or JAX gave it
    others.append(
      SAMPLERS[name](**{key: form(x) if isinstance(x, float) else x for key, x in changed.items()})
    )
  compiled(sampler, keys(), logits(), state)
  seen = []
  listener = lambda event, duration, **_: seen.append(event) if event == COMPILED else None
  jax.monitoring.register_event_duration_secs_listener(listener)
  try:
    for other in others:
      compiled(other, keys(), logits(), state)
  finally:
    jax.monitoring.unregister_event_duration_listener(listener)
  assert not seen


@every_filter
def test_a_tree_of_anything_is_rebuilt_without_checks(name, index):
  leaves, structure = jax.tree.flatten(build(name, index))
  for value in (None, -1.0, "name", jax.ShapeDtypeStruct((), jnp.float32)):
    again = jax.tree.unflatten(structure, [value] * len(leaves))
    assert jax.tree.leaves(again, is_leaf=lambda leaf: leaf is None)[: len(leaves)] == [value] * len(leaves)
