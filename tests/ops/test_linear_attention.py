"""Linear attention with RoPE against a loop in float64; the recurrent form is the parallel one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops.linear_attention import feature_map, linear_attention
from jaxllm.position import POSITIONS
from jaxllm.position.tables import make_table

B, T, N, H, E = 2, 13, 3, 8, 5
ROPE = POSITIONS["rope"](base=100.0, layout="interleaved")


def arrays():
  rng = np.random.default_rng(0)
  shapes = ((B, T, N, H), (B, T, N, H), (B, T, N, E))
  return [2 * rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def turn(x):
  pos = jnp.arange(T, dtype=jnp.int32)[None]
  return ROPE.rotate_q(x, pos, make_table([ROPE.frequencies(H)]))


def brute_force(q, k, v, turned=True, turned_denominator=False):
  """Equation 19 a pair of tokens at a time, by complex numbers, float64."""
  phi = lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))
  q, k, v = (x.astype(np.float64) for x in (q, k, v))
  q, k, theta = phi(q), phi(k), 100.0 ** (-np.arange(0, H, 2) / H)
  out = np.zeros(v.shape)
  for b, i, n in np.ndindex(B, T, N):
    above, below = np.zeros(E), 0.0
    for j in range(i + 1):
      flat = q[b, i, n] @ k[b, j, n]
      z = (q[b, i, n, 0::2] + 1j * q[b, i, n, 1::2]) * (k[b, j, n, 0::2] - 1j * k[b, j, n, 1::2])
      rotated = np.sum(z * np.exp(1j * (i - j) * theta)).real if turned else flat
      above += rotated * v[b, j, n]
      below += rotated if turned_denominator else flat
    out[b, i, n] = above / below
  return out


@pytest.mark.core
@pytest.mark.parametrize("turned", [True, False])
def test_equation_19(turned):
  q, k, v = arrays()
  found, _ = linear_attention(q, k, v, turn if turned else lambda x: x)
  np.testing.assert_allclose(found, brute_force(q, k, v, turned), rtol=0, atol=5e-6)


def test_a_turned_denominator_is_another_result():
  q, k, v = arrays()
  found, _ = linear_attention(q, k, v, turn)
  assert np.max(np.abs(found - brute_force(q, k, v, turned_denominator=True))) > 0.1


@jax.jit
def chunk(q, k, v, start, state=None):
  """Linear attention of the tokens from `start` on: a program a size."""
  pos = start + jnp.arange(q.shape[1], dtype=jnp.int32)[None]
  return linear_attention(q, k, v, lambda x: ROPE.rotate_q(x, pos, make_table([ROPE.frequencies(H)])), state)


@pytest.mark.parametrize("sizes", [[1] * T, [5, 1, 1, 6], [12, 1]], ids=str)
def test_any_chunks_give_the_parallel_form(sizes):
  q, k, v = arrays()
  whole, last = chunk(q, k, v, 0)
  start, state, found = 0, None, []
  for size in sizes:
    part, stop = slice(start, start + size), start + size
    out, state = chunk(q[:, part], k[:, part], v[:, part], start, state)
    found.append(out)
    start = stop
  np.testing.assert_allclose(np.concatenate(found, axis=1), whole, rtol=0, atol=5e-6)
  np.testing.assert_allclose(state.kv, last.kv, rtol=0, atol=5e-5)
  assert state.kv.shape == (B, N, H, E) and state.k.shape == (B, N, H)  # whatever the length


def test_later_tokens_do_not_matter():
  q, k, v = arrays()
  before, _ = linear_attention(q, k, v)
  k[:, 7:], v[:, 7:] = 9, 9
  after, _ = linear_attention(q, k, v)
  np.testing.assert_array_equal(after[:, :7], before[:, :7])
  assert np.max(np.abs(after[:, 7:] - before[:, 7:])) > 0.1


def test_features_are_elu_plus_one():
  x = np.array([-20.0, -1.0, 0.0, 2.5], np.float32)
  np.testing.assert_allclose(feature_map(x), [np.exp(-20.0), np.exp(-1.0), 1.0, 3.5], rtol=1e-6, atol=1e-7)
  assert feature_map(jnp.zeros(2, jnp.bfloat16)).dtype == jnp.float32
