"""What holds for every sampler: pytree, dtypes, rows, programs, state, and a full vocabulary in bfloat16."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling_reference import distribution

from jaxllm.sampling import SAMPLERS, Chain, Greedy, Sampler, Temperature, TopK, TopP

core = pytest.mark.core
B, V = 6, 33
CASES = [
  Greedy(),
  Temperature(0.7),
  Temperature(0),
  TopK(5),
  TopP(0.8),
  TopP([0.0, 0.3, 0.5, 0.8, 0.95, 1.0]),
  pytest.param(Chain((Temperature(0.7), TopK(9), TopP(0.9))), marks=core),
  Chain((Temperature([0.0, 0.5, 1.0, 1.5, 2.0, 0.1]), Chain((TopK([0, 1, 2, 3, 40, 5]), TopP(0.9))))),
]


def filter_and_draw(sampler, key_B, logits_BV):
  state = sampler.init(None, None)
  return sampler.filter(logits_BV, state), sampler(key_B, logits_BV, state)[0]


compiled = jax.jit(filter_and_draw)
every_sampler = pytest.mark.parametrize("sampler", CASES)


def logits(seed=0, shape=(B, V), scale=2.0):
  return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32)


def keys(seed=0, rows=B):
  return jax.random.split(jax.random.key(seed), rows)


def row(sampler, index):
  """The sampler of one row alone."""
  return jax.tree.map(lambda leaf: leaf if np.ndim(leaf) == 0 else leaf[index : index + 1], sampler)


NAMES = ["greedy", "temperature", "top_k", "top_p", "min_p", "typical", "epsilon", "eta", "top_n_sigma"]
NAMES += ["repetition_penalty", "presence_penalty", "frequency_penalty", "no_repeat_ngram", "logit_bias"]
NAMES += ["banned_tokens", "forced_tokens", "min_new_tokens", "xtc", "dry", "mirostat", "chain"]
ON = {"greedy", "mirostat"}  # which have no off
TABLES = {"logit_bias", "banned_tokens", "forced_tokens", "min_new_tokens"}  # which need one


@pytest.mark.parametrize("name", NAMES)
def test_each_name_gives_its_sampler_and_defaults_are_off(name):
  assert list(SAMPLERS) == NAMES
  if name not in ON | TABLES:
    sampler = SAMPLERS[name]()
    state = sampler.init(np.tile([1, 2, 1, 2], (B, 1)), np.full(B, 4))
    np.testing.assert_array_equal(sampler.filter(logits(), sampler.toss(keys(), state)), logits())


@every_sampler
def test_the_argmax_stays_and_what_is_excluded_stays_excluded(sampler):
  logits_BV = logits().at[:, ::3].set(-jnp.inf)
  filtered_BV = np.asarray(compiled(sampler, keys(), logits_BV)[0])
  assert not np.isnan(filtered_BV).any()
  np.testing.assert_array_equal(np.argmax(filtered_BV, -1), np.argmax(logits_BV, -1))
  assert np.isneginf(filtered_BV[:, ::3]).all()


@every_sampler
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_filters_compute_in_float32(sampler, dtype):
  half_BV = logits().astype(dtype)
  filtered_BV, _ = compiled(sampler, keys(), half_BV)
  assert filtered_BV.dtype == jnp.float32
  np.testing.assert_array_equal(filtered_BV, compiled(sampler, keys(), half_BV.astype(jnp.float32))[0])


@every_sampler
def test_jit_equals_eager(sampler):
  eager, jitted = filter_and_draw(sampler, keys(), logits()), compiled(sampler, keys(), logits())
  np.testing.assert_array_equal(eager[0], jitted[0])
  np.testing.assert_array_equal(eager[1], jitted[1])
  assert eager[1].dtype == jnp.int32


@every_sampler
def test_permuting_the_vocabulary_permutes_what_is_kept(sampler):
  order = np.random.default_rng(1).permutation(V)
  filtered_BV, _ = compiled(sampler, keys(), logits())
  np.testing.assert_array_equal(compiled(sampler, keys(), logits()[:, order])[0], filtered_BV[:, order])


@every_sampler
def test_a_row_does_not_depend_on_its_batch(sampler):
  for seed in range(3):
    key_B, logits_BV = keys(seed), logits(seed)
    _, tokens_B = compiled(sampler, key_B, logits_BV)
    for index in range(B):
      one = slice(index, index + 1)
      _, alone = compiled(row(sampler, index), key_B[one], logits_BV[one])
      assert int(alone[0]) == int(tokens_B[index])
  if all(np.ndim(leaf) == 0 for leaf in jax.tree.leaves(sampler)):
    order = np.array([4, 2, 0, 5, 1, 3])
    _, moved = compiled(sampler, key_B[order], logits_BV[order])
    np.testing.assert_array_equal(moved, tokens_B[order])


PARAMETERS = [
  pytest.param(Temperature, [0.0, 0.5, 1.0, 1.5, 0.1, 3.0], marks=core),
  (TopK, [0, 1, 2, 5, 33, 1000]),
  (TopP, [0.0, 0.3, 0.5, 0.8, 0.95, 1.0]),
]


@pytest.mark.parametrize(("kind", "values"), PARAMETERS)
def test_one_parameter_a_row_equals_a_call_a_row(kind, values):
  together, _ = compiled(kind(values), keys(), logits())
  for index, value in enumerate(values):
    alone, _ = compiled(kind(value), keys(rows=1), logits()[index : index + 1])
    np.testing.assert_array_equal(together[index : index + 1], alone)
  mapped = jax.jit(jax.vmap(lambda value, logits_V: kind(value).filter(logits_V[None], ())[0]))
  np.testing.assert_array_equal(mapped(jnp.asarray(values), logits()), together)


@pytest.mark.parametrize(("kind", "values"), PARAMETERS)
def test_a_new_value_does_not_compile_again(kind, values):
  traces, key_B, logits_BV = [], keys(), logits()

  @jax.jit
  def step(sampler, key_B, logits_BV):
    traces.append(1)
    return sampler(key_B, logits_BV, sampler.init(None, None))[0]

  plain = int if kind is TopK else float
  for value in values:
    for form in (value, plain(value), np.asarray(value), jnp.asarray(value)):
      step(Chain((Greedy(), kind(form))), key_B, logits_BV)
  assert len(traces) == 1
  for shift in range(3):
    step(Chain((Greedy(), kind(np.roll(values, shift)))), key_B, logits_BV)
  assert len(traces) == 2  # from a scalar to one a row, once


@every_sampler
def test_a_tree_of_anything_is_rebuilt_without_checks(sampler):
  leaves, structure = jax.tree.flatten(sampler)
  for value in (None, -1.0, "name", jax.ShapeDtypeStruct((), jnp.float32)):
    again = jax.tree.unflatten(structure, [value] * len(leaves))
    assert jax.tree.leaves(again, is_leaf=lambda leaf: leaf is None) == [value] * len(leaves)
  assert jax.eval_shape(lambda s: s, sampler) is not None
  paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(sampler)[0]]
  assert len(set(paths)) == len(leaves)
  assert all(path.startswith(".") for path in paths)


def test_a_sampler_is_a_frozen_value():
  assert TopP(0.9) == TopP(np.float64(0.9))
  assert hash(Chain([TopK(3)])) == hash(Chain((TopK(3),)))
  assert dataclasses.replace(TopP(0.9), p=1) == TopP(1.0)
  with pytest.raises(dataclasses.FrozenInstanceError):
    TopP(0.9).p = 0.5


@pytest.mark.parametrize("sampler", [TopK(1), TopP(0.0), Temperature(0), Chain((Temperature(2.0), TopK(1)))])
def test_the_greedy_limits_are_greedy(sampler):
  logits_BV = logits(2, (500, V))
  _, tokens_B = compiled(sampler, keys(1, 500), logits_BV)
  np.testing.assert_array_equal(tokens_B, Greedy()(keys(2, 500), logits_BV, ())[0])
  np.testing.assert_array_equal(tokens_B, np.argmax(logits_BV, axis=-1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Once(Sampler):
  """Never draws a token of the prompt, nor one twice."""

  def init(self, tokens, lengths, room=0):
    real_BT = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
    return jnp.any(jax.nn.one_hot(tokens, V, dtype=bool) & real_BT[:, :, None], axis=1)

  def filter(self, logits_BV, state):
    return jnp.where(state, -jnp.inf, logits_BV)

  def update(self, tokens_B, state, logits_BV):
    return state | jax.nn.one_hot(tokens_B, V, dtype=bool)


def test_a_chain_carries_its_members_state():
  sampler = Chain((Temperature(3.0), Chain((Once(), TopP(0.99)))))
  state = sampler.init(jnp.array([[1, 2], [3, 32]] * (B // 2)), jnp.array([2, 1] * (B // 2)))
  logits_BV = logits()
  step = jax.jit(lambda key_B, state: sampler(key_B, logits_BV, state))
  drawn = []
  for index in range(V - 2):
    tokens_B, state = step(keys(index), state)
    drawn.append(np.asarray(tokens_B))
  drawn = np.stack(drawn, axis=1)
  for index in range(B):
    prompt = [1, 2] if index % 2 == 0 else [3]
    assert len(set(drawn[index])) == V - 2
    assert not set(drawn[index]) & set(prompt)


VOCABULARY = 151_936
FULL = [
  pytest.param(1.0, 0, 0.9, marks=core),
  (1.0, 0, 0.95),
  (1.0, 50, 1.0),
  (0.7, 1000, 0.95),
  (1.5, 0, 0.6),
]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(("temperature", "k", "p"), FULL)
def test_the_support_over_a_full_vocabulary_is_the_float64_one(temperature, k, p, dtype):
  logits_BV = logits(5, (1, VOCABULARY), scale=3.0).astype(dtype)
  expected, margin = distribution(logits_BV[0].astype(jnp.float32), temperature, k, p)
  assert margin > 5e-7  # else the case is not decided in float32
  sampler = Chain((Temperature(temperature), TopK(k), TopP(p)))
  filtered_BV, _ = compiled(sampler, keys(rows=1), logits_BV)
  np.testing.assert_array_equal(np.isfinite(filtered_BV[0]), expected > 0)
  np.testing.assert_allclose(jax.nn.softmax(filtered_BV[0]), expected, rtol=2e-5)


def test_a_vocabulary_split_over_devices_draws_the_same_tokens():
  if jax.device_count() < 4:
    pytest.skip("needs four devices")
  mesh = jax.make_mesh((4,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "tensor"))
  sampler = Chain((Temperature(1.3), TopK(40), TopP(0.9)))
  call = jax.jit(lambda key_B, logits_BV: sampler(key_B, logits_BV, sampler.init(None, None))[0])
  logits_BV = logits(7, (64, 128))
  np.testing.assert_array_equal(
    call(keys(7, 64), logits_BV), call(keys(7, 64), jax.device_put(logits_BV, split))
  )
