"""cos and sin at every int32 position against exact arithmetic, and two wrong ways that must be caught."""

import decimal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.position import POSITIONS
from jaxllm.position.phase import cos_sin, words

BOUND = 1e-7 if jax.default_backend() == "cpu" else 1.1e-7  # an H200 rounds otherwise: 1.05e-7 at worst
PI = decimal.Decimal(
  "3.141592653589793238462643383279502884197169399375105820974944592307816406286208998628034825342117"
)

EDGES = [0, 1, 255, 256, 257, 4095, 10**6, *range(2**24 - 2, 2**24 + 3), 2**30, 2**31 - 1]
RANDOM = np.random.default_rng(0).integers(0, 2**31, 48).tolist()
NEAR = np.random.default_rng(1).integers(0, 2**17, 48).tolist()
POS = np.asarray([*EDGES, *RANDOM, *NEAR], np.int32)

TABLES = [
  ("rope", 128, dict(base=10000.0)),
  ("rope", 24, dict(base=1000000.0)),
  ("rope", 64, dict(base=1.5)),
  ("pi", 64, dict(base=500000.0, factor=32.0)),
  ("pi", 24, dict(base=10000.0, factor=0.01)),  # more than one radian a position
  ("ntk_mixed", 128, dict(base=10000.0, factor=8.0)),
  ("yarn", 128, dict(base=10000.0, factor=16.0, original_length=4096)),
]
TABLE_CASES = [
  pytest.param(*case, id=f"{case[0]}-d{case[1]}-{i}", marks=[pytest.mark.core] * (i == 0))
  for i, case in enumerate(TABLES)
]


def oracle(pos, inv_freq):
  """cos and sin of pos * inv_freq, float64 [P, F]: the product of the two exactly, reduced at 90 digits."""
  with decimal.localcontext() as context:
    context.prec = 90
    freqs = [decimal.Decimal(float(f)) for f in inv_freq]
    angle = np.array([[float((int(p) * f) % (2 * PI)) for f in freqs] for p in pos])
  return np.cos(angle), np.sin(angle)


def worst(found, expected):
  """Largest error of (cos, sin)."""
  return max(np.max(np.abs(np.asarray(f, np.float64) - e)) for f, e in zip(found, expected, strict=True))


def frequencies(name, rotary_dim, kw):
  return POSITIONS[name](**kw).frequencies(rotary_dim)[0]


@pytest.mark.core
def test_the_oracle_agrees_with_mpmath(golden):
  rows = golden["rope"]["angles"]
  for row in rows:
    cos, sin = oracle([row["pos"]], [row["inv_freq"]])
    # the reduced angle, up to 2 pi, is rounded to float64 by up to 4.4e-16 before its cos is taken
    np.testing.assert_allclose([cos[0, 0], sin[0, 0]], [row["cos"], row["sin"]], rtol=0, atol=6e-16)


@pytest.mark.core
def test_rows_of_mpmath(golden):
  """The golden angles directly, without this file's oracle."""
  rows = golden["rope"]["angles"]
  hi, lo = words(np.array([row["inv_freq"] for row in rows]))
  found = jax.jit(jax.vmap(cos_sin))(
    np.array([row["pos"] for row in rows], np.int32), hi[:, None], lo[:, None]
  )
  expected = [np.array([[row[key]] for row in rows]) for key in ("cos", "sin")]
  assert worst(found, expected) <= BOUND


@pytest.mark.parametrize("name, rotary_dim, kw", TABLE_CASES)
def test_within_the_bound_at_every_position(name, rotary_dim, kw):
  """Positions are traced."""
  inv_freq = frequencies(name, rotary_dim, kw)
  hi, lo = words(inv_freq)
  assert hi.dtype == lo.dtype == np.uint32 and hi.shape == lo.shape == inv_freq.shape
  found = jax.jit(cos_sin)(POS, hi, lo)
  assert [f.dtype for f in found] == [jnp.float32] * 2 and found[0].shape == (len(POS), rotary_dim // 2)
  assert worst(found, oracle(POS, inv_freq)) <= BOUND


def test_within_the_bound_at_each_of_the_first_positions():
  """All 131072 of them; here float64 is good to 1.5e-11, so it serves as the reference."""
  inv_freq = frequencies("rope", 32, {})
  pos = np.arange(2**17, dtype=np.int32)
  angle = pos[:, None] * inv_freq
  assert worst(jax.jit(cos_sin)(pos, *words(inv_freq)), (np.cos(angle), np.sin(angle))) <= BOUND


def test_within_the_bound_without_jit():
  inv_freq = frequencies("rope", 64, {})
  assert worst(cos_sin(jnp.asarray(POS), *words(inv_freq)), oracle(POS, inv_freq)) <= BOUND


def test_batched_over_tables():
  """One program for every method at once: the words are data."""
  table = [frequencies(name, 64, kw) for name, _, kw in TABLES]
  hi, lo = words(np.stack(table))
  cos, sin = jax.jit(jax.vmap(cos_sin, in_axes=(None, 0, 0)))(POS, hi, lo)
  for i, inv_freq in enumerate(table):
    assert worst((cos[i], sin[i]), oracle(POS, inv_freq)) <= BOUND


def test_shapes_of_positions_and_a_loop():
  """A scalar inside a fori_loop, as decoding has it, gives the row that the batch gives, bit for bit."""
  hi, lo = words(frequencies("rope", 64, {}))
  batch = jax.jit(cos_sin)(jnp.arange(40, dtype=jnp.int32).reshape(2, 20) + 2**24, hi, lo)
  assert batch[0].shape == (2, 20, 32)

  def step(i, out):
    return jnp.stack(cos_sin(i + 2**24, hi, lo)) + 0 * out

  one = jax.jit(lambda n: jax.lax.fori_loop(0, n, step, jnp.zeros((2, 32))))(27)
  np.testing.assert_array_equal(one, jnp.stack(batch)[:, 1, 6])


def test_position_zero_is_the_identity():
  """cos 1 and sin 0, exactly."""
  cos, sin = cos_sin(jnp.int32(0), *words(frequencies("rope", 128, {})))
  np.testing.assert_array_equal(cos, 1.0)
  np.testing.assert_array_equal(sin, 0.0)


@pytest.mark.parametrize("around", [256, 2**24, 2**30, 2**31 - 3])
def test_neighbours_differ(around):
  pos = np.arange(around - 2, around + 3).astype(np.int32)
  cos, sin = jax.jit(cos_sin)(pos, *words(frequencies("rope", 128, {})))
  assert len(np.unique(np.concatenate([cos, sin], axis=1)[:, [0, 64]], axis=0)) == len(pos)


def test_all_of_a_long_context_are_distinct():
  """The count that a bfloat16 model gets wrong: 769 different rotations for 4096 positions."""
  for length in (4096, 32768):
    cos, sin = jax.jit(cos_sin)(np.arange(length, dtype=np.int32), *words(frequencies("rope", 64, {})))
    assert len(np.unique(np.concatenate([cos, sin], axis=1), axis=0)) == length


def float32_angles(pos, inv_freq):
  """What a plain float32 program computes."""
  angle = pos.astype(jnp.float32)[:, None] * jnp.asarray(inv_freq, jnp.float32)[None, :]
  return jnp.cos(angle), jnp.sin(angle)


def bfloat16_positions(pos, inv_freq):
  """The mixed-precision bug: positions in the model's dtype."""
  # by reduce_precision, as a compiler may drop a cast down that is followed by one up
  return float32_angles(jax.lax.reduce_precision(pos.astype(jnp.float32), 8, 7), inv_freq)


@pytest.mark.core
@pytest.mark.parametrize(
  "wrong, limit, error",
  [(float32_angles, 4096, 1e-4), (float32_angles, 2**24, 0.1), (bfloat16_positions, 4096, 1.0)],
)
def test_the_wrong_ways_are_caught(wrong, limit, error):
  """Negative controls: they break the bound by orders of magnitude within the positions this file checks."""
  inv_freq = frequencies("rope", 128, {})
  pos = np.unique(np.append(POS[limit > POS], np.arange(limit - 64, limit))).astype(np.int32)
  expected = oracle(pos, inv_freq)
  assert worst(jax.jit(wrong)(pos, inv_freq), expected) > max(error, BOUND)
  assert worst(jax.jit(cos_sin)(pos, *words(inv_freq)), expected) <= BOUND


def test_the_wrong_ways_merge_positions():
  inv_freq = frequencies("rope", 128, {})

  def distinct(way, pos):
    return len(np.unique(np.concatenate(jax.jit(way)(pos, inv_freq), axis=1), axis=0))

  assert distinct(bfloat16_positions, np.arange(4096, dtype=np.int32)) == 769
  assert distinct(float32_angles, np.arange(2**24 - 2, 2**24 + 3).astype(np.int32)) < 5


def test_words_are_the_turns_of_a_position():
  """hi * 2^-32 + lo * 2^-64 is inv_freq / 2 pi modulo 1, to 2^-64."""
  inv_freq = np.concatenate([frequencies(name, 64, kw) for name, _, kw in TABLES] + [np.array([7.0, 100.0])])
  hi, lo = words(inv_freq)
  with decimal.localcontext() as context:
    context.prec = 90
    for f, h, low in zip(inv_freq, hi, lo, strict=True):
      turns = decimal.Decimal(float(f)) / (2 * PI) % 1
      assert abs(turns * 2**64 - (int(h) * 2**32 + int(low))) <= 1
