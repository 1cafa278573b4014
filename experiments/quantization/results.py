"""The result rows of a scheme, computed from what a run's ledger holds: values, and the ends of their intervals or ranges."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.quantization.cells import SIDES, Plan
from experiments.quantization.schemes import NONE
from jaxllm.study import interval, rows

COLUMNS = (*rows.COLUMNS, "low", "high", "weight")
BLANK = {"low": None, "high": None, "weight": None}
"""Columns that not every row has."""


def of_scheme(plan: Plan, name: str, by_kind: Mapping[str, Mapping[str, list[dict]]]) -> list[dict]:
  """The rows of a scheme that are not the sweep's; by_kind: {weights, windows or decode: {scheme: its rows}}."""
  cell = plan.cell(name) | BLANK
  found = [{**BLANK, **row} for row in by_kind["weights"][name]]

  def add(metric: str, source: Sequence[dict], value) -> None:
    """value(): (value, low, high)."""
    own = {**cell, "metric": metric}
    bad = next((row for row in source if row["status"] != "ok"), None)
    if bad is not None:
      found.append({**own, "value": None, "status": bad["status"], "reason": bad["reason"]})
      return
    value, own["low"], own["high"] = value()
    found.append(rows.ok(own, value))

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
