"""Sinusoidal and learned embeddings: the published formula, exact everywhere, and a table that ends where it ends."""

import components
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

from jaxllm.errors import ConfigError
from jaxllm.position import POSITIONS

SINUSOIDAL, LEARNED = POSITIONS["sinusoidal"](), POSITIONS["learned"](max_length=5)


def encoding(pos, D, method=SINUSOIDAL):
  """[T, D] of one sequence."""
  pos = jnp.asarray(pos, jnp.int32)[None]
  return np.asarray(jax.jit(lambda pos: method.embed(jnp.zeros((1, pos.shape[1], D)), pos, {}))(pos))[0]


@pytest.mark.core
def test_written_out():
  """D = 4: sin p, cos p, sin p / 100, cos p / 100."""
  p = np.arange(3.0)
  expected = np.stack([np.sin(p), np.cos(p), np.sin(p / 100), np.cos(p / 100)], axis=-1)
  np.testing.assert_allclose(encoding(range(3), 4), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("D", "base"), [(24, 100.0), (128, 10000.0)])
def test_exact_at_every_position(D, base):
  """Against fifty digits, from 0 to the last int32."""
  pos = [0, 1, 7, 1000, 100_003, 2**24 + 1, 2**31 - 1]
  with mpmath.workdps(50):
    angle = lambda p, c: mpmath.mpf(p) / mpmath.mpf(base) ** (mpmath.mpf(c - c % 2) / D)
    of = lambda c: mpmath.cos if c % 2 else mpmath.sin
    expected = np.array([[float(of(c)(angle(p, c))) for c in range(D)] for p in pos])
  # 1e-7 of the angles' words, and what the float64 frequency itself is off by: 2^31 times half its last bit
  found = encoding(pos, D, POSITIONS["sinusoidal"](base))
  components.measured_close("sinusoidal", "fifty digits", found, expected, atol=4e-7)


def test_a_shift_is_one_linear_map():
  """PE(p + 5) = M PE(p) for all p, M a block of 2 x 2 turns: why the formula was chosen (section 3.5)."""
  here, there = encoding(range(64), 16).astype(np.float64), encoding(range(5, 69), 16).astype(np.float64)
  M, *_ = np.linalg.lstsq(here, there, rcond=None)
  np.testing.assert_allclose(here @ M, there, rtol=0, atol=1e-5)


def test_added_to_the_embeddings():
  x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 8)), jnp.float32)
  pos = jnp.array([[0, 1, 2], [4, 0, 9]], jnp.int32)
  found = np.asarray(SINUSOIDAL.embed(x, pos, {}))
  for b in range(2):
    np.testing.assert_allclose(found[b] - np.asarray(x)[b], encoding(pos[b], 8), rtol=0, atol=1e-6)


@pytest.mark.core
@pytest.mark.component("learned")
def test_a_learned_row_a_position():
  table = jnp.asarray(np.random.default_rng(0).standard_normal((5, 4)), jnp.float32)
  pos = jnp.array([[0, 4, 2]], jnp.int32)
  found = LEARNED.embed(jnp.ones((1, 3, 4)), pos, {"table": table})
  np.testing.assert_array_equal(found[0], 1 + np.asarray(table)[[0, 4, 2]])


@pytest.mark.component("learned")
def test_rows_before_the_first_position():
  """OPT's table has two more rows than positions; what is beyond is NaN all the same."""
  table = jnp.asarray(np.random.default_rng(0).standard_normal((7, 4)), jnp.float32)
  method = POSITIONS["learned"](max_length=5, offset=2)
  found = method.embed(jnp.ones((1, 4, 4)), jnp.array([[0, 4, 2, 5]], jnp.int32), {"table": table})
  np.testing.assert_array_equal(found[0, :3], 1 + np.asarray(table)[[2, 6, 4]])
  assert np.isnan(found[0, 3]).all() and method.length_limit == 5


@pytest.mark.parametrize("bad", [None, -1, 2.0, True])
def test_bad_offset(bad):
  with pytest.raises(ConfigError, match=f"Learned.offset: found {bad!r}, expected an integer of at least 0"):
    POSITIONS["learned"](max_length=5, offset=bad)


def test_beyond_the_table_is_nan_and_not_the_last_row():
  found = LEARNED.embed(jnp.zeros((1, 3, 4)), jnp.array([[4, 5, 99]]), {"table": jnp.ones((5, 4))})
  assert np.isfinite(found[0, 0]).all() and np.isnan(found[0, 1:]).all()


@pytest.mark.parametrize("bad", [None, 0, -1, 2.0, True])
def test_bad_max_length(bad):
  with pytest.raises(
    ConfigError, match=f"Learned.max_length: found {bad!r}, expected an integer of at least 1"
  ):
    POSITIONS["learned"](max_length=bad)


def test_bad_sinusoids():
  with pytest.raises(ConfigError, match=r"Sinusoidal.base: found 1, expected a number above 1"):
    POSITIONS["sinusoidal"](base=1)
  with pytest.raises(ConfigError, match="embed_dim: found 7, expected an even number"):
    encoding(range(3), 7)
