"""The joint table: schemes by position methods and context lengths, with figures, of the sweep's cells in a run's ledger."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.quantization.cells import Plan
from experiments.quantization.schemes import NONE
from jaxllm.study import methods, plots
from jaxllm.study.report import Table, series, table

DIFFERENCE = "bpb_last_difference"
HEADINGS = {
  "bpb_last": "Bits per byte on the last block",
  "perplexity": "Perplexity of a {token} on the whole window",
  DIFFERENCE: "Bits per byte on the last block, above those of `none` under the same method",
}


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


def tables(plan: Plan, swept: Sequence[dict]) -> dict[str, Table]:
  """{heading: scheme x method by length}, of the sweep's metrics and of the difference to `none`."""
  if not swept:
    return {}
  token = plan.source.models.unit.removesuffix("s")
  plain = [{**row, "factor": None} for row in swept]
  found = {HEADINGS[m].format(token=token): table(plain, m, 3) for m in plan.source.settings.metrics}
  return found | {
    HEADINGS[DIFFERENCE]: table([{**r, "factor": None} for r in differences(swept)], DIFFERENCE, 4)
  }


def draw(out: Path, plan: Plan, swept: Sequence[dict]) -> list[str]:
  """Write the figures; their names."""
  if not swept:
    return []
  xlabel = f"test length in {plan.source.models.unit} (trained at {plan.source.train_length})"
  figures = {
    "bpb_vs_length.png": (swept, "bpb_last", "bits per byte"),
    "difference_vs_length.png": (differences(swept), DIFFERENCE, "bits per byte above none"),
  }
  for file, (found, metric, ylabel) in figures.items():
    plots.lines(out / file, panels(found, metric), xlabel, ylabel, HEADINGS[metric])
  return list(figures)


def panels(found: Sequence[dict], metric: str) -> dict:
  """A panel a method, a line a scheme."""
  named = [
    {**row, "method": row["quant"], "quant": None, "factor": None, "panel": row["method"]}
    for row in found
    if row["metric"] == metric
  ]
  names = dict.fromkeys(row["panel"] for row in named)
  return {panel: series([row for row in named if row["panel"] == panel], metric) for panel in names}


def note(plan: Plan) -> str:
  """How it was measured, for the report."""
  settings = plan.source.settings
  return (
    f"- By length: {settings.windows} windows, their ends at the same places for every length, so that the last block of "
    f"{settings.train_length} {plan.source.models.unit} is the same text with more or less before it; methods are on beyond "
    "the trained length only, by the factor length / trained length.  ±: 95 % over the windows, pairs of a scheme and `none`."
  )
