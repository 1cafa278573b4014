import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.study import plots, report, rows
from jaxllm.study.findings import compare
from jaxllm.study.interval import T_95, bootstrap, half_width, mean, ratio


def cell(method, length, seed=0, scheme="rope", factor=None, metric="bpb_last"):
  return {
    "scheme": scheme, "quant": "none", "method": method, "factor": length / 128 if factor is None else factor,
    "train_length": 128, "length": length, "metric": metric, "seed": seed,
  }  # fmt: skip


def value(number, method, length=1024, seed=0, **kw):
  return rows.ok(cell(method, length, seed, **kw), number)


def test_t_quantiles_are_those_of_the_distribution():
  for degrees, quantile in T_95.items():
    assert quantile == pytest.approx(scipy.stats.t.ppf(0.975, degrees), abs=5.1e-4)


def test_the_interval_of_a_known_sample():
  sample = [2.2, 2.3, 2.4, 2.5, 2.6]
  assert mean(sample) == pytest.approx(2.4)
  low, high = scipy.stats.t.interval(0.95, 4, loc=2.4, scale=scipy.stats.sem(sample))
  assert half_width(sample) == pytest.approx((high - low) / 2, rel=2e-4)  # the quantiles have three decimals
  assert half_width([1.0, 1.0]) == 0
  wide = list(range(36))  # 35 degrees of freedom: the quantile of 30, the next smaller one there is
  assert half_width(wide) == pytest.approx(2.042 * scipy.stats.sem(wide))


def test_the_interval_of_a_ratio_is_the_delta_methods():
  """r = mean y / mean x: the variance of r is g' S g / n with the gradient g of the ratio and the covariance S of (y, x)."""
  rng = np.random.default_rng(0)
  x = rng.integers(50, 150, 40).astype(float)
  y = 2.5 * x + rng.normal(0, 20, 40)
  r, half = ratio(y, x)
  gradient = np.array([1 / x.mean(), -y.mean() / x.mean() ** 2])
  error = np.sqrt(gradient @ np.cov(y, x) @ gradient / 40)
  assert r == pytest.approx(y.sum() / x.sum(), rel=1e-14)
  assert half == pytest.approx(T_95[30] * error, rel=1e-12)
  assert ratio([3.0, 5.0, 9.0], [2.0] * 3)[1] == pytest.approx(half_width([1.5, 2.5, 4.5]), rel=1e-14)
  assert ratio([3.0], [2.0]) == (1.5, math.inf)


def test_the_bootstrap_of_a_difference_of_pairs_is_that_of_scipy():
  """Of the difference of two ratios over the same stretches, which is far narrower than that of either."""
  rng = np.random.default_rng(0)
  size = rng.integers(50, 150, 100).astype(float)
  base = size * rng.gamma(4, 0.5, 100)
  own = base + size * rng.normal(0.02, 0.05, 100)
  exp_ratio = lambda x, n: np.exp(x / n)
  found = bootstrap(
    lambda sums: exp_ratio(sums[:, 0], sums[:, 2]) - exp_ratio(sums[:, 1], sums[:, 2]),
    np.stack([own, base, size], axis=1),
  )
  sums = lambda x: np.sum(x, axis=-1)
  expected = scipy.stats.bootstrap(
    (own, base, size),
    lambda a, b, n, axis: exp_ratio(sums(a), sums(n)) - exp_ratio(sums(b), sums(n)),
    paired=True,
    vectorized=True,
    method="percentile",
    n_resamples=20_000,
    rng=np.random.default_rng(1),
  ).confidence_interval
  width = expected.high - expected.low
  assert found == pytest.approx((expected.low, expected.high), abs=0.04 * width)  # of the draws
  alone = bootstrap(lambda sums: exp_ratio(sums[:, 0], sums[:, 1]), np.stack([own, size], axis=1))
  assert alone[1] - alone[0] > 10 * width
  assert bootstrap(lambda sums: sums[:, 0], np.array([[3.0]])) == (3.0, 3.0)


def test_a_table_of_one_seed_with_what_is_missing():
  why = "changes nothing within the trained length"
  table = report.table(
    [
      value(2.314, "none", 128, factor=1.0),
      value(5.0, "none", 1024, factor=1.0),
      *(rows.not_applicable(cell(method, length), why) for method in ("pi", "yarn") for length in (64, 128)),
      value(2.756, "pi"),
      rows.failed(cell("yarn", 1024), "RuntimeError: out of memory"),
      value(0.5, "pi", metric="accuracy"),
    ],
    "bpb_last",
  )
  assert table.markdown() == (
    "| method |  64 |  128 |   1024 |\n"
    "| ------ | --: | ---: | -----: |\n"
    "| none   |   - | 2.31 |   5.00 |\n"
    "| pi     | n/a |  n/a |   2.76 |\n"
    "| yarn   | n/a |  n/a | failed |\n"
    "\n"
    "- failed: yarn at 1024, seed 0: RuntimeError: out of memory\n"
    "- not applicable: pi, yarn at 64, 128: changes nothing within the trained length\n"
  )


def test_several_seeds_have_an_interval_and_count_those_without_a_value():
  table = report.table(
    [
      *(value(x, "ntk", seed=i) for i, x in enumerate([2.2, 2.3, 2.4, 2.5, 2.6])),
      *(value(x, "yarn", seed=i) for i, x in enumerate([2.0, 2.0])),
      rows.failed(cell("yarn", 1024, seed=2), "no"),
    ],
    "bpb_last",
    digits=3,
  )
  assert [line[1] for line in table.body] == ["2.400 ± 0.196", "2.000 ± 0.000 (2 of 3 seeds)"]


def test_columns_that_tell_rows_apart_are_shown():
  both = [value(2.0, "none"), value(3.0, "none", scheme="alibi")]
  assert report.table(both, "bpb_last").header == ("scheme", "method", "1024")
  factors = [value(2.0, "yarn", factor=4.0), value(3.0, "yarn", factor=8.0)]
  assert report.table(factors, "bpb_last").body == (("yarn", "4", "2.00"), ("yarn", "8", "3.00"))
  with pytest.raises(AssertionError, match="two rows for one cell"):
    report.table([value(2.0, "yarn"), value(3.0, "yarn")], "bpb_last")


def test_the_table_on_the_terminal_says_the_same(capsys, monkeypatch):
  monkeypatch.setenv("COLUMNS", "100")
  report.table([value(2.0, "yarn"), rows.failed(cell("pi", 1024), "bad [/x]")], "bpb_last").show("Loss [a]")
  out = capsys.readouterr().out
  assert "yarn" in out and "2.00" in out and "failed: pi at 1024, seed 0: bad [/x]" in out


def test_a_wide_table_in_a_file_has_all_its_numbers(capsys, monkeypatch):
  monkeypatch.setenv("COLUMNS", "80")
  lengths = [64 * 2**i for i in range(16)]
  found = report.table([value(1 + n / 1e6, "yarn", n) for n in lengths], "bpb_last", digits=6)
  title = "Loss on the last block in bits per byte, a title that is longer than eighty columns: " + "x" * 20
  found.show(title)
  report.table([], "bpb_last").show(title)
  lines = capsys.readouterr().out.splitlines()
  assert lines.count(title) == 2
  assert lines[2].split() == ["method", *map(str, lengths)]
  assert next(line for line in lines if "yarn" in line).split() == ["yarn", *found.body[0][1:]]


def test_a_finding_turns_with_the_rows():
  same = {"metric": "bpb_last", "length": 1024, "a": "yarn", "b": "ntk"}
  assert compare([value(2.31, "yarn"), value(2.75, "ntk")], **same) == (
    "At length 1024, `yarn` has a lower loss on the last block than `ntk` "
    "(2.310 against 2.750 bits per byte, difference 0.440)."
  )
  assert compare([value(2.75, "yarn"), value(2.31, "ntk")], **same) == (
    "At length 1024, `yarn` has a higher loss on the last block than `ntk` "
    "(2.750 against 2.310 bits per byte, difference 0.440)."
  )
  assert compare([value(2.311, "yarn"), value(2.314, "ntk")], **same) == (
    "At length 1024, there is no difference between `yarn` and `ntk` in the loss on the last block "
    "(2.311 against 2.314 bits per byte)."
  )


numbers = st.lists(st.tuples(st.floats(0, 9), st.floats(0, 9)), min_size=1, max_size=5)


@given(numbers)
def test_swapping_the_values_swaps_the_words(pairs):
  def sentence(pairs):
    found = [value(x, m, seed=i) for i, pair in enumerate(pairs) for m, x in zip("ab", pair, strict=True)]
    return compare(found, "bpb_last", 1024, "a", "b")

  text, swapped = sentence(pairs), sentence([pair[::-1] for pair in pairs])
  words = {"lower": "higher", "higher": "lower"}
  assert [words.get(word, word) for word in text.split("(")[0].split()] == swapped.split("(")[0].split()
  assert text.split(")")[1] == swapped.split(")")[1]  # as many seeds agree
  low = math.fsum(x for x, _ in pairs) / len(pairs) < math.fsum(y for _, y in pairs) / len(pairs)
  assert "no difference" in text or ("lower" in text) == low


def test_a_finding_over_seeds_says_how_many_agree_and_how_many_are_left_out():
  found = [value(x, "yarn", seed=i) for i, x in enumerate([2.0, 2.1, 2.6, 2.2])]
  found += [value(x, "ntk", seed=i) for i, x in enumerate([2.5, 2.5, 2.5])]
  found += [rows.failed(cell("ntk", 1024, seed=3), "no")]
  assert compare(found, "bpb_last", 1024, "yarn", "ntk") == (
    "At length 1024, `yarn` has a lower loss on the last block than `ntk` (2.233 against 2.500 bits per byte, "
    "difference 0.267) in the mean of 3 seeds; 2 of 3 agree; 1 of 4 seeds left out, as a value is missing."
  )


def test_a_finding_without_values_says_why():
  yarn, pi = (cell(method, 1024, metric="accuracy") for method in ("yarn", "pi"))
  found = [rows.failed(yarn, "no memory"), rows.not_applicable(pi, "table ends")]
  start = "At length 1024, `yarn` and `{}` cannot be compared in the accuracy: `yarn` failed (no memory)"
  assert compare(found, "accuracy", 1024, "yarn", "ntk") == start.format("ntk") + "; `ntk` has no result."
  unfit = "; `pi` is not applicable (table ends)."
  assert compare(found, "accuracy", 1024, "yarn", "pi") == start.format("pi") + unfit


def test_a_finding_between_schemes_and_one_that_is_ambiguous():
  found = [value(9.0, "none", scheme="alibi", metric="perplexity"), value(2.0, "none", metric="perplexity")]
  alibi, rope = ({"scheme": scheme, "method": "none"} for scheme in ("alibi", "rope"))
  assert compare(found, "perplexity", 1024, alibi, rope) == (
    "At length 1024, `alibi none` has a higher perplexity than `rope none` (9.000 against 2.000, "
    "difference 7.000)."
  )
  with pytest.raises(AssertionError, match="several rows a seed"):
    compare(found, "perplexity", 1024, "none", alibi)


def test_series_are_the_tables_numbers():
  found = [value(x, "yarn", n, seed=s) for n in (256, 128) for s, x in enumerate([2.0, 2.2])]
  found += [value(3.0, "ntk", 128), rows.failed(cell("ntk", 256), "no"), rows.failed(cell("pi", 256), "no")]
  lines, bands = report.series(found, "bpb_last")
  assert lines == {"yarn": ([128, 256], [2.1, 2.1]), "ntk": ([128], [3.0])}
  spread = half_width([2.0, 2.2])
  assert bands == {"yarn": ([2.1 - spread] * 2, [2.1 + spread] * 2)}


def test_a_plot_is_the_same_bytes_and_shows_what_it_is_given(tmp_path):
  lengths = [64, 128, 1024]
  series = {f"method {i}": (lengths, [2.0, 2.1 + 0.1 * i, 3.0 + i]) for i in range(15)}
  bands = {"method 3": ([1.9, 2.3, 5.9], [2.1, 2.5, 6.1])}

  def draw(name, *panels, **kw):
    named = {f"panel {i}": panel for i, panel in enumerate(panels)}
    plots.lines(tmp_path / name, named, "length", "bits per byte", "Loss", **kw)
    return (tmp_path / name).read_bytes()

  first = draw("a.png", (series, bands), (series, {}))
  assert first[:8] == b"\x89PNG\r\n\x1a\n"
  assert draw("b.png", (series, bands), (series, {})) == first
  assert b"Software" not in first and b"Date" not in first
  one = {"yarn": (lengths, [2.0, 2.4, 4.0])}, {}
  hole = {"yarn": (lengths, [2.0, None, 4.0])}, {}
  others = (
    draw("c.png", one),
    draw("d.png", hole),
    draw("e.png", one, xlog2=False),
    draw("f.png", (series, {})),
  )
  assert len({first, *others}) == 5
