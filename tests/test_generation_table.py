"""The tables of `pytest --generation`: numbers of passed tests come together a row, and reach it through xdist."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import tables
from cache_cases import CACHES
from components import ROOT
from generation_table import KINDS, MEASURED, Table, measured


def report(*properties, passed=True):
  return SimpleNamespace(when="call", passed=passed, user_properties=list(properties))


def number(kind, row, **values):
  return MEASURED, [kind, row, values]


def test_rows_come_together_by_their_columns():
  table = Table()
  table.pytest_runtest_logreport(
    report(number("cache", "yarn", full=1e-7), number("cache", "bound", full=1e-5))
  )
  table.pytest_runtest_logreport(report(number("cache", "yarn", full=3e-7), ("another", 1)))
  table.pytest_runtest_logreport(report(number("cache", "yarn", full=1.0), passed=False))
  grid = dict(N=20_000, cells=1)
  for p in (0.5, 2e-3):
    table.pytest_runtest_logreport(report(number("chi-square", "a | b", **grid, **{"worst p": p})))
  (_, cache), (heading, grids) = table.sections()
  assert cache == [("position method or block", "full"), ("bound", "1.0e-05"), ("yarn", "3.0e-07")]
  assert heading.startswith("3. ") and grids[1:] == [("a | b", "20,000", "2", "2.0e-03")]
  assert "| yarn | 3.0e-07 |" in table.markdown() and r"| a \| b | 20,000 |" in table.markdown()
  assert Table().text() == ["no test that ran has a number for it"]


def test_a_number_is_of_a_column_and_finite(monkeypatch):
  monkeypatch.setattr(tables, "RUNNING", [item := SimpleNamespace(user_properties=[])])
  measured("greedy", "llama", near_ties=2)
  assert item.user_properties == [number("greedy", "llama", **{"near ties": 2})]
  for wrong in (dict(ties=2), dict(near_ties=float("nan"))):
    with pytest.raises(AssertionError):
      measured("greedy", "llama", **wrong)


def test_every_kind_of_cache_has_a_column():
  assert CACHES.keys() < KINDS["cache"].columns.keys()
  assert [kind.number for kind in KINDS.values()] == [1, 2, 3, 4, 6, 7, 8]


@pytest.mark.slow
def test_a_run_whose_tests_are_in_another_process(tmp_path):
  path = tmp_path / "tables.md"
  command = [sys.executable, "-m", "pytest", "-n", "1", "-p", "no:cacheprovider", f"--generation={path}"]
  command += ["tests/generate/test_generate_errors.py", "-k", "prompts"]
  run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert run.returncode == 0, run.stdout + run.stderr
  said = "prompts: found none, expected a list of at least one list of ids"
  assert f"| prompts=[] | 0 | DataError | {said} |" in path.read_text()
  assert "7. Bad input" in run.stdout and said in run.stdout
