"""What the tables of `pytest --components`, `--families`, `--generation` and so on share: numbers of passed tests.

A test records what it measured as properties of its report, which xdist brings to one process.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

import pytest

RUNNING = []
"""The test that runs, where there is a table to make."""


def record(key, value):
  """Note a value that JSON can hold for the running test, once it is known to be within its bound."""
  for item in RUNNING:
    item.user_properties.append((key, value))


def aligned(lines):
  """Rows of cells in aligned columns."""
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]


def markdown(header, rows, left=1):
  """A table for a document: the first `left` columns start at the left, and numbers end at the right."""
  rule = ("---",) * left + ("---:",) * (len(header) - left)
  escape = lambda cell: cell.replace("|", r"\|")
  return "".join(f"| {' | '.join(map(escape, line))} |\n" for line in (header, rule, *rows))


class Plugin:
  """A pytest plugin that makes a table: `begin` before a test, `add` after each that passed, `text` at the end."""

  title = ""

  def __init__(self, path=""):
    self.path = path

  def begin(self, item):
    """Note what a test is about, before it runs."""

  def add(self, properties):
    """Take in the properties of a passed test."""
    raise NotImplementedError

  def text(self):
    """The lines for the terminal."""
    raise NotImplementedError

  def markdown(self):
    """The text of the file."""
    raise NotImplementedError

  @pytest.hookimpl(wrapper=True)
  def pytest_runtest_protocol(self, item):
    self.begin(item)
    RUNNING[:] = [item]
    try:
      return (yield)
    finally:
      RUNNING.clear()

  def pytest_runtest_logreport(self, report):
    if report.when == "call" and report.passed:
      self.add(report.user_properties)

  def pytest_terminal_summary(self, terminalreporter):
    terminalreporter.section(self.title)
    for line in self.text():
      terminalreporter.write_line(line)
    if self.path:
      Path(self.path).write_text(self.markdown())


ERROR = (max, ".1e")
COUNT, MOST, LEAST = (sum, ",d"), (max, ",d"), (min, ",d")
TEXT = (max, "")
"""How the values of several tests of a row come together, and how they are written."""


@dataclasses.dataclass(frozen=True)
class Kind:
  """One of several tables: its number, its title, what a row is, its columns by name, and the order of rows, else of tests."""

  number: int
  title: str
  row: str
  columns: dict
  order: Callable | None = None


class Numbered(Plugin):
  """Numbered tables, a row a case: all that a passed test has a number for.  A class of them has a `title` and `kinds`."""

  kinds = MappingProxyType({})

  def __init__(self, path=""):
    super().__init__(path)
    self.found, self.failed, self.failed_rows = {kind: {} for kind in self.kinds}, [], set()

  @classmethod
  def about(cls, kind, row):
    """Say which row the running test is of before it can fail: one failed test fails its row, whatever others measured."""
    record(f"{cls.title} about", [kind, row])

  @classmethod
  def measured(cls, kind, row, **values):
    """Record values of a row for the running test, once they are known to be within their bounds; `_` stands for a space."""
    values = {name.replace("_", " "): getattr(x, "item", lambda x=x: x)() for name, x in values.items()}
    assert values.keys() <= cls.kinds[kind].columns.keys(), (kind, row, values)
    assert all(isinstance(x, str) or math.isfinite(x) for x in values.values()), (kind, row, values)
    record(f"{cls.title} measured", [kind, row, values])

  @classmethod
  def refused(cls, row, error, at=None, **values):
    """Record a row of the table "bad input": the kind of the error that was raised, and how its message begins.

    at: the directory that the message names, DIR in the table.
    """
    says = " ".join(str(error).replace(str(at), "DIR").split())
    says = says if len(says) < 100 else f"{says[:96]} ..."
    cls.measured("bad input", row, error=type(error).__name__, says=says, **values)

  def add(self, properties):
    for key, value in properties:
      if key == f"{self.title} measured":
        kind, row, values = value
        row = self.found[kind].setdefault(row, {})
        for name, x in values.items():
          row.setdefault(name, []).append(x)

  def pytest_runtest_logreport(self, report):
    super().pytest_runtest_logreport(report)
    if report.failed:
      self.failed.append(report.nodeid)
      for kind, row in [value for key, value in report.user_properties if key == f"{self.title} about"][-1:]:
        self.found[kind].setdefault(row, {})
        self.failed_rows.add((kind, row))

  def rows(self, kind):
    """Header and rows of one table; columns that nothing was measured for are left out."""
    found, columns = self.found[kind], self.kinds[kind].columns
    measured = [name for name in columns if any(name in row for row in found.values())]
    columns = {name: columns[name] for name in measured or columns}

    def cell(row, name, how):
      if (kind, row) in self.failed_rows:
        return "failed"
      return format(how[0](found[row][name]), how[1]) if name in found[row] else "-"

    yield (self.kinds[kind].row, *columns)
    order = self.kinds[kind].order
    for row in sorted(found, key=order) if order else found:
      yield (row, *(cell(row, name, how) for name, how in columns.items()))

  def sections(self):
    """(heading, header and rows) of the tables that have any."""
    for kind, table in self.kinds.items():
      if self.found[kind]:
        yield f"{table.number}. {table.title}", list(self.rows(kind))

  def text(self):
    lines = []
    for heading, rows in self.sections():
      lines += [heading, *aligned(rows), ""]
    return (lines or ["no test that ran has a number for it"]) + self.lacking()

  def lacking(self):
    """The failed tests, a line each; those that ended before they had named a row are told nowhere else."""
    return [f"failed: {name}" for name in self.failed]

  def markdown(self):
    sections = [f"**{heading}**\n\n{markdown(rows[0], rows[1:])}" for heading, rows in self.sections()]
    return "\n".join(sections + [f"{line}\n" for line in self.lacking()])
