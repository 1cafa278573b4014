"""What holds for every filter: the float64 definition, dtypes, rows, programs, keys."""

import filter_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import compilations
from components import measured
from filter_cases import CASES, FLAT, B, build, case, keys, logits, one_row, parameters, started, text

from jaxllm.sampling import SAMPLERS

core = pytest.mark.core
every_filter = pytest.mark.parametrize(
  ("name", "index"), [pytest.param(*both, marks=core) if both == ("dry", 2) else both for both in FLAT]
)


@jax.jit
def filtered(sampler, logits_BV, state):
  return sampler.filter(logits_BV, state)


@jax.jit
def calls(samplers, key_B, logits_BV, states):
  """name: (what a draw is from, the tokens) of many samplers: one program compiles sooner than many."""
  one = lambda sampler, state: (
    sampler.filter(logits_BV, sampler.toss(key_B, state)),
    sampler(key_B, logits_BV, state)[0],
  )
  return {name: one(sampler, states[name]) for name, sampler in samplers.items()}


def last_cases():
  """({name: sampler}, {name: state}) of each kind's last case, whose parameters are one a row."""
  cases = {name: case(name, len(CASES[name]) - 1) for name in CASES}
  return {name: x for name, (x, _) in cases.items()}, {name: x for name, (_, x) in cases.items()}


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
    found_BV = np.asarray(filtered(sampler, logits_BV, state))
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


def test_filters_compute_in_float32():
  samplers, states = last_cases()
  half_BV = logits().astype(jnp.bfloat16)
  found, wanted = (calls(samplers, keys(), z_BV, states) for z_BV in (half_BV, half_BV.astype(jnp.float32)))
  for name in samplers:
    assert found[name][0].dtype == jnp.float32
    np.testing.assert_array_equal(found[name][0], wanted[name][0], name)
    np.testing.assert_array_equal(found[name][1], wanted[name][1], name)


def test_what_is_excluded_is_never_drawn():
  samplers, states = last_cases()
  for seed in range(8):
    logits_BV = logits(seed) if seed % 2 else logits(seed).at[:, ::2].set(-jnp.inf)
    for name, (drawn_from_BV, tokens_B) in calls(samplers, keys(seed), logits_BV, states).items():
      assert tokens_B.dtype == jnp.int32
      assert np.isfinite(np.asarray(drawn_from_BV)[np.arange(B), tokens_B]).all(), name
      if name != "forced_tokens":  # which says what is drawn whatever the model says
        assert not np.isfinite(drawn_from_BV)[~np.isfinite(logits_BV)].any(), name


def test_a_row_alone_is_the_row_of_the_batch():
  """With parameters of its own, in a batch of one whose prompt is padded to another width."""
  (samplers, states), logits_BV = last_cases(), logits()
  together = calls(samplers, keys(), logits_BV, states)
  for row in (0, 3, 5):
    one = slice(row, row + 1)
    own = {name: one_row(sampler, row) for name, sampler in samplers.items()}
    started_alone = {name: started(sampler, [row], width=17) for name, sampler in own.items()}
    for name, (alone_BV, alone_B) in calls(own, keys()[one], logits_BV[one], started_alone).items():
      np.testing.assert_array_equal(alone_BV, together[name][0][one], name)
      assert int(alone_B[0]) == int(together[name][1][row]), name


def test_the_same_key_draws_the_same_token_at_another_place_of_the_batch():
  samplers = {name: build(name, 0) for name in CASES}  # parameters that all rows share
  states = {name: case(name, 0)[1] for name in CASES}
  order = np.array([4, 2, 0, 5, 1, 3])
  moved_states = {name: started(sampler, list(order)) for name, sampler in samplers.items()}
  found = calls(samplers, keys(), logits(), states)
  moved = calls(samplers, keys()[order], logits()[order], moved_states)
  for name in samplers:
    np.testing.assert_array_equal(moved[name][1], found[name][1][order], name)


@pytest.mark.slow
@every_filter
def test_eager_and_vmap_are_jit(name, index):
  (sampler, state), logits_BV = case(name, index), logits()
  ((drawn_from_BV, tokens_B),) = calls({name: sampler}, keys(), logits_BV, {name: state}).values()
  eager_BV = sampler.filter(logits_BV, sampler.toss(keys(), state))
  np.testing.assert_allclose(drawn_from_BV, eager_BV, rtol=3e-7, atol=1e-6)  # XLA fuses a product and a sum
  np.testing.assert_array_equal(sampler(keys(), logits_BV, state)[0], tokens_B)

  def of_one(sampler, key, logits_V, state):
    sampler, state = (jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], x) for x in (sampler, state))
    return calls({name: sampler}, key[None], logits_V[None], {name: state})[name]

  own_leaf = lambda leaf: np.ndim(leaf) and np.shape(leaf)[0] == B
  rows = lambda leaf: leaf if own_leaf(leaf) else np.broadcast_to(leaf, (B, *np.shape(leaf)))
  mapped_BV, mapped_B = jax.vmap(of_one)(jax.tree.map(rows, sampler), keys(), logits_BV, state)
  np.testing.assert_allclose(mapped_BV[:, 0], drawn_from_BV, rtol=3e-7, atol=1e-6)
  np.testing.assert_array_equal(mapped_B[:, 0], tokens_B)


@pytest.mark.slow
def test_a_vocabulary_split_over_devices_draws_the_same_tokens():
  if jax.device_count() < 3:
    pytest.skip("needs three devices")
  mesh = jax.make_mesh((3,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "tensor"))
  samplers, states = last_cases()
  found = calls(samplers, keys(), jax.device_put(logits(), split), states)
  for name, (drawn_from_BV, tokens_B) in calls(samplers, keys(), logits(), states).items():
    np.testing.assert_allclose(found[name][0], drawn_from_BV, rtol=3e-7, atol=1e-6, err_msg=name)
    np.testing.assert_array_equal(found[name][1], tokens_B, name)


@pytest.mark.parametrize("which", ["scalars", "rows"])
def test_a_new_value_does_not_compile_again(which):
  index = {name: 0 if which == "scalars" else len(CASES[name]) - 1 for name in CASES}
  samplers = {name: build(name, index[name]) for name in CASES}
  states = {name: case(name, index[name])[1] for name in CASES}
  calls(samplers, keys(), logits(), states)
  others = [jax.tree.map(lambda leaf: leaf / 2 if isinstance(leaf, float) else leaf, samplers)]
  for form in (float, np.float32, jnp.float32):  # a scalar keeps its type, whatever NumPy or JAX gave it
    change = lambda x, form=form: (
      np.roll(x, 1, axis=0) if np.ndim(x) else form(x) if isinstance(x, float) else x
    )
    changed = {name: {key: change(x) for key, x in CASES[name][index[name]].items()} for name in CASES}
    others.append({name: SAMPLERS[name](**kw) for name, kw in changed.items()})
  with compilations() as seen:
    for other in others:
      calls(other, keys(), logits(), states)
  assert not seen


@every_filter
def test_a_tree_of_anything_is_rebuilt_without_checks(name, index):
  leaves, structure = jax.tree.flatten(build(name, index))
  for value in (None, -1.0, "name", jax.ShapeDtypeStruct((), jnp.float32)):
    again = jax.tree.unflatten(structure, [value] * len(leaves))
    assert jax.tree.leaves(again, is_leaf=lambda leaf: leaf is None)[: len(leaves)] == [value] * len(leaves)
