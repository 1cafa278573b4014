"""Tables, figures and findings of the length-extrapolation sweep, all computed from its rows."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from experiments.extrapolation.evaluate import in_length_windows
from experiments.extrapolation.models import Models
from experiments.extrapolation.settings import Settings
from jaxllm.study import files, interval, methods, plots
from jaxllm.study.findings import METRICS, NO_DIFFERENCE, compare
from jaxllm.study.report import series, table

NTK = ("ntk_old", "ntk", "ntk_fixed", "ntk_mixed", "dynamic_ntk")
PAIRS = (*((name, "none") for name in ("pi", *NTK)), *(("yarn", name) for name in NTK), ("rerope", "yarn"))
"""Methods of the RoPE model that the findings compare, and nothing about how it should come out."""
HEADINGS = {
  "bpb_last": "Bits per byte on the last block",
  "bpb": "Bits per byte on the whole window",
  "accuracy": "Next-{token} accuracy on natural text",
  "accuracy_repeated": "Next-{token} accuracy on one block repeated",
  "perplexity": "Perplexity of a {token} on the whole window",
}


def write(out: Path, settings: Settings, config: dict, all_rows: list[dict], models: Models) -> int:
  """Write every result file into `out` and show the main table; the exit code of the run."""
  rows = [row for row in all_rows if row["metric"] not in methods.DETAILS]
  curve, windows, in_length = ([row for row in all_rows if row["metric"] == name] for name in methods.DETAILS)
  files.write_results(out, rows)
  files.write_text(out / "positions.csv", _sheet(curve, "position"))
  files.write_text(out / "windows.csv", _sheet(windows, "window"))
  labelled = _labelled(rows, settings, models)
  figures = _plots(out, settings, models, labelled, _labelled(curve, settings, models))
  learnt = _in_length(in_length, settings, models)
  findings = _findings(rows, windows, settings, models)
  files.write_text(
    out / "report.md", _markdown(settings, models, config, rows, labelled, learnt, findings, figures)
  )
  main = next(m for m in methods.TOKEN_METRICS if m in settings.metrics)
  title = f"{_heading(main, models)} (trained at {settings.train_length} {models.unit})"
  table(_applicable(labelled), main).show(title)
  print(learnt)
  print(f"Results, figures and report: {out}")
  failed = [row for row in all_rows if row["status"] == "failed"]
  if failed:
    reasons = sorted({row["reason"] for row in failed})
    print(f"{len(failed)} cells failed: {'; '.join(reasons)}.  The same command tries them again.")
  return 1 if failed else 0


def _heading(metric: str, models: Models) -> str:
  return HEADINGS[metric].format(token=models.unit.removesuffix("s"))


def _labelled(rows: list[dict], settings: Settings, models: Models) -> list[dict]:
  """Rows as tables and figures name them: a factor only where it was a choice, and schemes by the names of the models."""
  factor = {} if settings.factors is not None else {"factor": None}
  return [{**row, **factor, "scheme": models.name(row["scheme"])} for row in rows]


def _applicable(rows: list[dict]) -> list[dict]:
  """Without the methods that apply at no length; one that ends at some length is "n/a" beyond it."""
  some = {(row["scheme"], row["method"]) for row in rows if row["status"] != "not applicable"}
  return [row for row in rows if (row["scheme"], row["method"]) in some]


def _sheet(details: list[dict], place: str) -> str:
  out = io.StringIO()
  columns = (
    "scheme",
    "method",
    "factor",
    "train_length",
    "length",
    place,
    "value",
    "seed",
    "status",
    "reason",
  )
  writer = csv.DictWriter(out, columns, lineterminator="\n", extrasaction="ignore")
  writer.writeheader()
  writer.writerows(details)
  return out.getvalue()


def _plots(out: Path, settings: Settings, models: Models, rows: list[dict], curve: list[dict]) -> list[str]:
  """Write the figures that the metrics allow; their names."""
  rows, curve = _applicable(rows), _applicable(curve)
  written = []
  for name, metric in (
    ("bpb_vs_length.png", "bpb_last"),
    ("accuracy_vs_length.png", "accuracy"),
    ("accuracy_repeated_vs_length.png", "accuracy_repeated"),
  ):
    if metric in settings.metrics:
      xlabel = f"test length in {models.unit} (trained at {settings.train_length})"
      heading = _heading(metric, models)
      plots.lines(out / name, _panels(rows, metric), xlabel, heading, heading)
      written.append(name)
  # a position takes the place of the length, so that the same series code serves
  by_position = _panels([{**row, "length": row["position"]} for row in curve], methods.BY_POSITION)
  title = f"Bits per byte by position, windows of {max(settings.lengths)} {models.unit}"
  plots.lines(
    out / "bpb_vs_position.png",
    by_position,
    f"position in {models.unit}",
    "bits per byte",
    title,
    xlog2=False,
  )
  return [*written, "bpb_vs_position.png"]


MANY = 4
"""Schemes beyond which those that no method changes share a panel."""


def _panels(rows: list[dict], metric: str) -> dict:
  """A panel a scheme; of many schemes, those that are tested as trained (or with log-n at most) share one."""
  tested: dict[str, set] = {}
  for row in rows:
    tested.setdefault(row["scheme"], set()).add(row["method"])
  panels = {scheme: [row for row in rows if row["scheme"] == scheme] for scheme in tested}
  if len(tested) > MANY:
    others = [scheme for scheme, names in tested.items() if names <= {"none", "logn"}]
    panels = {scheme: panel for scheme, panel in panels.items() if scheme not in others}
    panels["as trained"] = [row for row in rows if row["scheme"] in others and row["method"] == "none"]
  return {name: series(panel, metric) for name, panel in panels.items() if panel}


def _in_length(rows: list[dict], settings: Settings, models: Models) -> str:
  """What the models reach at the training length."""
  values = {
    scheme: [row["value"] for row in rows if row["scheme"] == scheme and row["status"] == "ok"]
    for scheme in settings.schemes
  }
  return models.learnt(values, in_length_windows(models, settings.train_length)[0])


def _findings(rows: list[dict], windows: list[dict], settings: Settings, models: Models) -> list[str]:
  """Comparisons computed from the rows, on the loss of the last block."""
  train, lengths, asked = settings.train_length, settings.lengths, set(settings.methods)
  if "bpb_last" not in settings.metrics or settings.factors is not None or max(lengths) <= train:
    return []
  at = 8 * train if 8 * train in lengths else max(lengths)
  sentences = []
  for scheme in settings.schemes:
    applies = {name for name in asked if not methods.not_applicable(models.schemes[scheme], name)}
    for a, b in PAIRS:
      if applies.issuperset((a, b)):
        sentence = compare(rows, "bpb_last", at, _columns(scheme, a), _columns(scheme, b))
        sentences.append(sentence + _paired(windows, scheme, at, a, b))
    if train in lengths and applies.issuperset(("rerope", "none")):
      sentences.append(_across(rows, scheme, "rerope", at, train))
    sentences += filter(None, [_best(rows, scheme, applies, at)])
    if "none" in applies and train in lengths:
      sentences.append(_across(rows, scheme, "none", max(lengths), train))
  return sentences


def _columns(scheme: str, method: str) -> dict[str, str]:
  """What chooses the rows of a method; a loaded model is the only one, and has no name."""
  return {"method": method} if scheme == methods.LOADED else {"scheme": scheme, "method": method}


def _paired(windows: list[dict], scheme: str, length: int, a: str, b: str) -> str:
  """The mean difference of two methods with its 95 % interval over the windows, of the seeds that both have."""
  losses: dict[str, dict] = {a: {}, b: {}}
  for row in windows:
    if (
      row["scheme"] == scheme
      and row["length"] == length
      and row["method"] in losses
      and row["status"] == "ok"
    ):
      losses[row["method"]][row["window"], row["seed"]] = row["value"]
  common = losses[a].keys() & losses[b].keys()
  differences = [
    interval.mean([losses[a][window, s] - losses[b][window, s] for w, s in sorted(common) if w == window])
    for window in sorted({window for window, _ in common})
  ]
  if len(differences) < 2:
    return ""
  mean, half = interval.mean(differences), interval.half_width(differences)
  verdict = "" if abs(mean) > half else ", which is within the noise of the windows"
  return f" Over the {len(differences)} windows: {mean:+.3f} ± {half:.3f}{verdict}."


def _across(rows: list[dict], scheme: str, method: str, length: int, train: int) -> str:
  """A method at a long length against the model as trained at its own length, over the seeds that have both."""
  here = _values(rows, scheme, method, length)
  there = _values(rows, scheme, "none", train)
  model, trained = (" ".join(_columns(scheme, name).values()) for name in (method, "none"))
  name = f"`{model}` at length {length}"
  seeds = sorted(here.keys() & there.keys())
  if not seeds:
    return f"{name} and `{trained}` at length {train} cannot be compared: a value is missing."
  a, b = (interval.mean([values[seed] for seed in seeds]) for values in (here, there))
  words, unit = METRICS["bpb_last"]
  word = "equals" if abs(a - b) <= NO_DIFFERENCE else "is above" if a > b else "is below"
  return (
    f"The {words} of {name} {word} that of `{trained}` at the training length {train} ({a:.3f} against {b:.3f}{unit}"
    f"{_left_out(here, there)})."
  )


def _left_out(*found: dict[int, float]) -> str:
  """How many of the seeds that one of `found` has are missing in another."""
  some, every = set().union(*found), set.intersection(*map(set, found))
  return f"; {len(some - every)} of {len(some)} seeds left out, as a value is missing" if some - every else ""


def _best(rows: list[dict], scheme: str, applies: set[str], length: int) -> str | None:
  """Which method has the lowest loss on the last block, over the seeds that all methods with a value have."""
  found = {name: _values(rows, scheme, name, length) for name in methods.METHODS if name in applies}
  absent = sorted(name for name, values in found.items() if not values)
  found = {name: values for name, values in found.items() if values}
  seeds = set.intersection(*(set(values) for values in found.values())) if found else set()
  if len(found) < 2:
    return None
  model = "the model" if scheme == methods.LOADED else f"`{scheme}`"
  if not seeds:
    return f"At length {length}, the methods of {model} have no seed in common, and so none is the best."
  means = {name: interval.mean([values[seed] for seed in seeds]) for name, values in found.items()}
  first, second = sorted(means, key=means.get)[:2]
  close = means[second] - means[first] <= NO_DIFFERENCE
  without = f", leaving out {', '.join(absent)}, which failed" if absent else ""
  return (
    f"At length {length}, the lowest loss on the last block of {model} is that of `{first}` "
    f"({means[first]:.3f} bits per byte), {'level with' if close else 'before'} `{second}` ({means[second]:.3f})"
    f"{without}{_left_out(*found.values())}."
  )


def _values(rows: list[dict], scheme: str, method: str, length: int) -> dict[int, float]:
  return {
    row["seed"]: row["value"]
    for row in rows
    if (row["scheme"], row["method"], row["length"], row["metric"]) == (scheme, method, length, "bpb_last")
    and row["status"] == "ok"
  }


def _markdown(
  settings: Settings,
  models: Models,
  config: dict,
  rows,
  labelled,
  learnt: str,
  findings: list[str],
  figures: list[str],
) -> str:
  evaluation, unit = config["evaluation"], models.unit
  parts = ["# Length extrapolation: train short, test long", ""]
  parts += [learnt, ""]
  if findings:
    parts += ["## Findings", "", *(f"- {sentence}" for sentence in findings), ""]
  for metric in settings.metrics:
    parts += [f"## {_heading(metric, models)}", "", table(_applicable(labelled), metric, 3).markdown()]
  shown = {(row["scheme"], row["method"]) for row in _applicable(rows)}
  skipped = {key: row["reason"] for row in rows if (key := (row["scheme"], row["method"])) not in shown}
  if skipped:
    reasons: dict[str, list[str]] = {}
    for (scheme, method), reason in skipped.items():
      where = reason if scheme == methods.LOADED else f"on {scheme}: {reason}"
      reasons.setdefault(where, []).append(method)
    parts += ["Not applicable, and so not in the tables:", ""]
    parts += [f"- {', '.join(names)} {where}" for where, names in reasons.items()] + [""]
  parts += [f"![{name.removesuffix('.png')}]({name})" for name in figures] + [
    "",
    "## How it was measured",
    "",
  ]
  parts += [
    *models.lines(config),
    f"- Windows: {evaluation['windows']}, their ends {evaluation['stride']} {unit} apart and the same for every length, so the "
    f"last block of {evaluation['last_block']} {unit} is the same text with more or less before it.",
    "- The repeated text is each window's last block over and over; both accuracies count every position of the window.",
    "- `_logn`: queries times max(1, log of position + 1 to the base of the training length), at test time only.  `none`: as "
    "trained.  Factors: " + _factors(settings) + f"  dynamic_ntk: {evaluation['dynamic_ntk']}.",
    "- Everything needed to repeat the run is in config.json.",
    "",
  ]
  return "\n".join(parts)


def _factors(settings: Settings) -> str:
  if settings.factors is None:
    return "length / train_length, so methods are switched on beyond the training length only."
  return (
    ", ".join(map(str, settings.factors))
    + ", at every length (methods without a factor beyond the training length only); no comparisons are drawn."
  )
