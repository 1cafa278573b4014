"""Report, findings and figures are computed from the rows: other rows, other sentences."""

import csv
import functools
import json
import re

import matplotlib.image
import pytest
import sweep_case

from experiments import length_extrapolation
from experiments.extrapolation import report
from experiments.extrapolation.trained import Trained
from jaxllm.study import methods, rows

FIGURES = (
  "bpb_vs_length.png",
  "bpb_vs_position.png",
  "accuracy_vs_length.png",
  "accuracy_repeated_vs_length.png",
)
ARGS = (
  "--train_length=16",
  "--lengths=16,32,128",
  "--schemes=rope,alibi",
  "--methods=none,pi,ntk,yarn,rerope",
  "--steps=5",
  "--other_steps=5",
)


@pytest.fixture
def no_figures(monkeypatch):
  """For tests of words: figures take most of the time."""
  monkeypatch.setattr(report.plots, "lines", lambda *args, **kwargs: None)


def value(cell, sign=1):
  """Bits per byte that differ by method, grow with length, and vary with the seed; `sign` turns their order."""
  rank = list(methods.METHODS).index(cell["method"])
  return 4 + sign * (0.1 * rank + cell["length"] / 512) + 0.001 * cell["seed"] + 0.01 * cell.get("window", 0)


def write(out, corpus, *args, make=value):
  """(exit code, all rows) of a report from made-up values."""
  settings = sweep_case.settings_of(*ARGS, f"--corpus={corpus}", *args)
  models = Trained(settings, "float32")
  config = length_extrapolation.record(settings, models, "float32")
  chosen = (list(models.schemes.values()), settings.methods, settings.metrics, settings.factors)
  groups = methods.plan(*chosen, settings.train_length, settings.lengths, settings.seeds, settings.windows)
  all_rows = []
  for cell in (cell for group in groups for cell in group.cells):
    reason = methods.not_applicable(models.schemes[cell["scheme"]], cell["method"])
    made = rows.not_applicable(cell, reason) if reason else make(cell)
    all_rows.append(made if isinstance(made, dict) else rows.ok(cell, made))
  out.mkdir()
  return report.write(out, settings, config, all_rows, models), all_rows


def sheet(path):
  with path.open() as file:
    return list(csv.DictReader(file))


def findings(out):
  part = (out / "report.md").read_text().split("## Findings")[1].split("##")[0]
  return [line[2:] for line in part.splitlines() if line.startswith("- ")]


@pytest.mark.core
def test_reversed_rows_reverse_the_sentences(tmp_path, corpus, no_figures):
  sentences = []
  for sign in (1, -1):
    assert write(tmp_path / str(sign), corpus, make=functools.partial(value, sign=sign))[0] == 0
    sentences.append(findings(tmp_path / str(sign)))
  for one, other in zip(*sentences, strict=True):
    turned = [("has a higher", "has a lower"), ("is above", "is below")]
    if "the lowest loss" in one:
      assert ("`none`" in one and "`pi`" in one) and ("`rerope`" in other and "`yarn`" in other)
    else:
      assert any(a in one and b in other for a, b in turned), (one, other)
  text = "\n".join(sentences[0])
  assert "At length 128, `rope pi` has a higher loss on the last block than `rope none`" in text
  assert "`rope rerope` at length 128 is above that of `rope none` at the training length 16" in text
  assert "`alibi none` at length 128 is above" in text


def test_equal_rows_are_no_difference(tmp_path, corpus, no_figures):
  write(tmp_path / "out", corpus, make=lambda cell: 3.0)
  for sentence in findings(tmp_path / "out"):
    assert re.search("no difference|equals|lowest", sentence), sentence


def test_several_seeds_have_intervals_and_pairs(tmp_path, corpus, no_figures):
  out = tmp_path / "out"
  assert write(out, corpus, "--seeds=3")[0] == 0
  text = (out / "report.md").read_text()
  assert "3 seed(s)" in text and "in the mean of 3 seeds; 3 of 3 agree" in text
  table = text.split("## Bits per byte on the last block")[1].split("##")[0]
  line = next(line for line in table.splitlines() if re.match(r"\| rope +\| pi ", line))
  assert line.count("±") == 3
  for at in (16, 32, 128):  # seeds are 0.001 apart, so that the mean is the middle one
    middle = value({"method": "pi", "length": at, "seed": 1})
    assert f"{middle:.3f} ± 0.002" in line  # 4.303 * 0.001 / sqrt(3)


def test_files_hold_every_row(tmp_path, corpus):
  out = tmp_path / "out"
  _, all_rows = write(out, corpus)
  plain = [row for row in all_rows if row["metric"] in methods.METRICS]
  assert [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()] == plain
  found = sheet(out / "results.csv")
  assert [(r["scheme"], r["method"], r["length"], r["metric"], r["status"]) for r in found] == [
    (r["scheme"], r["method"], str(r["length"]), r["metric"], r["status"]) for r in plain
  ]
  assert [r["value"] for r in found] == ["" if r["value"] is None else repr(r["value"]) for r in plain]
  for name, metric in (("positions.csv", methods.BY_POSITION), ("windows.csv", methods.BY_WINDOW)):
    details = [repr(row["value"]) for row in all_rows if row["metric"] == metric]
    assert [row["value"] for row in sheet(out / name)] == details
  for name in FIGURES:
    image = matplotlib.image.imread(out / name)
    assert image.shape[0] > 300 and image.std() > 0.01
  assert "pi changes RoPE, and alibi has no layer of plain RoPE" in (out / "report.md").read_text()


def test_the_same_rows_give_the_same_bytes(tmp_path, corpus):
  for name in "ab":
    write(tmp_path / name, corpus)
  for path in (tmp_path / "a").iterdir():
    assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_failed_cells_are_counted_and_do_not_enter_a_finding(tmp_path, corpus, no_figures, capsys):
  make = lambda cell: rows.failed(cell, "OutOfPaper: no more") if cell["method"] == "yarn" else value(cell)
  code, _ = write(tmp_path / "out", corpus, make=make)
  assert code == 1
  assert "OutOfPaper: no more.  The same command tries them again." in capsys.readouterr().out
  text = (tmp_path / "out" / "report.md").read_text()
  assert "failed: rope yarn at 128, seed 0: OutOfPaper: no more" in text
  assert "`rope yarn` and `rope ntk` cannot be compared" in text


@pytest.mark.parametrize(
  "args",
  [
    ("--schemes=alibi", "--methods=none"),
    ("--windows=1", "--other_steps=7"),
    ("--metrics=accuracy_repeated",),
    ("--lengths=16", "--methods=none"),
    pytest.param(("--factors=2,4",), marks=pytest.mark.slow),
    pytest.param(("--lengths=32",), marks=pytest.mark.slow),
  ],
)
@pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning"
)  # of garbage that other tests left
@pytest.mark.filterwarnings("error")
def test_sweeps_with_little_to_show_have_a_report_too(tmp_path, corpus, args):
  assert write(tmp_path / "out", corpus, *args)[0] == 0
  assert (tmp_path / "out" / "report.md").stat().st_size > 500


def test_many_schemes_share_a_panel():
  """Those that methods change keep a panel of their own; few schemes have one each."""
  row = dict(
    metric="bpb_last", factor=None, train_length=8, seed=0, status="ok", value=1.0, quant="none", reason=None
  )
  rows = lambda schemes: [
    {**row, "scheme": scheme, "method": method, "length": length}
    for scheme in schemes
    for method in ("none", "logn", *(("pi",) if scheme == "rope" else ()))
    for length in (8, 16)
  ]
  found = report._panels(rows(("rope", "alibi", "t5", "nope", "hwfa")), "bpb_last")
  assert sorted(found) == ["as trained", "rope"]
  assert len(found["rope"][0]) == 3 and len(found["as trained"][0]) == 4
  assert all("none" in label for label in found["as trained"][0])
  assert list(report._panels(rows(("rope", "alibi")), "bpb_last")) == ["rope", "alibi"]


def test_a_seed_that_failed_for_one_method_is_left_out_of_every_sentence(tmp_path, corpus, no_figures):
  """yarn is 0.5 better than ntk in each seed that both have; seed 1, where all is 3 worse, failed for yarn and rerope."""

  def make(cell):
    better = {"yarn": 0.5, "rerope": -0.4}.get(cell["method"], 0)
    if cell["seed"] == 1 and cell["length"] == 128 and cell["method"] in ("yarn", "rerope"):
      return rows.failed(cell, "no memory")
    if cell["metric"] == methods.IN_LENGTH and cell["seed"]:
      return rows.failed(cell, "no memory")
    return 5 - better + 3 * cell["seed"] + 0.01 * cell.get("window", 0)

  assert write(tmp_path / "out", corpus, "--seeds=2", "--windows=4", make=make)[0] == 1
  text = "\n".join(findings(tmp_path / "out"))
  line = next(
    line for line in text.splitlines() if "`rope yarn` has a lower" in line and "`rope ntk`" in line
  )
  assert "difference 0.500" in line and "Over the 4 windows: -0.500 ± 0.000." in line
  across = next(line for line in text.splitlines() if "`rope rerope` at length 128" in line)
  assert "is above" in across and "(5.400 against 5.000 bits per byte; 1 of 2 seeds left out" in across
  best = next(line for line in text.splitlines() if "the lowest loss on the last block of `rope`" in line)
  assert "`yarn` (4.500" in best and "1 of 2 seeds left out" in best
  assert "rope 5.000 (5 steps; 1 of 2 seeds)" in (tmp_path / "out" / "report.md").read_text()


def test_a_method_that_failed_does_not_hide_the_best_of_the_others(tmp_path, corpus, no_figures):
  make = lambda cell: rows.failed(cell, "Lost: all") if cell["method"] == "yarn" else value(cell)
  write(tmp_path / "out", corpus, make=make)
  best = next(s for s in findings(tmp_path / "out") if "the lowest loss" in s)
  assert "is that of `none`" in best and best.endswith(", leaving out yarn, which failed.")


def test_methods_without_a_seed_in_common_are_said_to_have_none(tmp_path, corpus, no_figures):
  """yarn failed in one seed and rerope in the other."""
  lost = {("yarn", 0), ("rerope", 1)}
  make = lambda cell: (
    rows.failed(cell, "no memory") if (cell["method"], cell["seed"]) in lost else value(cell)
  )
  write(tmp_path / "out", corpus, "--seeds=2", make=make)
  text = "\n".join(findings(tmp_path / "out"))
  assert "At length 128, the methods of `rope` have no seed in common, and so none is the best." in text
