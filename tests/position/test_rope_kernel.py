"""What the rotations of RoPE amount to: an orthogonal Jacobian, a Toeplitz kernel, and the published decay with distance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.position import POSITIONS
from jaxllm.position.phase import cos_sin, words

ROPE = POSITIONS["rope"]()
# distance: mean over i of |S_i|, S_i the sum of e^(i m theta_j) over the first i pairs, at d = 128 (RoFormer, section 3.4.3)
DECAY = {0: 32.5, 1: 31.5, 8: 19.8, 64: 10.1, 256: 6.54, 1024: 4.02, 4096: 4.88}


@pytest.mark.core
def test_the_bound_decays_with_distance_but_not_monotonically():
  """As printed, to three digits; 4.88 after 4.02 is no misprint."""
  cos, sin = cos_sin(jnp.asarray(list(DECAY), jnp.int32), *words(ROPE.frequencies(128)[0]))
  sums = np.cumsum(np.asarray(cos, np.float64) + 1j * np.asarray(sin, np.float64), axis=-1)
  for found, (distance, printed) in zip(np.abs(sums).mean(-1), DECAY.items(), strict=True):
    assert abs(found - printed) <= (0.05 if printed >= 10 else 0.005), (distance, found)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("pos", [1, 4095, 10**6])
def test_the_jacobian_is_orthogonal_and_the_same_everywhere(layout, pos, table_of):
  method = POSITIONS["rope"](layout=layout)
  table, at = table_of(method, 16), jnp.full((1, 1), pos, jnp.int32)
  turn = lambda x_H: method.rotate_q(x_H[None, None, None], at, table)[0, 0, 0]
  jacobian = jax.jit(jax.jacfwd(turn))
  x = np.random.default_rng(0).standard_normal((2, 16)).astype(np.float32)
  J = np.asarray(jacobian(x[0]), np.float64)
  np.testing.assert_allclose(J.T @ J, np.eye(16), rtol=0, atol=3e-7)
  np.testing.assert_array_equal(jacobian(x[1]), J)
  assert np.abs(J - np.eye(16)).max() > 0.5


@pytest.mark.parametrize("first", [0, 10**6])
def test_the_kernel_of_constant_queries_and_keys_is_toeplitz(first, table_of):
  """And its diagonals are those of the closed form, sum over pairs of (q . k) cos + (q x k) sin."""
  T, H = 32, 16
  q, k = np.random.default_rng(0).standard_normal((2, H)).astype(np.float32)
  pos = first + np.arange(T, dtype=np.int32)[None]
  same = lambda x: np.broadcast_to(x, (1, T, 1, H))
  found = np.asarray(ROPE.scores(same(q), same(k), pos, pos, table_of(ROPE, H), {}))[0, 0, 0]
  bound = 1e-6 * np.linalg.norm(q) * np.linalg.norm(k)
  (q0, q1), (k0, k1) = (x.astype(np.float64).reshape(2, H // 2) for x in (q, k))
  theta = 10000.0 ** (-np.arange(H // 2) / (H // 2))
  for distance in range(1 - T, T):  # of the query from the key
    diagonal = np.diagonal(found, -distance)
    assert np.ptp(diagonal) <= 2 * bound
    turned = (q0 * k0 + q1 * k1) * np.cos(distance * theta) + (q0 * k1 - q1 * k0) * np.sin(distance * theta)
    assert np.abs(diagonal - turned.sum()).max() <= 2 * bound
  assert np.ptp(found) > 1


def test_the_critical_dimension_of_llama_2():
  """92 of 128: the coordinates that turn once within 4096 tokens, 2 ceil(d/2 log_base(L / 2 pi)).  The rest never did."""
  inv_freq, _ = ROPE.frequencies(128)
  assert 2 * np.count_nonzero(2 * np.pi / inv_freq < 4096) == 92
