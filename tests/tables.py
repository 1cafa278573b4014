"""What the tables of `pytest --components`, `--families` and `--generation` share: numbers of passed tests, in rows.

A test records what it measured as properties of its report, which xdist brings to one process.
"""

from pathlib import Path

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
