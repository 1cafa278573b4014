"""The tables of `pytest --generation`: what passed tests measured of generated text, numbered, a row a case.

`pytest tests/generate tests/nn tests/sampling tests/hf/test_greedy_parity.py tests/parallel --generation -m ""` runs the slow
counts too.  The fifth table, speed, is a benchmark: `python -m experiments.decoding`.
"""

import dataclasses
import math

import tables
from cache_cases import CACHES

ABOUT, MEASURED = "generation about", "generation measured"
ERROR = (max, ".1e")
COUNT, MOST, LEAST = (sum, ",d"), (max, ",d"), (min, ",d")
TEXT = (max, "")
"""How the values of several tests of a row come together, and how they are written."""


@dataclasses.dataclass(frozen=True)
class Kind:
  """One table: its number, its title, what a row is, and its columns by name."""

  number: int
  title: str
  row: str
  columns: dict


KINDS = {
  "cache": Kind(
    1,
    "Cache exactness: logits of prefill and decoding against the full forward pass, by the largest",
    "position method or block",
    {name: ERROR for name in (*CACHES, "text", "loaded")},
  ),
  "samplers": Kind(
    2,
    "Filters against transformers' processors, element by element, relative",
    "sampler",
    {"worst difference": ERROR, "logits": COUNT, "cases": COUNT},
  ),
  "chi-square": Kind(
    3,
    "Draws against float64 probabilities, chi-square",
    "grid",
    {"N": MOST, "cells": COUNT, "worst p": (min, ".1e"), "outside the support": COUNT},
  ),
  "greedy": Kind(
    4,
    "Greedy text against transformers' generate, float32",
    "family",
    {"tokens compared": COUNT, "distinct a row": LEAST, "near ties": COUNT, "widest near tie": ERROR},
  ),
  "compilations": Kind(
    6, "Compilations of a second call", "what differs", {"compiled": MOST, "expected": MOST}
  ),
  "bad input": Kind(7, "Bad input", "case", {"compiled": MOST, "error": TEXT, "says": TEXT}),
  "same text": Kind(8, "What changes no token", "what differs", {"texts": COUNT, "tokens": COUNT}),
}
"""`text` of the first: log-probabilities while generating, past the trained length; `loaded`: those of a checkpoint."""


def about(kind, row):
  """Say which row the running test is of before it can fail: one failed test fails its row, whatever others measured."""
  tables.record(ABOUT, [kind, row])


def measured(kind, row, **values):
  """Record values of a row for the running test, once they are known to be within their bounds; `_` stands for a space."""
  values = {name.replace("_", " "): getattr(x, "item", lambda x=x: x)() for name, x in values.items()}
  assert values.keys() <= KINDS[kind].columns.keys(), (kind, row, values)
  assert all(isinstance(x, str) or math.isfinite(x) for x in values.values()), (kind, row, values)
  tables.record(MEASURED, [kind, row, values])


def same_text(row, found, expected):
  """Texts, each a list of ids, are the same; how many of how many tokens is recorded for the row."""
  about("same text", row)
  assert found == expected, row
  measured("same text", row, texts=len(found), tokens=sum(map(len, found)))


class Table(tables.Plugin):
  """The plugin: all tables that a passed test has a number for."""

  title = "generation"

  def __init__(self, path=""):
    super().__init__(path)
    self.found, self.failed, self.failed_rows = {kind: {} for kind in KINDS}, [], set()

  def add(self, properties):
    for key, value in properties:
      if key == MEASURED:
        kind, row, values = value
        row = self.found[kind].setdefault(row, {})
        for name, x in values.items():
          row.setdefault(name, []).append(x)

  def pytest_runtest_logreport(self, report):
    super().pytest_runtest_logreport(report)
    if report.failed:
      self.failed.append(report.nodeid)
      for kind, row in [value for key, value in report.user_properties if key == ABOUT][-1:]:
        self.found[kind].setdefault(row, {})
        self.failed_rows.add((kind, row))

  def rows(self, kind):
    """Header and rows of one table, rows in the order of their tests, columns that nothing was measured for left out."""
    found, columns = self.found[kind], KINDS[kind].columns
    measured = [name for name in columns if any(name in row for row in found.values())]
    columns = {name: columns[name] for name in measured or columns}

    def cell(row, name, how):
      if (kind, row) in self.failed_rows:
        return "failed"
      return format(how[0](found[row][name]), how[1]) if name in found[row] else "-"

    yield (KINDS[kind].row, *columns)
    for row in sorted(found, key=lambda row: (row != "bound", row)) if kind == "cache" else found:
      yield (row, *(cell(row, name, how) for name, how in columns.items()))

  def sections(self):
    """(heading, header and rows) of the tables that have any."""
    for kind, table in KINDS.items():
      if self.found[kind]:
        yield f"{table.number}. {table.title}", list(self.rows(kind))

  def text(self):
    lines = []
    for heading, rows in self.sections():
      lines += [heading, *tables.aligned(rows), ""]
    return (lines or ["no test that ran has a number for it"]) + self.lacking()

  def lacking(self):
    """The failed tests, a line each; those that ended before they had named a row are told nowhere else."""
    return [f"failed: {name}" for name in self.failed]

  def markdown(self):
    sections = [f"**{heading}**\n\n{tables.markdown(rows[0], rows[1:])}" for heading, rows in self.sections()]
    return "\n".join(sections + [f"{line}\n" for line in self.lacking()])
