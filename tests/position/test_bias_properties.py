"""Laws of ALiBi, T5's bias, sinusoids and log-n for any positions; shapes come from short lists."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from hypothesis import given
from hypothesis import strategies as st
from properties import LAST, examples, numbers

from jaxllm.position import POSITIONS, LogN, alibi_slopes
from jaxllm.position.query_scale import query_scale_table

T = 6
HEADS = (1, 2, 3, 8, 12, 40)
increasing = st.lists(st.integers(0, 2**24), min_size=T, max_size=T).map(sorted)


@functools.partial(jax.jit, static_argnums=0)
def alibi(heads, q_pos, k_pos):
  return POSITIONS["alibi"]().bias({}, q_pos[None], k_pos[None], heads, 16)[0]


def bias(heads, q_pos, k_pos):
  return np.asarray(alibi(heads, np.array(q_pos, np.int32), np.array(k_pos, np.int32)))


@given(st.integers(1, 128))
@examples(128)
def test_slopes_fall_within_each_part_and_never_leave_0_to_1(n):
  slopes, closest = alibi_slopes(n), 2 ** int(math.log2(n))
  assert len(slopes) == n == len(set(slopes)) and slopes.min() > 0 and slopes.max() < 1
  assert np.all(np.diff(slopes[:closest]) < 0) and np.all(np.diff(slopes[closest:]) < 0)
  assert slopes[closest - 1] == 2.0**-8
  np.testing.assert_allclose(slopes[:closest], slopes[0] ** np.arange(1, closest + 1), rtol=1e-14, atol=0)


@given(st.sampled_from(HEADS), increasing, st.integers(0, LAST - 2**24))
@examples(40)
def test_the_bias_of_alibi(heads, pos, shift):
  """Slope times distance, one rounding; the same after any shift, bit for bit, and in a decoded row."""
  found = bias(heads, pos, pos)
  assert found.dtype == np.float32
  distance = np.array(pos)[None] - np.array(pos)[:, None]
  expected = alibi_slopes(heads)[:, None, None] * distance
  np.testing.assert_allclose(found, expected, rtol=2e-7, atol=0)
  assert not np.diagonal(found, axis1=1, axis2=2).any()
  assert np.all(found[:, distance < 0] < 0)
  np.testing.assert_array_equal(bias(heads, np.add(pos, shift), np.add(pos, shift)), found)
  np.testing.assert_array_equal(bias(heads, pos[-1:], pos)[:, 0], found[:, -1])


def softmax64(scores):
  exp = np.exp(scores - scores.max(-1, keepdims=True))
  return exp / exp.sum(-1, keepdims=True)


@given(st.sampled_from(HEADS), increasing, numbers((T,), 10.0))
@examples(40)
def test_attention_of_alibi_is_that_of_slope_times_key_position(heads, pos, scores):
  """A row's softmax drops slope times its query's position: ours in float32 is the other form in float64."""
  pos = np.array(pos) % 4096
  pos.sort()
  found = jax.nn.softmax(jnp.asarray(scores)[None] + bias(heads, pos[-1:], pos)[:, 0], axis=-1)
  other = softmax64(scores + alibi_slopes(heads)[:, None] * pos)
  np.testing.assert_allclose(
    found, other, rtol=0, atol=1e-5
  )  # biases of up to 4096, of which those of weight are small


@given(st.lists(st.integers(0, 80), min_size=T, max_size=T).map(sorted), st.integers(0, LAST - 80))
@examples(40)
def test_buckets_of_t5_know_the_distance_only_and_grow_with_it(pos, shift):
  """Those of the published logarithm, at any distance from any position."""
  method, table = POSITIONS["t5"](8, 64), np.arange(8, dtype=np.float32)[:, None]
  found = np.asarray(t5(method, table, np.add(pos, shift).astype(np.int32)[None]))[0, 0]
  np.testing.assert_array_equal(found, oracle.t5_bias(method, table, np.subtract.outer(pos, pos))[0])
  assert not np.triu(found).any() and np.all(np.diff(found[-1]) <= 0)


@functools.partial(jax.jit, static_argnums=0)
def t5(method, table, pos):
  return method.bias({"table": table}, pos, pos, 1, 16)


@jax.jit
def sinusoids(pos):
  return POSITIONS["sinusoidal"]().embed(jnp.zeros((1, T, 16)), pos[None], {})[0]


@given(st.lists(st.integers(0, 2**20), min_size=T, max_size=T), st.integers(0, 2**20))
@examples(40)
def test_a_shift_of_sinusoids_is_a_turn_of_each_pair(pos, shift):
  """PE(p + k) = M_k PE(p), M_k of blocks ((cos, sin), (-sin, cos)) of k theta, for every p (Vaswani, section 3.5)."""
  here = np.asarray(sinusoids(np.array(pos, np.int32)), np.float64)
  there = np.asarray(sinusoids(np.add(pos, shift).astype(np.int32)))
  M = np.zeros((16, 16))
  for i, angle in enumerate(shift * 10000.0 ** (-np.arange(8) / 8)):
    block = [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
    M[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = block
  np.testing.assert_allclose(here @ M.T, there, rtol=0, atol=4e-7)
  np.testing.assert_allclose(np.sum(here**2, axis=-1), 8.0, rtol=1e-6)


@given(st.integers(2, 2**20), st.floats(0.0, 1.0), st.lists(st.integers(0, LAST), min_size=T, max_size=T))
@examples(40)
def test_log_n_is_the_logarithm_to_the_trained_length(length, floor, pos):
  """max(floor, log_L n), n = position + 1: 1 at the trained length whatever it is, 0 for the first token without a floor."""
  pos = np.array([*pos, 0, length - 1], np.int32)[None]
  found = log_n(query_scale_table(LogN(length, floor)), pos)
  expected = np.maximum(floor, np.log(pos[0].astype(np.float64) + 1) / np.log(length))
  np.testing.assert_allclose(found, expected, rtol=4e-7, atol=1e-37)


@jax.jit
def log_n(table, pos):
  return table(jnp.ones((*pos.shape, 1, 1)), pos)[0, :, 0, 0]
