"""The family table of `pytest tests/hf --families`: the largest errors that passed tests measured of each family.

`-m ""` beside it runs the slow rows too, and so fills all columns.  The mechanism is that of components.py.
"""

import inspect
import math
from collections import defaultdict
from pathlib import Path

import pytest

MEASURED = "family measured"
COLUMNS = ("golden", "logits", "decoding", "gradients", "bf16 ratio", "hf angles")
"""Errors against transformers: of kept logits, live logits and gradients; of decoding against the full forward; the error in
bfloat16 by its own; and of logits with its float32 angles, at positions to 32,000."""
HEADER = ("family", "file", "variants", *COLUMNS)
ROOT = Path(__file__).parents[1]
RUNNING = []


def measured(row, column, value):
  """Record a number of a row for the running test, once it is known to be within its bound."""
  assert column in COLUMNS and math.isfinite(value), (row, column, value)
  for item in RUNNING:
    item.user_properties.append((MEASURED, [row, column, float(value)]))


class Table:
  """A pytest plugin: gathers from the reports of passed tests, which xdist brings to one process, and prints."""

  def __init__(self, path=""):
    self.path, self.found = path, defaultdict(lambda: defaultdict(dict))

  @pytest.hookimpl(wrapper=True)
  def pytest_runtest_protocol(self, item):
    RUNNING[:] = [item]
    try:
      return (yield)
    finally:
      RUNNING.clear()

  def pytest_runtest_logreport(self, report):
    if report.when != "call" or not report.passed:
      return
    for key, value in report.user_properties:
      if key == MEASURED:
        row, column, number = value
        values = self.found[row.partition(",")[0]][row]
        values[column] = max(number, values.get(column, 0.0))

  def rows(self):
    """One a family, in the order of FAMILIES."""
    from jaxllm.hf.families import FAMILIES

    for name, family in FAMILIES.items():
      read = getattr(family.read, "func", family.read)
      file = Path(inspect.getsourcefile(read)).relative_to(ROOT).as_posix()
      variants = self.found[name]
      numbers = [[x[column] for x in variants.values() if column in x] for column in COLUMNS]
      style = lambda column: ".2f" if column.endswith("ratio") else ".1e"
      cells = [
        format(max(x), style(column)) if x else "-" for column, x in zip(COLUMNS, numbers, strict=True)
      ]
      yield (name, file, str(len(variants)), *cells)

  def text(self):
    """The table in aligned columns."""
    lines = [HEADER, *self.rows()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]

  def markdown(self):
    """The table for a document."""
    lines = [HEADER, ("---", "---", *["---:"] * (len(HEADER) - 2)), *self.rows()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)

  def pytest_terminal_summary(self, terminalreporter):
    terminalreporter.section("families")
    for line in self.text():
      terminalreporter.write_line(line)
    if self.path:
      Path(self.path).write_text(self.markdown())
