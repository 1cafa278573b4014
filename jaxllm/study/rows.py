"""The row of results: one number measured in one condition, or the reason why there is none."""

from __future__ import annotations

import math

COLUMNS = (
  "scheme",
  "quant",
  "method",
  "factor",
  "train_length",
  "length",
  "metric",
  "value",
  "seed",
  "status",
  "reason",
)
OUTCOME = ("value", "status", "reason")  # every other column says which cell it is


def ok(cell: dict, value: float) -> dict:
  """The cell with its value; a failed row when the value is NaN or infinite, as that is no measurement."""
  value = float(value)
  if not math.isfinite(value):
    return failed(cell, f"the value is {value}")
  return {**cell, "value": value, "status": "ok", "reason": None}


def failed(cell: dict, reason: str) -> dict:
  """The cell with the reason why its value could not be computed."""
  return {**cell, "value": None, "status": "failed", "reason": reason}


def not_applicable(cell: dict, reason: str) -> dict:
  """The cell with the reason why it has no meaning (learned positions beyond their table, say)."""
  return {**cell, "value": None, "status": "not applicable", "reason": reason}


def problem(row: dict) -> str | None:
  """What is wrong with a row, in words; None if it is a row.

  A row is flat and of plain JSON types, all numbers finite. `status` is "ok" with a value and no reason, or
  "failed" or "not applicable" with a reason and no value.
  """
  if not isinstance(row, dict):
    return f"not an object: {row!r}"
  for name, item in row.items():
    if type(item) not in (int, float, str, type(None)):
      return f"{name} is a {type(item).__name__}, not a number, a string or null"
    if isinstance(item, float) and not math.isfinite(item):
      return f"{name} is {item}"
  missing = [name for name in OUTCOME if name not in row]
  if missing:
    return f"no {', '.join(missing)}"
  value, status, reason = (row[name] for name in OUTCOME)
  if status == "ok":
    good = isinstance(value, int | float) and reason is None
    return None if good else f"status is 'ok' with value {value!r} and reason {reason!r}"
  if status in ("failed", "not applicable"):
    good = value is None and isinstance(reason, str) and reason != ""
    return None if good else f"status is {status!r} with value {value!r} and reason {reason!r}"
  return f"status is {status!r}; it must be 'ok', 'failed' or 'not applicable'"
