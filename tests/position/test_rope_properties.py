"""Laws of rotations for any base, factor, position and value; shapes come from short lists."""

import functools
import math

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import LAST, PAIRS, SCALINGS, bases, examples, factors, fields_of, lengths, numbers, scalings

from jaxllm.position import POSITIONS
from jaxllm.position.phase import cos_sin, words
from jaxllm.position.tables import make_table

T, HEAD = 4, 24
LAYOUTS = ("half", "interleaved")
shapes = st.tuples(st.sampled_from(PAIRS), st.sampled_from(LAYOUTS))
positions = st.integers(0, LAST)


@functools.partial(jax.jit, static_argnums=0)
def rotate(layout, x, pos, table):
  return POSITIONS["rope"](layout=layout).rotate_q(x[None, :, None], pos[None], table)[0, :, 0]


def turn(layout, x, pos, table):
  """x [T, HEAD] turned by `pos`, one number or T of them."""
  return np.asarray(rotate(layout, x, np.broadcast_to(np.int64(pos), T).astype(np.int32), table), np.float64)


def norms(x):
  return np.linalg.norm(np.asarray(x, np.float64), axis=-1)


def table_of(method, pairs, seq_len=None):
  inv_freq, scale = method.frequencies(2 * pairs, seq_len)
  return make_table([(inv_freq, scale)]), scale


@st.composite
def cases(draw):
  """(layout, rotary_dim, table, scale) of any method."""
  pairs, layout = draw(shapes)
  method = draw(scalings(pairs))
  return layout, 2 * pairs, *table_of(method, pairs, draw(st.none() | lengths))


@given(cases(), numbers((T, HEAD)), st.lists(positions, min_size=T, max_size=T))
@examples(40)
def test_rotations_keep_the_norm(case, x, pos):
  """Times the scale; for a pair alone too, as no pair sees another."""
  layout, R, table, scale = case
  found = turn(layout, x, pos, table)
  pairs = lambda x: x[:, :R].reshape(T, *((2, -1) if layout == "half" else (-1, 2)))
  axis = 1 if layout == "half" else 2
  expected = scale * np.linalg.norm(pairs(x.astype(np.float64)), axis=axis)
  np.testing.assert_allclose(np.linalg.norm(pairs(found), axis=axis), expected, rtol=1e-6, atol=1e-36)


@given(cases(), numbers((T, HEAD)), positions, positions)
@examples(40)
def test_rotations_add_up(case, x, a, b):
  """R(a) R(b) = R(a + b), to the last position."""
  a = a % (LAST - b + 1)
  layout, R, table, scale = case
  twice = turn(layout, turn(layout, x, a, table).astype(np.float32), b, table)
  once = turn(layout, x, a + b, table)
  once[:, :R] *= scale
  assert np.all(norms(twice - once) <= 1e-6 * max(1, scale) ** 2 * norms(x) + 1e-36)


@given(cases(), numbers((2, T, HEAD)), *[st.integers(0, 4096)] * 2, st.integers(0, 10**6))
@examples(40)
def test_inner_products_know_the_distance_only(case, qk, m, n, shift):
  """For shifts up to a million, to 1e-6 of |q||k|."""
  (layout, _, table, scale), (q, k) = case, qk
  score = lambda s: np.sum(turn(layout, q, m + s, table) * turn(layout, k, n + s, table), axis=-1)
  assert np.all(np.abs(score(shift) - score(0)) <= 1e-6 * max(1, scale) ** 2 * norms(q) * norms(k) + 1e-36)


@given(st.sampled_from(PAIRS), numbers((2, T, HEAD)), positions, st.integers(-4096, 4096))
@examples(40)
def test_a_turned_pair_is_a_complex_product(pairs, qk, m, distance):
  """Which is the definition: sum over pairs of Re q conj(k) e^(i (m - n) theta), in float64."""
  R, n = 2 * pairs, min(max(m - distance, 0), LAST)
  (table, _), (q, k) = table_of(POSITIONS["rope"](), pairs), qk
  found = np.sum(turn("half", q, m, table) * turn("half", k, n, table), axis=-1)
  complex_pairs = lambda x: x[:, :pairs].astype(np.float64) + 1j * x[:, pairs:R]
  theta = 10000.0 ** (-np.arange(pairs) / pairs)
  product = complex_pairs(q) * np.conj(complex_pairs(k)) * np.exp(1j * (m - n) * theta)
  rest = np.sum(q[:, R:].astype(np.float64) * k[:, R:], axis=-1)
  assert np.all(np.abs(found - product.real.sum(-1) - rest) <= 1e-6 * norms(q) * norms(k) + 1e-36)


@given(
  cases(),
  numbers((T, HEAD)),
  st.lists(st.sampled_from([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45]), min_size=T, max_size=T),
  positions,
  st.sampled_from(["float32", "bfloat16"]),
)
@examples(40)
def test_coordinates_beyond_rotary_dim_keep_their_bits(case, x, special, pos, dtype):
  """Those of NaN, infinities and subnormal numbers too."""
  layout, R, table, _ = case
  x = x.copy()
  x[:, -1] = special
  x = np.asarray(jnp.asarray(x, dtype))
  found = np.asarray(rotate(layout, x, np.full(T, pos, np.int32), table))
  bits = np.uint32 if dtype == "float32" else np.uint16
  assert found.dtype == x.dtype
  np.testing.assert_array_equal(found[:, R:].view(bits), x[:, R:].view(bits))


@given(st.integers(0, LAST), st.floats(1e-9, 4.0))
@examples(100)
def test_angles_are_exact(pos, inv_freq):
  """cos and sin to 1e-7 of fifty digits, for any frequency and position."""
  found = np.asarray(jax.jit(cos_sin)(np.full((1,), pos, np.int32), *words(np.full(PAIRS[0], inv_freq))))[
    :, 0, 0
  ]
  with mpmath.workdps(50):
    angle = mpmath.mpf(pos) * mpmath.mpf(inv_freq)
    expected = [float(mpmath.cos(angle)), float(mpmath.sin(angle))]
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", SCALINGS)
@given(st.data(), st.integers(1, 64), bases, lengths)
@examples(25)
def test_factor_one_is_plain(name, data, pairs, base, length):
  """Bit for bit, whatever the other fields are, and so on the device as well; LongRoPE needs lists of ones."""
  fields = data.draw(fields_of(name, pairs))
  if name == "longrope":
    fields = dict.fromkeys(fields, (1.0,) * pairs)
  method = POSITIONS[name](base=base, factor=1.0, original_length=length, **fields)
  seq_len = data.draw(st.none() | st.integers(1, length if name == "dynamic_ntk" else 4 * length))
  inv_freq, scale = method.frequencies(2 * pairs, seq_len)
  plain, one = POSITIONS["rope"](base=base).frequencies(2 * pairs)
  np.testing.assert_array_equal(inv_freq, plain)
  assert scale == one == 1.0


@given(bases, st.integers(2, 2**16), st.integers(1, 2**16))
@examples(50)
def test_the_factor_that_changes_nothing_beyond_a_window(base, length, window):
  """Groups of one token for Self-Extend's 1, and a step of one for inverse leaky ReRoPE's 1/2."""
  fields = dict(base=base, original_length=length, window=1 + window % (length - 1))
  assert POSITIONS["self_extend"](factor=1.0, **fields).size == 1
  (inv_freq, _), (far, _), (offset, _) = POSITIONS["inv_leaky_rerope"](factor=0.5, **fields).rows(8)[1]
  np.testing.assert_array_equal(far, inv_freq)
  np.testing.assert_array_equal(offset, 0.0)


def test_every_method_with_a_factor_is_here():
  with_factor = {name for name, cls in POSITIONS.items() if "factor" in cls.__dataclass_fields__}
  assert with_factor == {*SCALINGS, "self_extend", "inv_leaky_rerope"}


@given(st.integers(2, 64), bases, factors, st.floats(0.0, 1.0))
@examples(40)
def test_the_ends_of_ntk(pairs, base, factor, exponent):
  """The first frequency stays and the last falls by exactly the factor; those of the sequels fall by it as well."""
  R, fields = 2 * pairs, dict(base=base, factor=factor)
  ratio = lambda name, **kw: (
    POSITIONS[name](**fields, **kw).frequencies(R)[0] / POSITIONS["rope"](base).frequencies(R)[0]
  )
  first = {"ntk": 1.0, "ntk_old": 1.0, "ntk_fixed": factor ** (-2 / R), "pi": 1 / factor}
  last = {"ntk": 1 / factor, "ntk_old": factor ** -((R - 2) / R), "ntk_fixed": 1 / factor, "pi": 1 / factor}
  for name in first:
    ends = ratio(name)[[0, -1]]
    np.testing.assert_allclose(ends, [first[name], last[name]], rtol=1e-12, atol=0, err_msg=name)
  np.testing.assert_allclose(ratio("ntk_mixed", exponent=exponent)[-1], 1 / factor, rtol=1e-12, atol=0)


ROWS = 12


@given(st.integers(2, 2**20), bases, factors, st.integers(0, LAST))
@examples(50)
def test_a_query_turns_by_the_frequencies_of_its_own_length(length, base, factor, pos):
  """Dynamic NTK and LongRoPE at length - 1, length, length + 1 and anywhere: those of p + 1 tokens, to the table's last row."""
  pos = np.array([pos, 0, length - 2, length - 1, length, length + ROWS - 2, LAST], np.int32)
  lists = dict(short_factor=(1.0, 1.5, 2.0), long_factor=(3.0, 5.0, 9.0))
  for name, kw in (("dynamic_ntk", {}), ("longrope", lists)):
    method = POSITIONS[name](base=base, factor=factor, original_length=length, **kw)
    start, rows = method.rows(6, max_len=length + ROWS - 1)
    row = make_table(rows, start).row(pos)
    for i, p in enumerate(pos):
      inv_freq, scale = method.frequencies(6, seq_len=min(int(p) + 1, length + ROWS - 1))
      for found, expected in zip((row.hi, row.lo), words(inv_freq), strict=True):
        np.testing.assert_array_equal(found[i], expected, err_msg=f"{name} at {p}")
      assert row.scale[i] == np.float32(scale)


@given(numbers((T, HEAD)), positions, st.floats(1.01, 64.0), st.data())
@examples(50)
def test_the_scale_of_yarn_multiplies_what_is_turned(x, pos, factor, data):
  """An explicit attention_factor, or the quotient of both mscales, or 0.1 ln(factor) + 1; q . k has it twice."""
  given_scale, mscale, of_all = data.draw(st.tuples(*[st.none() | st.floats(0.1, 4.0)] * 3))
  g = lambda m: 0.1 * m * math.log(factor) + 1
  expected = given_scale or (g(mscale) / g(of_all) if mscale and of_all else g(1.0))
  method = POSITIONS["yarn"](
    factor=factor, original_length=64, attention_factor=given_scale, mscale=mscale, mscale_all_dim=of_all
  )
  table, _ = table_of(method, 4)
  turned = turn("half", x, pos, table)[:, :8]
  bound = 1e-6 * max(1, expected) ** 2 * norms(x[:, :8]) ** 2 + 1e-36
  assert np.all(np.abs(norms(turned) ** 2 - expected**2 * norms(x[:, :8]) ** 2) <= bound)
