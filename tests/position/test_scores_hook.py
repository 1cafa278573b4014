"""The `scores` hook against one rotation a pair of tokens in float64: RoPE, ReRoPE, row-wise dynamic NTK."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import ConfigError
from jaxllm.position import POSITIONS
from jaxllm.position.tables import make_table

LENGTH, HEADS, KV_HEADS, HEAD_DIM, ROTARY_DIM = 40, 4, 2, 32, 16
LAYOUTS = ("half", "interleaved")

# (method, fields, pinned length): ReRoPE with windows from 1 to beyond the sequence, and its neighbours.
# Half of each head is rotated, so that the rest is seen; all have one shape, as eager JAX compiles by shape.
METHODS = [
  ("rope", dict(), None),
  *[("rerope", dict(window=w), None) for w in (1, 5, 16, 39, 40, 1000)],
  ("rerope", dict(original_length=20), None),
  ("rerope", dict(window=7, base=500000.0), None),
  ("yarn", dict(factor=8.0, original_length=16), None),
  ("dynamic_ntk", dict(factor=2.0, original_length=16), 40),
]
CASES = [
  pytest.param(
    name, kw | dict(layout=layout), n, id=f"{name}-{i}-{layout}", marks=[pytest.mark.core] * (i == 3)
  )
  for i, (name, kw, n) in enumerate(METHODS)
  for layout in LAYOUTS
]

HALF = [c for c in CASES if "half" in c.id]


def queries_and_keys(seed=0):
  """q [2, T, N, H] divided by sqrt(H) as the hook expects, k [2, T, K, H]; two rows."""
  rng = np.random.default_rng(seed)
  q = rng.standard_normal((2, LENGTH, HEADS, HEAD_DIM)) / np.sqrt(HEAD_DIM)
  return q.astype(np.float32), rng.standard_normal((2, LENGTH, KV_HEADS, HEAD_DIM)).astype(np.float32)


POS = np.stack([np.arange(LENGTH), 2**24 - 20 + np.arange(LENGTH)]).astype(np.int32)


def pairs(x, rotary_dim, layout):
  """The rotated coordinates as complex numbers, float64."""
  x = np.asarray(x, np.float64)[..., :rotary_dim]
  if layout == "half":
    return x[..., : rotary_dim // 2] + 1j * x[..., rotary_dim // 2 :]
  return x[..., 0::2] + 1j * x[..., 1::2]


def brute_force(q, k, relative, inv_freq, scale, layout):
  """Sum over f of Re(q conj(k) e^{i r f}), r = relative[t, s], frequencies [T, R/2]; float64 [B, N, T, S]."""
  rotary_dim = 2 * inv_freq.shape[-1]
  k = np.repeat(k, HEADS // KV_HEADS, axis=2)
  product = np.einsum("btnf,bsnf->bntsf", pairs(q, rotary_dim, layout), np.conj(pairs(k, rotary_dim, layout)))
  turned = (product * np.exp(1j * relative[..., None] * inv_freq[:, None, :])).real.sum(-1) * scale**2
  rest = (np.asarray(x, np.float64)[..., rotary_dim:] for x in (q, k))
  return turned + np.einsum("btnh,bsnh->bnts", *rest)


def scores(method, table, q, k, q_pos, k_pos):
  out = method.scores(jnp.asarray(q), jnp.asarray(k), jnp.asarray(q_pos), jnp.asarray(k_pos), table, {})
  assert out.dtype == jnp.float32
  B, K, G, T, S = out.shape
  return np.asarray(out).reshape(B, K * G, T, S)


def causal(x):
  """What the mask leaves; a key after its query has no score to compare."""
  return np.where(np.tri(x.shape[-2], x.shape[-1], dtype=bool), x, 0.0)


def build(name, kw, seq_len=None):
  method = POSITIONS[name](**kw)
  inv_freq, scale = method.frequencies(ROTARY_DIM, seq_len)
  return method, make_table([(inv_freq, scale)]), inv_freq, scale


@pytest.mark.parametrize("name, kw, seq_len", CASES)
def test_one_rotation_a_pair(name, kw, seq_len):
  """Relative positions min(i - j, w), at small positions and across 2^24."""
  method, table, inv_freq, scale = build(name, kw, seq_len)
  q, k = queries_and_keys()
  relative = np.arange(LENGTH)[:, None] - np.arange(LENGTH)[None]
  if name == "rerope":
    relative = np.minimum(relative, kw.get("window", kw.get("original_length", 0) // 2))
  expected = brute_force(
    q, k, relative, np.broadcast_to(inv_freq, (LENGTH, len(inv_freq))), scale, kw["layout"]
  )
  np.testing.assert_allclose(
    causal(scores(method, table, q, k, POS, POS)), causal(expected), rtol=0, atol=1e-5 * max(1, scale**2)
  )


@pytest.mark.parametrize("rotary_dim", [HEAD_DIM, ROTARY_DIM])
@pytest.mark.parametrize("window", [5, 16])
def test_a_scale_reaches_the_turned_coordinates_of_near_and_far_keys_alike(window, rotary_dim):
  """Frequencies and scale are data: the table of another method, YaRN's here, serves ReRoPE."""
  method = POSITIONS["rerope"](window=window)
  inv_freq, scale = POSITIONS["yarn"](factor=32.0, original_length=16).frequencies(rotary_dim)
  q, k = queries_and_keys(9)
  relative = np.minimum(np.arange(LENGTH)[:, None] - np.arange(LENGTH)[None], window)
  expected = brute_force(q, k, relative, np.tile(inv_freq, (LENGTH, 1)), scale, "half")
  found = scores(method, make_table([(inv_freq, scale)]), q, k, POS, POS)
  assert scale > 1.3
  np.testing.assert_allclose(causal(found), causal(expected), rtol=0, atol=2e-5)


@pytest.mark.core
def test_an_off_by_one_window_is_caught():
  """The negative control: windows 15 and 17 leave the bound that window 16 keeps."""
  q, k = queries_and_keys()
  relative = np.arange(LENGTH)[:, None] - np.arange(LENGTH)[None]
  inv_freq, _ = POSITIONS["rope"]().frequencies(ROTARY_DIM)
  expected = brute_force(q, k, np.minimum(relative, 16), np.tile(inv_freq, (LENGTH, 1)), 1.0, "half")
  for window in (15, 17):
    method, table, _, _ = build("rerope", dict(window=window))
    assert np.max(np.abs(causal(scores(method, table, q, k, POS, POS) - expected))) > 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [LENGTH, LENGTH + 1, 10**6])
def test_a_window_as_long_as_the_sequence_is_rope(window, layout):
  q, k = queries_and_keys(1)
  found, expected = (
    scores(method, table, q, k, POS, POS)
    for method, table, _, _ in (
      build("rerope", dict(window=window, layout=layout)),
      build("rope", dict(layout=layout)),
    )
  )
  np.testing.assert_array_equal(found, expected)


def test_the_default_window_is_half_of_the_trained_length():
  q, k = queries_and_keys(2)
  one, two = (
    scores(method, table, q, k, POS, POS)
    for method, table, _, _ in (build("rerope", dict(original_length=20)), build("rerope", dict(window=10)))
  )
  np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("name, kw, seq_len", HALF)
def test_scores_of_any_tile_and_of_one_decoded_row(name, kw, seq_len):
  """A tile knows only its own queries, keys and positions; a row of decoding is a tile of one query."""
  method, table, _, _ = build(name, kw, seq_len)
  q, k = queries_and_keys(3)
  full = scores(method, table, q, k, POS, POS)
  for rows, keys in ((slice(8, 24), slice(0, 16)), (slice(39, 40), slice(0, 40))):
    tile = scores(method, table, q[:, rows], k[:, keys], POS[:, rows], POS[:, keys])
    np.testing.assert_allclose(tile, full[:, :, rows, keys], rtol=0, atol=2e-6)


@pytest.mark.parametrize("name, kw, seq_len", HALF)
def test_scores_are_shift_invariant(name, kw, seq_len):
  """Up to a shift of a million: 1e-6 of |q||k|."""
  method, table, _, scale = build(name, kw, seq_len)
  q, k = queries_and_keys(4)
  norm = np.linalg.norm(q, axis=-1)[:, :, :, None] * np.max(np.linalg.norm(k, axis=-1))
  here, there = (causal(scores(method, table, q, k, POS + shift, POS + shift)) for shift in (0, 10**6))
  assert np.max(np.abs(here - there) / np.moveaxis(norm, 1, 2)) <= 1e-6 * max(1.0, scale**2)


# beyond the trained length every query has frequencies of its own


def row_table(method, max_len):
  start, lengths = method.seq_lens(max_len)
  return make_table([method.frequencies(ROTARY_DIM, n) for n in lengths], start)


def ntk_aware(length, factor, trained, base=10000.0):
  """The published formula, once more and apart: frequencies of dynamic NTK for one context length."""
  stretch = factor * max(length, trained) / trained - (factor - 1)
  return (base * stretch ** (ROTARY_DIM / (ROTARY_DIM - 2))) ** (-np.arange(0, ROTARY_DIM, 2) / ROTARY_DIM)


@pytest.mark.core
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("trained", [1, 16, 39, 40, 64])
def test_dynamic_ntk_row_by_row(trained, layout):
  """A query at position p and all its keys turn by the frequencies of length p + 1, before and after L0."""
  method = POSITIONS["dynamic_ntk"](factor=2.0, original_length=trained, layout=layout)
  q, k = queries_and_keys(5)
  pos = np.tile(np.arange(LENGTH, dtype=np.int32), (2, 1))
  inv_freq = np.stack([ntk_aware(p + 1, 2.0, trained) for p in range(LENGTH)])
  relative = np.arange(LENGTH)[:, None] - np.arange(LENGTH)[None]
  expected = brute_force(q, k, relative, inv_freq, 1.0, layout)
  found = scores(method, row_table(method, LENGTH), q, k, pos, pos)
  np.testing.assert_allclose(causal(found), causal(expected), rtol=0, atol=1e-5)


@pytest.mark.core
def test_dynamic_ntk_decodes_as_it_prefills():
  """Rows of one batch at different lengths, a longer table, and one query at a time: the same scores."""
  method = POSITIONS["dynamic_ntk"](factor=4.0, original_length=16)
  q, k = queries_and_keys(6)
  pos = np.tile(np.arange(LENGTH, dtype=np.int32), (2, 1))
  full = scores(method, row_table(method, LENGTH), q, k, pos, pos)
  table = row_table(method, 3 * LENGTH)
  at = np.array([9, 33])
  rows = np.take_along_axis(q, at[:, None, None, None], axis=1)
  one = scores(method, table, rows, k, at[:, None].astype(np.int32), pos)
  for b, t in enumerate(at):
    np.testing.assert_allclose(one[b, :, 0, : t + 1], full[b, :, t, : t + 1], rtol=0, atol=2e-6)


def test_dynamic_ntk_of_a_pinned_length_differs_from_its_rows():
  """One base for a whole call is what transformers' full forward does; only the last row has that length."""
  method = POSITIONS["dynamic_ntk"](factor=2.0, original_length=16)
  q, k = queries_and_keys(7)
  pos = np.tile(np.arange(LENGTH, dtype=np.int32), (2, 1))
  by_row = scores(method, row_table(method, LENGTH), q, k, pos, pos)
  pinned = scores(method, make_table([method.frequencies(ROTARY_DIM, LENGTH)]), q, k, pos, pos)
  np.testing.assert_allclose(by_row[:, :, -1], pinned[:, :, -1], rtol=0, atol=2e-6)
  assert np.max(np.abs(causal(by_row - pinned)[:, :, 20:-1])) > 0.01


def test_a_scale_a_row_reaches_the_turned_coordinates_only():
  method, q, k = POSITIONS["dynamic_ntk"](factor=2.0, original_length=16), *queries_and_keys(10)
  inv_freq, _ = POSITIONS["rope"]().frequencies(ROTARY_DIM)
  pos = np.tile(np.arange(LENGTH, dtype=np.int32), (2, 1))
  relative = np.arange(LENGTH)[:, None] - np.arange(LENGTH)[None]
  scale = np.where(np.arange(LENGTH) < 20, 1.0, 1.4)[:, None]
  expected = brute_force(q, k, relative, np.tile(inv_freq, (LENGTH, 1)), scale, "half")
  found = scores(method, make_table([(inv_freq, 1.0), (inv_freq, 1.4)], start=20), q, k, pos, pos)
  np.testing.assert_allclose(causal(found), causal(expected), rtol=0, atol=2e-5)


def test_rerope_refuses_rows_that_only_its_near_branch_would_follow():
  method, q, k = POSITIONS["rerope"](window=5), *queries_and_keys()
  table = row_table(POSITIONS["dynamic_ntk"](factor=2.0, original_length=16), LENGTH)
  with pytest.raises(ConfigError, match=r"25 rows, expected one for ReRope.*seq_len"):
    scores(method, table, q, k, POS, POS)


def test_rows_up_to_the_last_position():
  """Row p + 1 - start, which for position 2^31 - 1 is beyond int32, stays within the table."""
  table = row_table(POSITIONS["dynamic_ntk"](factor=2.0, original_length=16), LENGTH)
  row = table.row(jnp.asarray([0, 15, 16, 39, 40, 2**31 - 1], jnp.int32))
  np.testing.assert_array_equal(row.hi, np.asarray(table.hi)[[0, 0, 1, 24, 24, 24]])


def test_methods_that_need_raw_keys_say_so():
  needs = {name for name, cls in POSITIONS.items() if cls.needs_raw_keys}
  assert needs == {"dynamic_ntk", "rerope"}


def test_traced_positions_give_the_same_scores():
  method, table, _, _ = build("rerope", dict(window=5))
  q, k = queries_and_keys(8)
  traced = jax.jit(lambda table, pos: method.scores(q, k, pos, pos, table, {}))(table, POS)
  np.testing.assert_allclose(
    np.asarray(traced).reshape(2, HEADS, LENGTH, LENGTH),
    scores(method, table, q, k, POS, POS),
    rtol=0,
    atol=2e-6,
  )
