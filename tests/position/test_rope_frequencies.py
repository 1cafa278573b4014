"""Frequencies and scales of every RoPE scaling, against numbers that jaxllm had no part in making."""

import dataclasses
import json
import math
from pathlib import Path

import components
import numpy as np
import pytest

from jaxllm.errors import ConfigError, JaxllmError
from jaxllm.position import POSITIONS, Rope
from jaxllm.position.tables import make_table

ROWS = json.loads((Path(__file__).parents[1] / "golden" / "rope.json").read_text())["frequencies"]


def label(row):
  kw = "-".join(
    f"{key}={value if isinstance(value, list) else format(value, 'g')}" for key, value in row["kw"].items()
  )
  kw = kw[:80]  # LongRoPE's lists
  return f"{row['method']}-d{row['rotary_dim']}-L{row['seq_len']}-{kw}"


def cases(rows):
  return [pytest.param(row, id=label(row), marks=[pytest.mark.core] * (i == 0)) for i, row in enumerate(rows)]


def computed(row):
  return POSITIONS[row["method"]](**row["kw"]).frequencies(row["rotary_dim"], seq_len=row["seq_len"])


@pytest.mark.parametrize("row", cases(ROWS[::-1]))
def test_equal_to_the_published_formula_at_fifty_digits(row):
  inv_freq, scale = computed(row)
  assert inv_freq.dtype == np.float64 and inv_freq.shape == (row["rotary_dim"] // 2,)
  components.measured_close(row["method"], "fifty digits", inv_freq, row["inv_freq"], rtol=1e-14)
  assert isinstance(scale, float) and math.isclose(scale, row["scale"], rel_tol=1e-15)


@pytest.mark.parametrize("row", cases([row for row in ROWS if "transformers" in row][::-1]))
def test_equal_to_transformers(row):
  inv_freq, scale = computed(row)
  components.measured_close(
    row["method"], "transformers", inv_freq, row["transformers"]["inv_freq"], rtol=1e-6
  )
  assert abs(scale - row["transformers"]["scale"]) <= 1e-7


def test_the_golden_file_covers_every_scaling():
  """rope_2d has the frequencies of plain RoPE in each half, which tests/position/test_rope_2d.py compares."""
  keeps_rope = lambda cls: cls is not Rope and cls.frequencies is Rope.frequencies
  ropes = {name: cls for name, cls in POSITIONS.items() if issubclass(cls, Rope)}
  scaled = {name for name, cls in ropes.items() if not keeps_rope(cls)}
  assert {row["method"] for row in ROWS} == scaled - {"rope_2d"}


RATIOS = ["pi", "ntk_old", "ntk", "ntk_fixed", "ntk_mixed", "ntk_by_parts", "llama3"]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.core] * (n == "ntk")) for n in RATIOS])
def test_highest_and_lowest_frequency_ratios(name, golden):
  """At d = 128 and factor 8; "old" and "fixed" differ in the last by 1/7.744 against 1/8 only."""
  plain, _ = POSITIONS["rope"]().frequencies(128)
  scaled, scale = POSITIONS[name](factor=8.0, original_length=2048).frequencies(128)
  ratios = [scaled[0] / plain[0], scaled[-1] / plain[-1]]
  np.testing.assert_allclose(ratios, golden["rope"]["pins"]["ratios"][name], rtol=1e-12, atol=0)
  assert scale == 1.0
  if name in ("ntk_old", "ntk", "ntk_by_parts", "llama3"):
    assert ratios[0] == 1.0


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0, 8.0, 32.0])
@pytest.mark.parametrize("rotary_dim", [2, 24, 128])
def test_ntk_mixed_is_fixed_at_exponent_one_and_pi_at_zero(rotary_dim, factor):
  def mixed(exponent):
    return POSITIONS["ntk_mixed"](factor=factor, exponent=exponent).frequencies(rotary_dim)[0]

  fixed, pi = (POSITIONS[name](factor=factor).frequencies(rotary_dim)[0] for name in ("ntk_fixed", "pi"))
  np.testing.assert_allclose(mixed(1.0), fixed, rtol=1e-14, atol=0)
  np.testing.assert_allclose(mixed(0.0), pi, rtol=1e-14, atol=0)


def test_ntk_old_is_rope_with_a_larger_base():
  old, _ = POSITIONS["ntk_old"](base=10000.0, factor=8.0).frequencies(64)
  np.testing.assert_allclose(old, POSITIONS["rope"](base=80000.0).frequencies(64)[0], rtol=1e-14, atol=0)


@pytest.mark.parametrize("length", [2048, 4096])
def test_yarn_correction_range(length, golden):
  """Read off the frequencies: untouched up to `low`, divided by the whole factor from `high` on."""
  plain, _ = POSITIONS["rope"]().frequencies(128)
  kept = POSITIONS["yarn"](factor=8.0, original_length=length).frequencies(128)[0] / plain
  low, high = np.flatnonzero(kept == 1.0).max(), np.flatnonzero(np.isclose(kept, 1 / 8, rtol=1e-15)).min()
  assert [low, high] == golden["rope"]["pins"]["yarn_ranges"][str(length)]
  assert np.all(np.diff(kept[low : high + 1]) < 0)


@pytest.mark.parametrize(
  "factor, digits", [(2, 1.0693), (4, 1.1386), (8, 1.2079), (16, 1.2773), (32, 1.3466)]
)
def test_yarn_scales(factor, digits, golden):
  _, scale = POSITIONS["yarn"](factor=float(factor), original_length=2048).frequencies(128)
  assert math.isclose(scale, golden["rope"]["pins"]["yarn_scales"][str(factor)], rel_tol=1e-15)
  assert round(scale, 4) == digits


def test_ntk_by_parts_has_four_parts():
  """From the highest frequency down: kept, then towards NTK-aware, NTK-aware, and divided by the whole factor."""
  plain, _ = POSITIONS["rope"]().frequencies(128)
  ntk, _ = POSITIONS["ntk"](factor=8.0).frequencies(128)
  fields = dict(factor=8.0, original_length=4096, beta_turns=(0.3, 0.5), gamma_turns=(2.0, 16.0))
  parts, _ = POSITIONS["ntk_by_parts"](**fields).frequencies(128)
  turns = 4096 * plain / (2 * np.pi)
  for part, wanted in (  # ramps begin and end at whole pairs: 1.2 is more than one of them, base ** (2 / R)
    (turns > 16.0 * 1.2, plain),
    ((turns < 2.0 / 1.2) & (turns > 0.5 * 1.2), ntk),
    (turns < 0.3 / 1.2, plain / 8.0),
  ):
    assert part.sum() > 5
    np.testing.assert_allclose(parts[part], wanted[part], rtol=1e-14, atol=0)
  between = (turns < 16.0 / 1.2) & (turns > 2.0 * 1.2)
  assert np.all((parts < plain)[between] & (parts > ntk)[between])


LONG = dict(factor=16.0, original_length=128, short_factor=(1.0, 1.5, 2.0), long_factor=(3.0, 5.0, 9.0))


@pytest.mark.core
@pytest.mark.parametrize(
  "length, name", [(None, "short"), (1, "short"), (127, "short"), (128, "short"), (129, "long")]
)
def test_longrope_at_the_trained_length(length, name):
  """One token less, as many, and one more: the list of factors changes, and the scale does not."""
  inv_freq, scale = POSITIONS["longrope"](**LONG).frequencies(6, seq_len=length)
  plain, _ = POSITIONS["rope"]().frequencies(6)
  np.testing.assert_allclose(plain / inv_freq, LONG[f"{name}_factor"], rtol=1e-15)
  assert math.isclose(scale, math.sqrt(1 + 4 / 7), rel_tol=1e-15)  # ln 16 / ln 128


def test_rows_of_longrope_change_after_the_trained_length():
  start, rows = POSITIONS["longrope"](**LONG).rows(6, max_len=1000)
  table = make_table(rows, start)
  index = [
    int(np.flatnonzero(np.all(table.hi == np.asarray(table.row(np.int32(p)).hi), axis=1))[0])
    for p in (0, 126, 127, 128, 999)
  ]
  assert index == [0, 0, 0, 1, 1]  # position 127 is the 128th token


def test_proportional_turns_the_first_pairs_of_the_whole_head():
  """Which is not partial rotary: the frequencies are those of the whole head."""
  whole, _ = POSITIONS["rope"]().frequencies(64)
  inv_freq, _ = POSITIONS["proportional"](proportion=0.25).frequencies(64)
  np.testing.assert_array_equal(inv_freq[:8], whole[:8])
  assert not inv_freq[8:].any() and len(inv_freq) == 32
  partial, _ = POSITIONS["rope"](rotary_dim=16).frequencies(16)
  assert not np.allclose(partial[1:], inv_freq[1:8])


def test_self_extend_takes_the_smallest_group_that_reaches():
  """(L0 - w) G + w >= factor L0, and not by one less; the farthest of these has a relative position of at most L0."""
  for factor in (1.0, 1.01, 2.0, 7.5, 8.0, 64.0):
    for window in (1, 5, 64, 100, 127):
      group = POSITIONS["self_extend"](original_length=128, factor=factor, window=window).size
      assert (128 - window) * group + window >= factor * 128
      assert group == 1 or (128 - window) * (group - 1) + window < factor * 128
      last = int(factor * 128) - 1
      assert last // group + window - window // group <= 128
  assert POSITIONS["self_extend"](original_length=128, factor=8.0).size == 15
  assert POSITIONS["self_extend"](original_length=128, factor=8.0, group=3).size == 3


SCALINGS = ["pi", "ntk_old", "ntk", "ntk_fixed", "ntk_mixed", "dynamic_ntk", "yarn"]
SCALINGS += ["ntk_by_parts", "llama3", "proportional", "longrope"]


def required(name, pairs=32):
  """What a method has no default for: LongRoPE's lists, the size of a table."""
  if name == "longrope":
    return dict(short_factor=(1.0,) * pairs, long_factor=(2.0,) * pairs)
  return dict(max_length=128) if name == "learned" else {}


@pytest.mark.parametrize(
  "name", [pytest.param(n, marks=[pytest.mark.core] * (n == "yarn")) for n in SCALINGS]
)
@pytest.mark.parametrize("base, rotary_dim", [(10000.0, 128), (500000.0, 64), (1000000.0, 24)])
def test_factor_one_is_plain_rope(name, base, rotary_dim):
  """To the last bit, and so the same uint32 words on the device."""
  plain, _ = POSITIONS["rope"](base=base).frequencies(rotary_dim)
  fields = dict(base=base, factor=1.0, original_length=128) | required(name, rotary_dim // 2)
  inv_freq, scale = POSITIONS[name](**fields).frequencies(rotary_dim)
  np.testing.assert_array_equal(inv_freq, plain)
  assert scale == 1.0


@pytest.mark.parametrize(
  "name", ["rerope", "leaky_rerope", "inv_leaky_rerope", "self_extend", "streaming", "xpos"]
)
def test_methods_of_the_distance_keep_the_frequencies_of_rope(name):
  inv_freq, scale = POSITIONS[name](base=500000.0, original_length=64).frequencies(64)
  np.testing.assert_array_equal(inv_freq, POSITIONS["rope"](base=500000.0).frequencies(64)[0])
  assert scale == 1.0


@pytest.mark.parametrize("seq_len", [None, 1, 127, 128])
@pytest.mark.parametrize("factor", [1.0, 2.0, 8.0])
def test_dynamic_ntk_is_rope_up_to_the_trained_length(seq_len, factor):
  inv_freq, scale = POSITIONS["dynamic_ntk"](factor=factor, original_length=128).frequencies(
    64, seq_len=seq_len
  )
  np.testing.assert_array_equal(inv_freq, POSITIONS["rope"]().frequencies(64)[0])
  assert scale == 1.0


def test_dynamic_ntk_grows_with_every_token_beyond():
  """At factor 1 too, where it is NTK-aware by seq_len / original_length: factor 1 is no control here."""
  method = POSITIONS["dynamic_ntk"](factor=1.0, original_length=128)
  last = [method.frequencies(64, seq_len=n)[0][-1] for n in range(128, 1025)]
  assert np.all(np.diff(last) < 0)
  ntk, _ = POSITIONS["ntk"](factor=8.0).frequencies(64)
  np.testing.assert_allclose(method.frequencies(64, seq_len=1024)[0], ntk, rtol=1e-14, atol=0)


YARN = dict(factor=8.0, original_length=4096, base=10000.0)
PARTS = dict(factor=8.0, original_length=4096)
LONG_64 = dict(factor=8.0, original_length=128) | required("longrope")
FIELDS = [
  ("rope", {}, dict(base=10001.0)),
  ("pi", dict(factor=8.0), dict(factor=8.001)),
  ("ntk_mixed", dict(factor=8.0), dict(exponent=0.63)),
  ("dynamic_ntk", dict(factor=2.0, original_length=128), dict(original_length=129)),
  *[
    ("ntk_by_parts", PARTS, dict([change]))
    for change in (
      ("base", 500000.0),
      ("factor", 8.001),
      ("original_length", 2048),
      ("beta_turns", (0.5, 1.25)),
      ("beta_turns", (0.75, 2.0)),
      ("gamma_turns", (3.0, 16.0)),
      ("gamma_turns", (2.0, 32.0)),
    )
  ],
  *[
    ("llama3", PARTS, dict([change]))
    for change in (
      ("base", 500000.0),
      ("factor", 8.001),
      ("original_length", 4095),
      ("low_freq_factor", 1.1),
      ("high_freq_factor", 4.1),
    )
  ],
  *[
    ("longrope", LONG_64, dict([change]))
    for change in (
      ("base", 500000.0),
      ("factor", 8.001),
      ("original_length", 129),
      ("long_factor", (2.0,) * 31 + (2.1,)),
      ("attention_factor", 1.0),
    )
  ],
  ("longrope", LONG_64 | dict(original_length=1024), dict(short_factor=(1.0,) * 31 + (1.1,))),
  ("proportional", dict(proportion=0.5), dict(proportion=0.54)),
  ("proportional", dict(proportion=0.5), dict(factor=1.1)),
  *[
    ("yarn", YARN | more, dict([change]))
    for more, change in (
      ({}, ("base", 500000.0)),
      ({}, ("factor", 8.001)),
      ({}, ("original_length", 2048)),
      ({}, ("beta_fast", 16.0)),
      ({}, ("beta_slow", 2.0)),
      ({}, ("truncate", False)),
      ({}, ("attention_factor", 1.0)),
      (dict(mscale=1.0, mscale_all_dim=0.5), ("mscale", 0.9)),
      (dict(mscale=1.0, mscale_all_dim=0.5), ("mscale_all_dim", 0.4)),
    )
  ],
]


@pytest.mark.parametrize("name, kw, change", FIELDS)
def test_every_field_moves_the_result(name, kw, change):
  """A field that is read and dropped is how the wrong RoPE ships."""
  one = POSITIONS[name](**kw)
  (freqs, scale), (new_freqs, new_scale) = (
    method.frequencies(64, seq_len=1024) for method in (one, dataclasses.replace(one, **change))
  )
  assert scale != new_scale or not np.array_equal(freqs, new_freqs)


NAN, INF = math.nan, math.inf
NEEDS_LENGTH = dict(original_length=128)
BAD = [
  *[("rope", {}, "base", value) for value in (1.0, 0.5, 0.0, -10000.0, NAN, INF, "10000")],
  *[("rope", {}, "rotary_dim", value) for value in (3, 0, -2, 64.0)],
  *[("rope", {}, "layout", value) for value in ("neox", "", None)],
  *[("rope", {}, "original_length", value) for value in (0, -1, 128.5)],
  *[
    (name, NEEDS_LENGTH | required(name), "factor", value)
    for name in (*SCALINGS, "inv_leaky_rerope", "self_extend")
    for value in (0.0, -2.0, NAN, INF, "2", True)
  ],
  *[
    (name, dict(factor=2.0) | required(name), "original_length", None)
    for name in ("dynamic_ntk", "yarn", "ntk_by_parts", "llama3", "longrope")
  ],
  *[
    ("ntk_by_parts", NEEDS_LENGTH, name, value)
    for name in ("beta_turns", "gamma_turns")
    for value in ((2.0, 1.0), (1.0, 1.0), (0.0, 1.0), (-1.0, 1.0), (1.0, INF), (NAN, 1.0), (1.0, NAN))
  ],
  *[
    ("ntk_by_parts", NEEDS_LENGTH, name, value)
    for name in ("beta_turns", "gamma_turns")
    for value in (1.0, None, (1.0,), (1.0, 2.0, 3.0), (1.0, "2"), "12")
  ],
  *[("llama3", NEEDS_LENGTH, "low_freq_factor", value) for value in (0.0, -1.0, NAN, INF, 4.0, 5.0, "1")],
  *[("llama3", NEEDS_LENGTH, "high_freq_factor", value) for value in (1.0, 0.5, 0.0, NAN, INF, None)],
  *[
    ("longrope", {key: value for key, value in LONG.items() if key != field}, field, value)
    for field in ("short_factor", "long_factor")
    for value in (None, 2.0, (), "1, 2, 3")
  ],
  *[("longrope", LONG, "attention_factor", value) for value in (0.0, -1.0, NAN, INF, "1")],
  ("longrope", LONG | dict(original_length=2), "original_length", 1),
  *[("proportional", {}, "proportion", value) for value in (0.0, -0.5, 1.01, NAN, INF, "1", None)],
  *[("leaky_rerope", NEEDS_LENGTH, "leak", value) for value in (0.0, -1.0, NAN, INF, "16", None)],
  *[("self_extend", NEEDS_LENGTH, "group", value) for value in (0, -1, 2.0, "2", True)],
  ("self_extend", dict(window=8), "group", None),
  ("self_extend", dict(window=8, original_length=8), "group", None),
  *[("streaming", NEEDS_LENGTH, "sinks", value) for value in (-1, 2.0, "2", None, True, 128)],
  *[("xpos", {}, field, value) for field in ("scale_base", "gamma") for value in (0.0, -1.0, NAN, INF, "1")],
  *[("ntk_mixed", {}, "exponent", value) for value in (-0.1, 1.1, NAN)],
  *[("yarn", NEEDS_LENGTH, "beta_fast", value) for value in (1.0, 0.5, 0.0, -1.0, NAN, INF)],
  *[("yarn", NEEDS_LENGTH, "beta_slow", value) for value in (32.0, 64.0, 0.0, NAN)],
  *[("yarn", NEEDS_LENGTH, "attention_factor", value) for value in (0.0, -1.0, NAN, INF)],
  *[("yarn", NEEDS_LENGTH | dict(mscale_all_dim=1.0), "mscale", value) for value in (-1.0, NAN, INF)],
  *[("yarn", NEEDS_LENGTH | dict(mscale=1.0), "mscale_all_dim", value) for value in (-1.0, NAN, INF)],
  *[
    (name, {}, "window", value)
    for name in ("rerope", "leaky_rerope", "inv_leaky_rerope", "self_extend", "streaming")
    for value in (0, -1, 2.5, None, "8", True)
  ],
]


@pytest.mark.parametrize("name, kw, field, value", BAD)
def test_bad_fields_are_named_with_what_was_found_and_expected(name, kw, field, value):
  with pytest.raises(ConfigError) as caught:
    POSITIONS[name](**kw | {field: value})
  message = str(caught.value)
  assert field in message and repr(value) in message and "expected" in message


@pytest.mark.parametrize("field", ["short_factor", "long_factor"])
@pytest.mark.parametrize("bad", [0.0, -1.0, NAN, INF, "1", None])
def test_every_factor_of_longrope_is_checked(field, bad):
  with pytest.raises(
    ConfigError, match=rf"LongRope.{field}: found {bad!r}, expected a finite number above 0"
  ):
    POSITIONS["longrope"](**LONG | {field: (1.0, bad, 2.0)})


@pytest.mark.parametrize("seq_len, field", [(128, "short_factor"), (129, "long_factor")])
def test_factors_of_longrope_that_do_not_fit_the_head(seq_len, field):
  method = POSITIONS["longrope"](**LONG)
  with pytest.raises(
    ConfigError, match=f"LongRope.{field}: found 3 numbers, expected 4, one a pair of rotary_dim"
  ):
    method.frequencies(8, seq_len=seq_len)


def test_a_proportion_that_turns_nothing_is_refused():
  with pytest.raises(
    ConfigError, match=r"proportion: found 0.05, which turns no pair of 32 coordinates.*at least 0.0625"
  ):
    POSITIONS["proportional"](proportion=0.05).frequencies(32)
  assert np.count_nonzero(POSITIONS["proportional"](proportion=0.0625).frequencies(32)[0]) == 1


@pytest.mark.core
def test_methods_are_hashable_values():
  assert issubclass(ConfigError, JaxllmError) and issubclass(JaxllmError, ValueError)
  for name, cls in POSITIONS.items():
    has_length = "original_length" in {field.name for field in dataclasses.fields(cls)}
    kw = (dict(original_length=128) if has_length else {}) | required(name)
    assert cls(**kw) == cls(**kw) and hash(cls(**kw)) == hash(cls(**kw))
    with pytest.raises(dataclasses.FrozenInstanceError):
      cls(**kw).base = 2.0
