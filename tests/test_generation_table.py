"""The tables of `pytest --generation`: numbers of passed tests come together a row, and reach it through xdist."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tables
from cache_cases import CACHES
from components import ROOT
from generation_table import KINDS, Table, measured

ABOUT, MEASURED = "generation about", "generation measured"


def report(*properties, passed=True):
  return SimpleNamespace(
    when="call", passed=passed, failed=not passed, nodeid="a case", user_properties=list(properties)
  )


def number(kind, row, **values):
  return MEASURED, [kind, row, values]


def test_rows_come_together_by_their_columns():
  table = Table()
  table.pytest_runtest_logreport(
    report(number("cache", "yarn", full=1e-7), number("cache", "bound", full=1e-5))
  )
  table.pytest_runtest_logreport(report(number("cache", "yarn", full=3e-7), ("another", 1)))
  grid = dict(N=20_000, cells=1)
  for p in (0.5, 2e-3):
    table.pytest_runtest_logreport(report(number("chi-square", "a | b", **grid, **{"worst p": p})))
  (_, cache), (heading, grids) = table.sections()
  assert cache == [("position method or block", "full"), ("bound", "1.0e-05"), ("yarn", "3.0e-07")]
  assert heading.startswith("3. ") and grids[1:] == [("a | b", "20,000", "2", "2.0e-03")]
  assert "| yarn | 3.0e-07 |" in table.markdown() and r"| a \| b | 20,000 |" in table.markdown()
  assert Table().text() == ["no test that ran has a number for it"]


def test_one_failed_test_fails_its_row():
  """Whatever another test of it measured, and the failed one of a row before; columns stay those that have a number."""
  table = Table()
  for row in ("yarn", "ntk"):
    table.pytest_runtest_logreport(report((ABOUT, ["cache", row]), number("cache", row, full=1e-7)))
  names = (ABOUT, ["cache", "ntk"]), number("cache", "ntk", full=2e-7), (ABOUT, ["cache", "yarn"])
  table.pytest_runtest_logreport(report(*names, passed=False))
  table.pytest_runtest_logreport(report((ABOUT, ["greedy", "llama"]), passed=False))
  (_, cache), (_, greedy) = table.sections()
  assert cache[1:] == [("ntk", "1.0e-07"), ("yarn", "failed")]
  assert greedy[1:] == [("llama", *["failed"] * 4)]
  assert table.lacking() == ["failed: a case"] * 2
  assert table.text()[-1] == "failed: a case" and table.markdown().endswith("\n\nfailed: a case\n")


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


def tables_of(directory, *args, plugin="", option="generation"):
  """(exit status, output, tables) of a run whose tests are in another process, with a plugin of that text."""
  path = directory / "tables.md"
  (directory / "sabotage_plugin.py").write_text(plugin)
  command = [sys.executable, "-m", "pytest", "-n", "1", "-p", "no:cacheprovider", "-p", "sabotage_plugin"]
  environment = os.environ | {"PYTHONPATH": f"{directory}{os.pathsep}{ROOT}"}
  run = subprocess.run(
    [*command, f"--{option}={path}", *args], cwd=ROOT, env=environment, capture_output=True, text=True
  )
  return run.returncode, run.stdout + run.stderr, path.read_text()


@pytest.mark.slow
def test_a_run_whose_tests_are_in_another_process(tmp_path):
  status, output, text = tables_of(tmp_path, "tests/generate/test_generate_errors.py", "-k", "prompts")
  assert status == 0, output
  said = "prompts: found none, expected a list of at least one list of ids"
  assert f"| prompts=[] | 0 | DataError | {said} |" in text and "failed" not in text
  assert "7. Bad input" in output and said in output


SABOTAGE = """
def pytest_collection_finish(session):  # once conftest.py has set what JAX reads when it is imported
  {module}
  right = {owner}
  {owner} = {wrong}
"""
WRONG = {  # what a run patches, the tests that see it, their row
  "slots": (
    dict(
      module="from jaxllm.nn import store",
      owner="store.write",
      wrong="lambda slots, at, new: right(slots, at - (at.shape[1] == 1), new)",
    ),
    ("tests/nn/test_decoding.py", "-k", "test_chunks_give", "-m", "core"),
    "| yarn | ",
  ),
  "temperature": (
    dict(
      module="from jaxllm import sampling",
      owner="sampling.Temperature.filter",
      wrong="lambda self, logits_BV, state: right(self, 1.3 * logits_BV, state)",
    ),
    ("tests/sampling/test_sampling_statistics.py", "-m", "core"),
    "| temperature, top-k, top-p, min-p, penalty, 20,000 a cell | ",
  ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_a_cache_or_a_sampler_that_is_wrong_fails_its_row(name, tmp_path):
  patch, tests, row = WRONG[name]
  status, output, text = tables_of(tmp_path, *tests)
  assert status == 0 and row in text and "failed" not in text, output
  status, output, text = tables_of(tmp_path, *tests, plugin=SABOTAGE.format(**patch))
  assert status == 1 and f"{row}failed |" in text and f"failed: {tests[0]}" in text, output
