"""Frequencies and scales of every RoPE scaling, against numbers that jaxllm had no part in making."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from jaxllm.errors import ConfigError, JaxllmError
from jaxllm.position import POSITIONS

ROWS = json.loads((Path(__file__).parents[1] / "golden" / "rope.json").read_text())["frequencies"]


def label(row):
  kw = "-".join(f"{key}={value:g}" for key, value in row["kw"].items())
  return f"{row['method']}-d{row['rotary_dim']}-L{row['seq_len']}-{kw}"


def cases(rows):
  return [pytest.param(row, id=label(row), marks=[pytest.mark.core] * (i == 0)) for i, row in enumerate(rows)]


def computed(row):
  return POSITIONS[row["method"]](**row["kw"]).frequencies(row["rotary_dim"], seq_len=row["seq_len"])


@pytest.mark.parametrize("row", cases(ROWS[::-1]))
def test_equal_to_the_published_formula_at_fifty_digits(row):
  inv_freq, scale = computed(row)
  assert inv_freq.dtype == np.float64 and inv_freq.shape == (row["rotary_dim"] // 2,)
  np.testing.assert_allclose(inv_freq, row["inv_freq"], rtol=1e-14, atol=0)
  assert isinstance(scale, float) and math.isclose(scale, row["scale"], rel_tol=1e-15)


@pytest.mark.parametrize("row", cases([row for row in ROWS if "transformers" in row][::-1]))
def test_equal_to_transformers(row):
  inv_freq, scale = computed(row)
  np.testing.assert_allclose(inv_freq, row["transformers"]["inv_freq"], rtol=1e-6, atol=0)
  assert abs(scale - row["transformers"]["scale"]) <= 1e-7


def test_the_golden_file_covers_every_scaling():
  assert {row["method"] for row in ROWS} == set(POSITIONS) - {"nope", "alibi", "rerope"} - {
    "sinusoidal",
    "learned",
    "t5",
    "rope_2d",
  }


RATIOS = ["pi", "ntk_old", "ntk", "ntk_fixed", "ntk_mixed"]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.core] * (n == "ntk")) for n in RATIOS])
def test_highest_and_lowest_frequency_ratios(name, golden):
  """At d = 128 and factor 8; "old" and "fixed" differ in the last by 1/7.744 against 1/8 only."""
  plain, _ = POSITIONS["rope"]().frequencies(128)
  scaled, scale = POSITIONS[name](factor=8.0).frequencies(128)
  ratios = [scaled[0] / plain[0], scaled[-1] / plain[-1]]
  np.testing.assert_allclose(ratios, golden["rope"]["pins"]["ratios"][name], rtol=1e-12, atol=0)
  assert scale == 1.0
  if name in ("ntk_old", "ntk"):
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


SCALINGS = ["pi", "ntk_old", "ntk", "ntk_fixed", "ntk_mixed", "dynamic_ntk", "yarn"]


@pytest.mark.parametrize(
  "name", [pytest.param(n, marks=[pytest.mark.core] * (n == "yarn")) for n in SCALINGS]
)
@pytest.mark.parametrize("base, rotary_dim", [(10000.0, 128), (500000.0, 64), (1000000.0, 24)])
def test_factor_one_is_plain_rope(name, base, rotary_dim):
  """To the last bit, and so the same uint32 words on the device."""
  plain, _ = POSITIONS["rope"](base=base).frequencies(rotary_dim)
  inv_freq, scale = POSITIONS[name](base=base, factor=1.0, original_length=128).frequencies(rotary_dim)
  np.testing.assert_array_equal(inv_freq, plain)
  assert scale == 1.0


def test_rerope_keeps_the_frequencies_of_rope():
  inv_freq, scale = POSITIONS["rerope"](base=500000.0, window=64).frequencies(64)
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
FIELDS = [
  ("rope", {}, dict(base=10001.0)),
  ("pi", dict(factor=8.0), dict(factor=8.001)),
  ("ntk_mixed", dict(factor=8.0), dict(exponent=0.63)),
  ("dynamic_ntk", dict(factor=2.0, original_length=128), dict(original_length=129)),
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
  *[(name, NEEDS_LENGTH, "factor", value) for name in SCALINGS for value in (0.0, -2.0, NAN, INF)],
  *[(name, dict(factor=2.0), "original_length", None) for name in ("dynamic_ntk", "yarn")],
  *[("ntk_mixed", {}, "exponent", value) for value in (-0.1, 1.1, NAN)],
  *[("yarn", NEEDS_LENGTH, "beta_fast", value) for value in (1.0, 0.5, 0.0, -1.0, NAN, INF)],
  *[("yarn", NEEDS_LENGTH, "beta_slow", value) for value in (32.0, 64.0, 0.0, NAN)],
  *[("yarn", NEEDS_LENGTH, "attention_factor", value) for value in (0.0, -1.0, NAN, INF)],
  *[("yarn", NEEDS_LENGTH | dict(mscale_all_dim=1.0), "mscale", value) for value in (-1.0, NAN, INF)],
  *[("yarn", NEEDS_LENGTH | dict(mscale=1.0), "mscale_all_dim", value) for value in (-1.0, NAN, INF)],
  *[("rerope", {}, "window", value) for value in (0, -1, 2.5, None)],
]


@pytest.mark.parametrize("name, kw, field, value", BAD)
def test_bad_fields_are_named_with_what_was_found_and_expected(name, kw, field, value):
  with pytest.raises(ConfigError) as caught:
    POSITIONS[name](**kw, **{field: value})
  message = str(caught.value)
  assert field in message and repr(value) in message and "expected" in message


@pytest.mark.core
def test_methods_are_hashable_values():
  assert issubclass(ConfigError, JaxllmError) and issubclass(JaxllmError, ValueError)
  for name, cls in POSITIONS.items():
    kw = dict(original_length=128) if name in ("dynamic_ntk", "yarn", "rerope") else {}
    assert cls(**kw) == cls(**kw) and hash(cls(**kw)) == hash(cls(**kw))
    with pytest.raises(dataclasses.FrozenInstanceError):
      cls(**kw).base = 2.0
