"""What every rotation must do to queries and keys: one table of methods, the same properties over all."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import ConfigError
from jaxllm.position import POSITIONS
from jaxllm.position.tables import make_table

HEAD_DIM = 64
ROWS = 256  # one shape for all: eager JAX compiles an operation once a shape, and jit once a method

# (method, fields, the length that its frequencies are pinned at)
METHODS = [
  ("rope", dict(), None),
  ("rope", dict(base=500000.0, rotary_dim=32), None),
  ("pi", dict(factor=8.0), None),
  ("ntk_old", dict(factor=8.0), None),
  ("ntk", dict(factor=8.0, rotary_dim=32), None),
  ("ntk_fixed", dict(factor=8.0), None),
  ("ntk_mixed", dict(factor=8.0), None),
  ("dynamic_ntk", dict(factor=2.0, original_length=128), 1024),
  ("yarn", dict(factor=8.0, original_length=128), None),
  ("yarn", dict(factor=4.0, original_length=2048, attention_factor=0.5, rotary_dim=32), None),
  ("ntk_by_parts", dict(factor=8.0, original_length=2048), None),
  ("llama3", dict(factor=8.0, original_length=2048), None),
  (
    "longrope",
    dict(original_length=128, factor=8.0, short_factor=(1.0,) * 32, long_factor=(1.0, 7.0) * 16),
    1024,
  ),
  ("rerope", dict(window=16), None),
]
CASES = [
  pytest.param(
    (name, kw | dict(layout=layout), seq_len),
    id=f"{name}-{i}-{layout}",
    marks=[pytest.mark.core] * (name == "yarn" and layout == "half" and "rotary_dim" not in kw),
  )
  for i, (name, kw, seq_len) in enumerate(METHODS)
  for layout in ("half", "interleaved")
]
each_method = pytest.mark.parametrize("case", CASES)


def build(case):
  """(method, table, rotary_dim, scale on q and on k)."""
  name, kw, seq_len = case
  method = POSITIONS[name](**kw)
  rotary_dim = method.rotary_dim or HEAD_DIM
  inv_freq, scale = method.frequencies(rotary_dim, seq_len)
  return method, make_table([(inv_freq, scale)]), rotary_dim, scale


def random(seed, shape, dtype=np.float32):
  return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def norms(x):
  return np.linalg.norm(np.asarray(x, np.float64), axis=-1)


def turn(hook, x, pos, table):
  """The hook on rows [ROWS, HEAD_DIM] at their positions (or at one), as a sequence with one head."""
  pos = np.broadcast_to(np.asarray(pos, np.int32), ROWS)
  return np.array(hook(jnp.asarray(x)[None, :, None], jnp.asarray(pos)[None], table))[0, :, 0]


def inner(method, table, q, k, q_pos, k_pos):
  """<rotate_q(q, q_pos), rotate_k(k, k_pos)> of each row, in float64."""
  q, k = turn(method.rotate_q, q, q_pos, table), turn(method.rotate_k, k, k_pos, table)
  return np.sum(q.astype(np.float64) * k.astype(np.float64), axis=-1)


@pytest.mark.core
@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("hook", ["rotate_q", "rotate_k"])
def test_golden_vector(layout, hook, golden, table_of):
  method = POSITIONS["rope"](layout=layout)
  x = jnp.arange(4, dtype=jnp.float32).reshape(1, 1, 1, 4)
  out = getattr(method, hook)(x, jnp.ones((1, 1), jnp.int32), table_of(method, 4))
  np.testing.assert_allclose(out[0, 0, 0], golden["rope"]["vectors"][layout], rtol=0, atol=3e-7)


@each_method
def test_inner_products_depend_on_the_distance_only(case):
  """To 1e-6 of |q||k| for shifts up to a million and to the last position."""
  method, table, _, scale = build(case)
  rng = np.random.default_rng(2)
  q, k = random(0, (ROWS, HEAD_DIM)), random(1, (ROWS, HEAD_DIM))
  q_pos, k_pos = rng.integers(0, 4096, (2, ROWS))
  here = inner(method, table, q, k, q_pos, k_pos)
  for shift in (1, 1000, 2**24 - 2048, 10**6, 2**31 - 1 - 4096):
    there = inner(method, table, q, k, q_pos + shift, k_pos + shift)
    assert np.max(np.abs(there - here) / (norms(q) * norms(k))) <= 1e-6 * max(1.0, scale**2)


@pytest.mark.core
def test_float32_angles_break_the_shift_bound():
  """The negative control of the test above: a plain float32 rotation drifts by a hundred times the bound."""
  q, k = random(0, (ROWS, HEAD_DIM)), random(1, (ROWS, HEAD_DIM))
  q_pos, k_pos = np.random.default_rng(2).integers(0, 4096, (2, ROWS))
  inv_freq, _ = POSITIONS["rope"]().frequencies(HEAD_DIM)

  def rotate(x, pos):
    angle = np.asarray(pos, np.float32)[:, None] * inv_freq.astype(np.float32)
    pair = (x[:, : HEAD_DIM // 2] + 1j * x[:, HEAD_DIM // 2 :]) * np.exp(1j * angle.astype(np.float64))
    return np.concatenate([pair.real, pair.imag], axis=1)

  def score(shift):
    return np.sum(rotate(q, q_pos + shift) * rotate(k, k_pos + shift), axis=1)

  drift = np.max(np.abs(score(10**6) - score(0)) / (norms(q) * norms(k)))
  assert drift > 1e-4


@each_method
def test_rotations_keep_the_norm(case):
  """Times the scale on the rotated coordinates, which YaRN and LongRoPE have."""
  method, table, rotary_dim, scale = build(case)
  x, pos = random(3, (ROWS, HEAD_DIM)), np.random.default_rng(4).integers(0, 2**31, ROWS)
  for hook in (method.rotate_q, method.rotate_k):
    out = turn(hook, x, pos, table)
    np.testing.assert_allclose(norms(out[:, :rotary_dim]), scale * norms(x[:, :rotary_dim]), rtol=1e-6)


@each_method
def test_the_rotation_matrix_is_scale_times_orthogonal(case):
  """The hook is linear in its rows, so the rows of the identity give the matrix."""
  method, table, rotary_dim, scale = build(case)
  matrix = turn(method.rotate_q, np.tile(np.eye(HEAD_DIM, dtype=np.float32), (4, 1)), 12345, table)[:HEAD_DIM]
  expected = np.diag([scale**2] * rotary_dim + [1.0] * (HEAD_DIM - rotary_dim))
  np.testing.assert_allclose(matrix @ matrix.T.astype(np.float64), expected, rtol=0, atol=1e-6)
  x = random(5, (ROWS, HEAD_DIM))
  np.testing.assert_allclose(turn(method.rotate_q, x, 12345, table), x @ matrix, rtol=0, atol=1e-5)


@each_method
def test_rotations_add_up(case):
  """R(a) R(b) = R(a + b), and position 0 turns nothing."""
  method, table, rotary_dim, scale = build(case)
  x = random(6, (ROWS, HEAD_DIM))
  a, b = np.random.default_rng(7).integers(0, 2**30, (2, ROWS))
  twice = turn(method.rotate_q, turn(method.rotate_q, x, a, table), b, table)
  once = turn(method.rotate_q, x, a + b, table)
  once[:, :rotary_dim] *= scale
  assert np.max(norms(twice - once) / norms(x)) <= 1e-6
  still = turn(method.rotate_q, x, 0, table)
  np.testing.assert_array_equal(still[:, :rotary_dim], np.float32(scale) * x[:, :rotary_dim])


@each_method
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_coordinates_beyond_rotary_dim_are_bit_equal(case, dtype):
  method, table, rotary_dim, _ = build(case)
  x = np.asarray(jnp.asarray(random(8, (ROWS, HEAD_DIM)), dtype))
  for hook in (method.rotate_q, method.rotate_k):
    out = turn(hook, x, 1 + np.arange(ROWS), table)
    assert out.shape == x.shape and out.dtype == x.dtype
    np.testing.assert_array_equal(out[:, rotary_dim:], x[:, rotary_dim:])
    assert np.all(np.any(out[:, :rotary_dim] != x[:, :rotary_dim], axis=1))


@pytest.mark.parametrize("case", [c for c in CASES if "half" in c.id])
def test_layouts_are_equal_by_permutation(case):
  """Interleaved coordinates (2i, 2i + 1) are the half layout's (i, i + R/2), bit for bit."""
  method, table, R, _ = build(case)
  interleaved = dataclasses.replace(method, layout="interleaved")
  order = np.concatenate([np.arange(R).reshape(2, R // 2).T.ravel(), np.arange(R, HEAD_DIM)])
  x, pos = random(9, (ROWS, HEAD_DIM)), np.random.default_rng(9).integers(0, 2**31, ROWS)
  for name in ("rotate_q", "rotate_k"):
    half = turn(getattr(method, name), x, pos, table)
    np.testing.assert_array_equal(turn(getattr(interleaved, name), x[:, order], pos, table), half[:, order])


@pytest.mark.core
@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_bfloat16_queries_keep_float32_angles(layout, table_of):
  """A shift by 3000 moves q . k by at most .005 of |q||k|; with bfloat16 positions by ten times that."""
  method = POSITIONS["rope"](layout=layout)
  table = table_of(method, HEAD_DIM)
  q, k = (np.asarray(jnp.asarray(random(s, (ROWS, HEAD_DIM)), jnp.bfloat16)) for s in (10, 11))
  m, n = np.random.default_rng(12).integers(0, 1000, (2, ROWS))

  def drift(cast):
    one, two = (inner(method, table, q, k, cast(m + s), cast(n + s)) for s in (0, 3000))
    return np.max(np.abs(one - two) / (norms(q) * norms(k)))

  assert drift(np.asarray) <= 0.005
  assert drift(lambda pos: np.asarray(jnp.asarray(pos, jnp.bfloat16).astype(jnp.int32))) > 0.05


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_factor_one_rotates_as_rope_does(layout, table_of):
  """Bit for bit, on the device too."""
  x, pos = random(13, (ROWS, HEAD_DIM)), np.random.default_rng(13).integers(0, 2**31, ROWS)
  rope = POSITIONS["rope"](layout=layout)
  expected = turn(rope.rotate_q, x, pos, table_of(rope, HEAD_DIM))
  scalings = (
    "pi",
    "ntk_old",
    "ntk",
    "ntk_fixed",
    "ntk_mixed",
    "dynamic_ntk",
    "yarn",
    "ntk_by_parts",
    "llama3",
    "proportional",
  )
  for name in scalings:
    method = POSITIONS[name](layout=layout, factor=1.0, original_length=512)
    np.testing.assert_array_equal(turn(method.rotate_q, x, pos, table_of(method, HEAD_DIM)), expected)


@pytest.mark.core
def test_one_program_serves_every_scaling():
  """Tables are data of one structure: a jitted function is traced once, and vmap batches all methods."""
  methods = [build(c.values[0]) for c in CASES if "half" in c.id and "rotary_dim" not in c.values[0][1]]
  x, pos = random(14, (ROWS, HEAD_DIM)), np.arange(ROWS) * 1000
  traces = []

  @jax.jit
  def program(table):
    traces.append(1)
    return POSITIONS["rope"]().rotate_q(x[None, :, None], pos[None].astype(np.int32), table)

  alone = np.stack([program(table) for _, table, _, _ in methods])
  assert len(methods) > 6 and len(traces) == 1
  for (method, table, _, _), out in zip(methods, alone, strict=True):
    np.testing.assert_allclose(out[0, :, 0], turn(method.rotate_q, x, pos, table), rtol=0, atol=1e-6)
  stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *[table for _, table, _, _ in methods])
  np.testing.assert_allclose(jax.vmap(program)(stacked), alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rotary_dim", [10, 64])
def test_rotary_dim_beyond_the_head_is_refused(rotary_dim, table_of):
  method = POSITIONS["rope"](rotary_dim=rotary_dim)
  with pytest.raises(ConfigError, match=rf"rotary_dim.*{rotary_dim}.*expected.*8"):
    x, pos = jax.ShapeDtypeStruct((1, 1, 1, 8), jnp.float32), jax.ShapeDtypeStruct((1, 1), jnp.int32)
    jax.eval_shape(method.rotate_q, x, pos, table_of(method, rotary_dim))
