"""The family table of `pytest tests/hf --families`: the largest errors that passed tests measured of each family.

`-m ""` beside it runs the slow rows too, and so fills all columns.
"""

import inspect
import math
from collections import defaultdict
from pathlib import Path

import tables

MEASURED = "family measured"
COLUMNS = ("golden", "logits", "decoding", "gradients", "bf16 ratio", "hf angles")
"""Errors against transformers: of kept logits, live logits and gradients; of decoding against the full forward; the error in
bfloat16 by its own; and of logits with its float32 angles, at positions to 32,000."""
HEADER = ("family", "file", "variants", *COLUMNS)
ROOT = Path(__file__).parents[1]


def measured(row, column, value):
  """Record a number of a row for the running test, once it is known to be within its bound."""
  assert column in COLUMNS and math.isfinite(value), (row, column, value)
  tables.record(MEASURED, [row, column, float(value)])


class Table(tables.Plugin):
  """The plugin: a row a family."""

  title = "families"

  def __init__(self, path=""):
    super().__init__(path)
    self.found = defaultdict(lambda: defaultdict(dict))

  def add(self, properties):
    for key, value in properties:
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
    return tables.aligned([HEADER, *self.rows()])

  def markdown(self):
    return tables.markdown(HEADER, self.rows(), left=2)
