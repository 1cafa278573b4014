"""Rows, tables and figures of a run, all computed from what its ledger holds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from experiments.quantization import weights
from experiments.quantization.cells import SIDES, Plan
from experiments.quantization.schemes import NONE
from jaxllm.study import files, interval, methods, plots
from jaxllm.study import rows as rows_lib
from jaxllm.study.report import Table, series, table

COLUMNS = (*rows_lib.COLUMNS, "low", "high")
HEADER = (
  *("quant", "bits", "disk MB", "resident MB", "weight error", "perplexity", "difference to none"),
  *("bits per byte", "decode tok/s", "times none"),
)
DIFFERENCE = "bpb_last_difference"
HEADINGS = {
  "bpb_last": "Bits per byte on the last block",
  "perplexity": "Perplexity of a {token} on the whole window",
  DIFFERENCE: "Bits per byte on the last block, above those of `none` under the same method",
}


def write(out: Path, plan: Plan, config: dict, done: Mapping[str, list[dict]]) -> None:
  """Write every result file into `out`, and show the tables."""
  by_kind: dict[str, dict[str, list[dict]]] = {}
  for group, found in done.items():
    name, kind = group.split("/")[:2]
    by_kind.setdefault(kind, {}).setdefault(name, []).extend(found)
  own = [row for name in plan.names for row in results(plan, name, by_kind)]
  swept = [{**row, "low": None, "high": None} for found in by_kind.get("sweep", {}).values() for row in found]
  joint = [row for row in swept if row["metric"] != methods.BY_WINDOW]
  files.write_results(out, own + joint, COLUMNS)
  main = summary(plan, own)
  tables = {"Schemes": main} | joint_tables(plan, swept)
  figures = draw(out, plan, own, joint, swept)
  files.write_text(out / "report.md", _markdown(plan, config, tables, figures))
  for title, one in tables.items():
    one.show(title)
  print(f"Results, figures and report: {out}")


def results(plan: Plan, name: str, by_kind: Mapping[str, Mapping[str, list[dict]]]) -> list[dict]:
  """The rows of a scheme that are not the sweep's, with the ends of their intervals or ranges."""
  cell = plan.cell(name) | {"low": None, "high": None}
  found = [{**row, "low": None, "high": None} for row in by_kind["weights"][name]]

  def add(metric: str, source: Sequence[dict], value) -> None:
    """value(): (value, low, high)."""
    own = {**cell, "metric": metric}
    bad = next((row for row in source if row["status"] != "ok"), None)
    if bad is not None:
      found.append({**own, "value": None, "status": bad["status"], "reason": bad["reason"]})
      return
    value, own["low"], own["high"] = value()
    found.append(rows_lib.ok(own, value))

  scored, base = by_kind["windows"][name], by_kind["windows"][NONE]
  scoring = plan.scored(name)
  for metric in ("perplexity", "bpb"):
    add(metric, scored, lambda metric=metric: scoring.values(scoring.sums(scored))[metric])
    pair = lambda metric=metric: _difference(scoring.sums(scored), scoring.sums(base), metric)
    add(f"{metric}_difference", [*scored, *base], pair)
  read = by_kind["decode"][name]
  speeds = {side: [row["value"] for row in read if row["side"] == side] for side in SIDES}
  add("tokens_per_second", read, lambda: _spread(speeds[SIDES[1]]))
  add("times_none", read, lambda: _spread([b / a for a, b in zip(*speeds.values(), strict=True)]))
  return found


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
  return statistics.median(values), min(values), max(values)


def _difference(own: dict, base: dict, metric: str) -> tuple[float, float, float]:
  """A scheme's value minus that of `none`, and its bootstrap interval over the stretches of the text."""
  below, unit = ("tokens", 1.0) if metric == "perplexity" else ("bytes", math.log(2))
  value = np.exp if metric == "perplexity" else lambda x: x

  def statistic(sums):
    a, b, size = np.moveaxis(sums, -1, 0)
    return value(a / size / unit) - value(b / size / unit)

  amounts = np.stack([own["nats"], base["nats"], own[below]], axis=1).astype(np.float64)
  return float(statistic(amounts.sum(axis=0))), *interval.bootstrap(statistic, amounts)


def summary(plan: Plan, own: Sequence[dict]) -> Table:
  """One line a scheme."""
  body, notes = [], []
  for name in plan.names:
    by_metric = {row["metric"]: row for row in own if row["quant"] == name}
    show = lambda metric, form, by_metric=by_metric: _show(by_metric[metric], form)
    ranged = lambda digits: lambda v, low, high: f"{v:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
    megabytes = lambda v, *_: f"{v / 1e6:.3f}"
    body.append(
      (
        name,
        show("bits", lambda v, *_: f"{v:.3f}"),
        *(show(metric, megabytes) for metric in weights.METRICS[1:3]),
        show("weight_error", lambda v, *_: f"{v:.5f}"),
        show("perplexity", lambda v, *_: f"{v:.4f}"),
        "-"
        if name == NONE
        else show("perplexity_difference", lambda v, low, high: f"{v:+.4f} ({low:+.4f} to {high:+.4f})"),
        show("bpb", lambda v, *_: f"{v:.4f}"),
        show("tokens_per_second", ranged(0)),
        show("times_none", ranged(2)),
      )
    )
    reasons = dict.fromkeys((row["status"], row["reason"]) for row in by_metric.values() if row["reason"])
    notes += [f"{status}: {name}: {reason}" for status, reason in reasons]
  notes += [f"left out: {name}: {reason}" for name, reason in plan.left_out.items()]
  return Table(HEADER, tuple(body), 1, tuple(notes))


def _show(row: dict, form) -> str:
  if row["status"] != "ok":
    return "failed" if row["status"] == "failed" else "n/a"
  return form(row["value"], row["low"], row["high"])


def differences(swept: Sequence[dict]) -> list[dict]:
  """Loss of the last block above that of `none` under the same method, a row a window, which takes the place of a seed."""
  places = ("method", "factor", "length", "window")
  found = [row for row in swept if row["metric"] == methods.BY_WINDOW]
  base = {tuple(row[p] for p in places): row for row in found if row["quant"] == NONE}
  made = []
  for row in found:
    other = base[tuple(row[p] for p in places)]
    cell = {**row, "metric": DIFFERENCE, "seed": row["window"]}
    bad = next((r for r in (row, other) if r["status"] != "ok"), None)
    if row["quant"] != NONE:
      made.append({**cell, "value": row["value"] - other["value"]} if bad is None else
                  {**cell, "value": None, "status": bad["status"], "reason": bad["reason"]})  # fmt: skip
  return made


def joint_tables(plan: Plan, swept: Sequence[dict]) -> dict[str, Table]:
  """{heading: scheme x method by length}, of the sweep's metrics and of the difference to `none`."""
  if not swept:
    return {}
  token = plan.source.models.unit.removesuffix("s")
  plain = [{**row, "factor": None} for row in swept]
  found = {HEADINGS[m].format(token=token): table(plain, m, 3) for m in plan.source.settings.metrics}
  return found | {
    HEADINGS[DIFFERENCE]: table([{**r, "factor": None} for r in differences(swept)], DIFFERENCE, 4)
  }


def draw(out: Path, plan: Plan, own, joint, swept) -> list[str]:
  """Write the figures; their names."""
  points, bands = {}, {}
  for name in plan.chosen:
    by_metric = {row["metric"]: row for row in own if row["quant"] == name}
    bits, cost = by_metric["bits"], by_metric["perplexity_difference"]
    if bits["status"] == cost["status"] == "ok":
      points[name], bands[name] = ([bits["value"]], [cost["value"]]), ([cost["low"]], [cost["high"]])
  title = (
    f"Perplexity above that of `none`, windows of {plan.scoring.windows.length} {plan.source.models.unit}"
  )
  plots.lines(
    *(out / "cost.png", {"": (points, bands)}, "bits an element, scales counted", "perplexity above none"),
    title,
    xlog2=False,
  )
  if not swept:
    return ["cost.png"]
  xlabel = f"test length in {plan.source.models.unit} (trained at {plan.source.train_length})"
  for file, found, metric, ylabel in (
    ("bpb_vs_length.png", joint, "bpb_last", "bits per byte"),
    ("difference_vs_length.png", differences(swept), DIFFERENCE, "bits per byte above none"),
  ):
    plots.lines(out / file, panels(found, metric), xlabel, ylabel, HEADINGS[metric])
  return ["cost.png", "bpb_vs_length.png", "difference_vs_length.png"]


def panels(found: Sequence[dict], metric: str) -> dict:
  """A panel a method, a line a scheme."""
  named = [
    {**row, "method": row["quant"], "quant": None, "factor": None, "panel": row["method"]} for row in found
  ]
  names = dict.fromkeys(row["panel"] for row in named)
  return {panel: series([row for row in named if row["panel"] == panel], metric) for panel in names}


def _swept(plan: Plan) -> str:
  settings = plan.source.settings
  return (
    f"- By length: {settings.windows} windows, their ends at the same places for every length, so that the last block of "
    f"{settings.train_length} {plan.source.models.unit} is the same text with more or less before it; methods are on beyond "
    "the trained length only, by the factor length / trained length.  ±: 95 % over the windows, pairs of a scheme and `none`."
  )


def _markdown(plan: Plan, config: dict, tables: Mapping[str, Table], figures: Sequence[str]) -> str:
  source, windows, asked = plan.source, plan.scoring.windows, plan.asked
  parts = ["# Quantization: what it saves, and what it costs", ""]
  for title, one in tables.items():
    parts += [f"## {title}", "", one.markdown()]
  parts += [f"![{name.removesuffix('.png')}]({name})" for name in figures]
  parts += [
    *("", "## How it was measured", ""),
    f"- Model: {asked['model'] or source.scheme}, {config['settings']['dtype']} compute, trained at {source.train_length}; "
    f"{len(plan.quantized)} weights are quantized, {plan.quantized[0]} the first.",
    "- Bits: those of the quantized weights, scales counted.  Disk: all tensors of the tree as bytes, numbers of less than 8 "
    "bits packed, without headers.  Resident: the same as the arrays are held.  MB: a million bytes.",
    "- Weight error: ||w - w'|| / ||w|| over all quantized weights (Frobenius).",
    f"- Text: {len(source.text)} {source.models.unit}, all but the first scored once, in {len(windows)} windows of "
    f"{windows.length}.  Differences: 95 % by a bootstrap over {len(plan.scoring.edges) - 1} stretches of it, the same ones "
    "drawn for both.",
    f"- Decoding: {asked['new'] - 1} tokens after a prompt of {asked['prompt']}, batch 1; the median of {asked['rounds']} "
    f"readings of at least {asked['seconds']:g} s in turns with `none`, and their range; times none: the same "
    "of the ratios of turns.  The line of `none` is against itself, and says what is noise.",
    *([] if source.settings is None else [_swept(plan)]),
    f"- {config['devices'][0]} with jax {config['libraries']['jax']}, Python {config['python']}.  All else is in config.json.",
    "",
  ]
  return "\n".join(parts)
