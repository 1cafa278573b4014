"""The `scores` hook against one rotation a pair of tokens in float64: RoPE, methods of the distance, row-wise scalings."""

import math

import components
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import ConfigError
from jaxllm.position import POSITIONS
from jaxllm.position.tables import RopeTable, make_table

LENGTH, HEADS, KV_HEADS, HEAD_DIM, ROTARY_DIM = 40, 4, 2, 32, 16
LAYOUTS = ("half", "interleaved")

# (method, fields, pinned length): windows from 1 to beyond the sequence, groups and sinks that do and do not divide.
# Half of each head is rotated, so that the rest is seen; all have one shape, as eager JAX compiles by shape.
METHODS = [
  ("rope", dict(), None),
  *[("rerope", dict(window=w), None) for w in (1, 5, 16, 39, 40, 1000)],
  ("rerope", dict(original_length=20), None),
  ("rerope", dict(window=7, base=500000.0), None),
  ("yarn", dict(factor=8.0, original_length=16), None),
  ("dynamic_ntk", dict(factor=2.0, original_length=16), 40),
  *[("leaky_rerope", dict(window=w, leak=k), None) for w, k in ((1, 3.0), (5, 16.0), (16, 1.5), (40, 8.0))],
  ("leaky_rerope", dict(original_length=20), None),
  *[("inv_leaky_rerope", dict(window=w, factor=b), None) for w, b in ((1, 2.0), (5, 8.0), (16, 0.75))],
  ("inv_leaky_rerope", dict(original_length=20), None),
  *[("self_extend", dict(window=w, group=g), None) for w, g in ((1, 2), (5, 3), (8, 4), (16, 1000), (40, 2))],
  ("self_extend", dict(original_length=12, factor=3.5), None),
  *[("streaming", dict(window=w, sinks=s), None) for w, s in ((1, 1), (5, 4), (16, 0), (38, 3))],
  ("streaming", dict(original_length=12), None),
  *[("xpos", dict(scale_base=b, gamma=g), None) for b, g in ((512.0, 0.4), (8.0, 0.4), (0.3, 1.5))],
]
TO_SINKS_OR_GROUPS = ("self_extend", "streaming")  # not a matter of distance alone
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


def relative_positions(name, kw, i, j):
  """What a query at i and a key at j <= i are apart, None where it does not see it; one pair, as the papers say it."""
  L0 = kw.get("original_length")
  if name == "rerope":
    return min(i - j, kw.get("window") or L0 // 2)
  if name == "leaky_rerope":
    w, k = kw.get("window") or L0 // 2, kw.get("leak", 16.0)
    return i - j if i - j < w else w + (i - j - w) / k
  if name == "inv_leaky_rerope":
    w, k = kw.get("window") or L0 // 4, 1 / (2 * kw.get("factor", 8.0))
    return i - j if i - j < w else w + (i - j - w) / k
  if name == "self_extend":
    w = kw.get("window") or L0 // 2
    G = kw.get("group") or math.ceil((kw["factor"] * L0 - w) / (L0 - w))
    return i - j if i - j < w else i // G + (w - w // G) - j // G
  if (
    name == "streaming"
  ):  # a cache of the sinks and the nearest tokens: their places in it are their positions
    sinks = kw.get("sinks", 4)
    w = kw.get("window") or L0 - sinks
    kept = [t for t in sorted({*range(min(sinks, i + 1)), *range(max(0, i - w + 1), i + 1)})]
    return len(kept) - 1 - kept.index(j) if j in kept else None
  return i - j


def brute_force(q, k, relative, inv_freq, scale, layout, log_decay=0.0):
  """Sum over f of Re(q conj(k) e^{r (i f + log_decay)}), r = relative [T, S] or [B, T, S], frequencies [T, R/2].

  float64 [B, N, T, S]; relative is NaN where the key is not seen.
  """
  rotary_dim = 2 * inv_freq.shape[-1]
  k = np.repeat(k, HEADS // KV_HEADS, axis=2)
  product = np.einsum("btnf,bsnf->bntsf", pairs(q, rotary_dim, layout), np.conj(pairs(k, rotary_dim, layout)))
  relative = np.broadcast_to(relative, (len(q), *relative.shape[-2:]))[:, None, ..., None]
  turned = (product * np.exp(relative * (1j * inv_freq[:, None, :] + log_decay))).real.sum(-1) * scale**2
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
  start, rows = method.rows(ROTARY_DIM, LENGTH, seq_len)
  return method, make_table(rows, start), inv_freq, scale


@pytest.mark.parametrize("name, kw, seq_len", CASES)
def test_one_rotation_a_pair(name, kw, seq_len):
  """Relative positions as each method is published, at small positions and across 2^24."""
  method, table, inv_freq, scale = build(name, kw, seq_len)
  q, k = queries_and_keys()
  relative = np.full((2, LENGTH, LENGTH), 0.0)
  for b, t, s in zip(*np.nonzero(np.tile(np.tri(LENGTH), (2, 1, 1))), strict=True):
    # the text before 2^24 counts for groups; sinks are at the start of each row's own text
    first = POS[b, 0] if name != "streaming" else 0
    apart = relative_positions(name, kw, int(first + t), int(first + s))
    relative[b, t, s] = np.nan if apart is None else apart
  log_decay = 0.0
  if name == "xpos":  # torchscale's scale, to the power of distance / scale_base
    gamma = kw["gamma"]
    scale_c = (np.arange(0, ROTARY_DIM, 2) + gamma * ROTARY_DIM) / ((1 + gamma) * ROTARY_DIM)
    log_decay = np.log(scale_c) / kw["scale_base"]
  frequencies = np.broadcast_to(inv_freq, (LENGTH, len(inv_freq)))
  expected = causal(brute_force(q, k, relative, frequencies, scale, kw["layout"], log_decay))
  found = causal(scores(method, table, q, k, POS, POS))
  rows = slice(0, 1) if name == "streaming" else slice(None)  # a text that begins at 2^24 has no sinks
  seen = ~np.isnan(expected[rows])
  components.measured_close(
    name, "pairs in float64", found[rows][seen], expected[rows][seen], atol=1e-5 * max(1, scale**2)
  )
  assert np.all(found[rows][~seen] < -1e29)


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


def assert_same(one, other, layout="half", exact=False):
  """Two (name, fields) score alike: to the last bit, or to the bound of all these tests."""
  q, k = queries_and_keys(1)
  found, expected = (
    causal(scores(method, table, q, k, POS, POS))
    for method, table, _, _ in (build(name, kw | dict(layout=layout)) for name, kw in (one, other))
  )
  np.testing.assert_allclose(found, expected, rtol=0, atol=0 if exact else 1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [LENGTH, LENGTH + 1, 10**6])
@pytest.mark.parametrize(
  ("name", "fields"),
  [
    ("rerope", {}),
    ("leaky_rerope", dict(leak=8.0)),
    ("inv_leaky_rerope", dict(factor=8.0)),
    ("self_extend", dict(group=3)),
    ("streaming", dict(sinks=3)),
  ],
)
def test_a_window_as_long_as_the_sequence_is_rope(name, fields, window, layout):
  assert_same((name, fields | dict(window=window)), ("rope", {}), layout, exact=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
  ("name", "fields", "exact"),
  [
    pytest.param("leaky_rerope", dict(window=5, leak=1.0), False, marks=pytest.mark.core),
    ("inv_leaky_rerope", dict(window=5, factor=0.5), False),
    ("self_extend", dict(window=5, group=1), True),
    ("self_extend", dict(original_length=12, factor=1.0), True),
    ("xpos", dict(scale_base=1e9), False),
    ("xpos", dict(gamma=1e9), False),
  ],
)
def test_fields_that_make_a_method_rope(name, fields, exact, layout):
  """Leak 1, a step of 1, groups of 1, no decay."""
  assert_same((name, fields), ("rope", {}), layout, exact)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_leaky_rerope_leads_from_rope_to_rerope(layout):
  assert_same(("leaky_rerope", dict(window=5, leak=1e9)), ("rerope", dict(window=5)), layout)
  with pytest.raises(AssertionError):
    assert_same(("leaky_rerope", dict(window=5, leak=100.0)), ("rerope", dict(window=5)), layout)


@pytest.mark.parametrize("window", [5, 16])
def test_inverse_leaky_is_leaky_by_the_inverse(window):
  """k = 1 / (2 b)."""
  assert_same(
    ("inv_leaky_rerope", dict(window=window, factor=4.0)), ("leaky_rerope", dict(window=window, leak=0.125))
  )


@pytest.mark.parametrize(
  ("name", "fields", "window"),
  [
    ("rerope", {}, 10),
    ("leaky_rerope", {}, 10),
    ("inv_leaky_rerope", {}, 5),
    ("self_extend", dict(group=3), 10),
    ("streaming", dict(sinks=3), 17),
  ],
)
def test_the_default_window_is_a_part_of_the_trained_length(name, fields, window):
  of_length, given = fields | dict(original_length=20), fields | dict(window=window)
  assert_same((name, of_length), (name, given), exact=True)
  with pytest.raises(AssertionError):
    assert_same((name, of_length), (name, given | dict(window=window + 1)), exact=True)


@pytest.mark.parametrize("case", range(6))
def test_self_extend_as_the_paper_lays_positions_out(case, golden):
  """The scores of the last query, on keys that are all alike, tell its relative positions one by one."""
  row = golden["rope"]["pins"]["self_extend"][case]
  method, table, inv_freq, _ = build("self_extend", dict(window=row["window"], group=row["group"]))
  pos = np.arange(len(row["relative"]), dtype=np.int32)[None]
  q, k = (
    np.zeros((1, pos.shape[1], 1, ROTARY_DIM), np.float32),
    np.zeros((1, pos.shape[1], 1, ROTARY_DIM), np.float32),
  )
  q[..., 7], k[..., 7] = 1.0, 1.0  # the pair of the lowest frequency: cos(r f) falls with r
  q[..., 0], k[..., 0] = 1.0, 1.0  # and that of the highest, which tells neighbours apart
  found = scores(method, table, q, k, pos, pos)[0, 0, -1]
  r = np.asarray(row["relative"])
  expected = np.cos(r * inv_freq[0]) + np.cos(r * inv_freq[7])
  components.measured_close("self_extend", "the authors' layout", found, expected, atol=1e-6)


def test_xpos_has_the_scales_of_torchscale(golden):
  for d, zeta in golden["rope"]["pins"]["xpos_zeta"].items():
    log_zeta = POSITIONS["xpos"](scale_base=300.0).log_zeta(int(d))
    components.measured_close("xpos", "torchscale", np.exp(300.0 * log_zeta), zeta, rtol=1e-14)


def test_xpos_of_a_tile_with_padding_at_position_0():
  """A tile's last rows may be padding: far into a text they must not move the middle that its factors are counted from."""
  method, table, _, _ = build("xpos", dict(scale_base=64.0))
  q, k = queries_and_keys(3)
  pos = POS + 10**6
  padded = np.where(np.arange(LENGTH) < 30, pos, 0)
  one, two = (scores(method, table, q, k, at, pos) for at in (pos, padded))
  np.testing.assert_allclose(causal(two)[:, :, :30], causal(one)[:, :, :30], rtol=0, atol=2e-6)


@pytest.mark.core
@pytest.mark.parametrize("name", ["leaky_rerope", "inv_leaky_rerope"])
def test_a_table_without_the_far_rows_is_refused(name):
  method, q, k = POSITIONS[name](window=5), *queries_and_keys()
  one_row = make_table([method.frequencies(ROTARY_DIM)])
  with pytest.raises(
    ConfigError, match=rf"rope: found a table of 1 rows, expected the 3 of {type(method).__name__}"
  ):
    scores(method, one_row, q, k, POS, POS)


@pytest.mark.parametrize("name, kw, seq_len", HALF)
def test_scores_of_any_tile_and_of_one_decoded_row(name, kw, seq_len):
  """A tile knows only its own queries, keys and positions; a row of decoding is a tile of one query."""
  method, table, _, _ = build(name, kw, seq_len)
  q, k = queries_and_keys(3)
  full = causal(scores(method, table, q, k, POS, POS))
  for rows, keys in ((slice(8, 24), slice(0, 16)), (slice(39, 40), slice(0, 40))):
    tile = scores(method, table, q[:, rows], k[:, keys], POS[:, rows], POS[:, keys])
    tile = np.where(np.tri(LENGTH, dtype=bool)[rows, keys], tile, 0.0)
    np.testing.assert_allclose(tile, full[:, :, rows, keys], rtol=0, atol=2e-6)


@pytest.mark.parametrize("name, kw, seq_len", HALF)
def test_scores_are_shift_invariant(name, kw, seq_len):
  """Up to a shift of a million: 1e-6 of |q||k|; not so where groups and sinks are counted from the start.

  The shift divides by none of the groups.
  """
  method, table, _, scale = build(name, kw, seq_len)
  q, k = queries_and_keys(4)
  norm = np.linalg.norm(q, axis=-1)[:, :, :, None] * np.max(np.linalg.norm(k, axis=-1))
  here, there = (causal(scores(method, table, q, k, POS + shift, POS + shift)) for shift in (0, 1_000_991))
  moved = np.max(np.abs(here - there) / np.moveaxis(norm, 1, 2))
  if name in TO_SINKS_OR_GROUPS and kw.get("window") != 40 and kw.get("sinks") != 0:
    assert moved > 0.01
  else:
    assert moved <= 1e-6 * max(1.0, scale**2)


# beyond the trained length every query has frequencies of its own


def row_table(method, max_len):
  start, rows = method.rows(ROTARY_DIM, max_len)
  return make_table(rows, start)


LONG_ROPE = dict(
  short_factor=(1.0, 1.1) * 4, long_factor=(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0), factor=8.0
)


@pytest.mark.core
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("trained", [2, 16, 39, 40, 64])
def test_longrope_row_by_row(trained, layout):
  """A query and all its keys turn by the long factors from the query at position L0 on, the L0 + 1st of the text."""
  method = POSITIONS["longrope"](**LONG_ROPE, original_length=trained, layout=layout)
  q, k = queries_and_keys(5)
  pos = np.tile(np.arange(LENGTH, dtype=np.int32), (2, 1))
  plain = 10000.0 ** (-np.arange(0, ROTARY_DIM, 2) / ROTARY_DIM)
  inv_freq = np.stack(
    [plain / LONG_ROPE["long_factor" if p + 1 > trained else "short_factor"] for p in range(LENGTH)]
  )
  relative = np.arange(LENGTH)[:, None] - np.arange(LENGTH)[None]
  scale = math.sqrt(1 + math.log(8) / math.log(trained))
  expected = brute_force(q, k, relative, inv_freq, scale, layout)
  found = scores(method, row_table(method, LENGTH), q, k, pos, pos)
  np.testing.assert_allclose(causal(found), causal(expected), rtol=0, atol=1e-5 * scale**2)


def test_two_rows_are_as_many_rows():
  """A table of two rows goes by a shorter way, to the last position that there is."""
  method = POSITIONS["dynamic_ntk"](factor=2.0, original_length=16)
  two, three = row_table(method, 17), row_table(method, 18)
  q, k = queries_and_keys(5)
  for pos in (np.arange(LENGTH) % 17, 2**31 - LENGTH + np.arange(LENGTH)):
    pos = np.tile(pos.astype(np.int32), (2, 1))
    end = RopeTable(three.hi[[0, 1, 1]], three.lo[[0, 1, 1]], three.scale, three.start)
    one, other = (scores(method, table, q, k, pos, pos) for table in (two, end))
    np.testing.assert_allclose(one, other, rtol=0, atol=2e-6)


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
  of_the_distance = {"rerope", "leaky_rerope", "inv_leaky_rerope", "self_extend", "streaming", "xpos"}
  assert needs == {"dynamic_ntk", "longrope"} | of_the_distance


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
