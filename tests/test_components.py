"""The table of `pytest --components`: a source for every row, and what a run's tests say reaches it through xdist."""

import subprocess
import sys
from types import SimpleNamespace

import components
import pytest
from components import COMPONENTS, EXERCISED, MEASURED, Table, named
from model_cases import MODELS, OTHER

from jaxllm.norm import LayerNorm, QkNorm


@pytest.mark.parametrize("name", COMPONENTS)
def test_every_component_says_where_it_is_from(name):
  assert components.source(name), f"{name}: the docstring of {COMPONENTS[name][0]} has no Source:"
  assert (components.ROOT / components.file(name)).is_file()


def test_no_name_is_two_components():
  kinds = [*components.KINDS, components.QK_NORMS, components.INTEGERS, components.FEATURES]
  assert len(COMPONENTS) == sum(map(len, kinds))


def test_every_component_is_in_a_model_or_has_tests_of_its_own():
  """Else the oracle would never see it, and nobody would notice."""
  apart = {"batch", "l2", "clamped_glu", "xielu", "blockwise", "embed_gradient", "prefix"}
  apart |= {"plain", "by_head", "cudnn", "splash", *components.INTEGERS}
  apart |= components.SAMPLERS.keys() | (components.ACTIVATIONS.keys() - {"silu", "gelu", "gelu_tanh"})
  assert set().union(*map(named, MODELS.values())) == COMPONENTS.keys() - apart


@pytest.mark.parametrize(
  ("value", "names"),
  [
    ("yarn", {"yarn"}),
    ("yarn, and more", set()),
    (MODELS["sandwich"], {"yarn", "rms", "sandwich", "glu", "silu", "auto"}),
    (dict(OTHER), {"layer", "mlp", "gelu", "log_n"}),
    (QkNorm(LayerNorm(), place="after"), {"qk_norm after", "layer"}),
    (LayerNorm, {"layer"}),
    (3.0, set()),
  ],
)
def test_what_a_value_names(value, names):
  assert named(value) == names


def report(*properties, passed=True, when="call"):
  return SimpleNamespace(when=when, passed=passed, user_properties=list(properties))


def test_the_table_adds_up_what_passed():
  table = Table()
  table.pytest_runtest_logreport(report((EXERCISED, ["yarn", "rope"])))
  table.pytest_runtest_logreport(report((EXERCISED, ["yarn"]), (MEASURED, ["yarn", "float64", 2e-7])))
  table.pytest_runtest_logreport(
    report((MEASURED, ["yarn", "float64", 1e-7]), (MEASURED, ["yarn", "torch", 0]))
  )
  table.pytest_runtest_logreport(report((EXERCISED, ["pi"]), (MEASURED, ["pi", "torch", 1]), passed=False))
  table.pytest_runtest_logreport(report((EXERCISED, ["pi"]), when="teardown"))
  rows = {row[0]: row[3:] for row in table.rows()}
  assert rows["yarn"] == ("0 vs torch, 2.0e-07 vs float64", "3")
  assert rows["rope"] == ("-", "1") and rows["pi"] == ("-", "-")
  assert {"rope", "pi"} <= set(table.missing()) and "yarn" not in table.missing()
  assert "| yarn | jaxllm/position/rope.py | Peng et al. (2023) | 0 vs torch, 2.0e-07 vs float64 | 3 |" in (
    table.markdown()
  )


def options(*args, markexpr="not slow", **kwargs):
  option = dict(
    keyword="", deselect=None, ignore=None, ignore_glob=None, maxfail=0, lf=False, collectonly=False
  )
  invocation = SimpleNamespace(dir=components.ROOT)
  return SimpleNamespace(
    option=SimpleNamespace(**option | kwargs, markexpr=markexpr), args=args, invocation_params=invocation
  )


def test_only_a_whole_run_is_a_check():
  assert all(map(components.is_whole, (options("tests"), options(str(components.ROOT)), options("."))))
  partial = [options("tests/nn"), options("tests/test_norm.py::test_norm"), options("tests", keyword="rms")]
  partial += [options("tests", markexpr="core"), options("tests", lf=True), options("tests", maxfail=1)]
  assert not any(map(components.is_whole, partial))


@pytest.mark.parametrize("wanted", [pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.OK])
def test_a_whole_run_with_an_empty_row_fails(monkeypatch, wanted):
  table, session = Table(), SimpleNamespace(config=options("tests"), exitstatus=pytest.ExitCode.OK)
  if wanted == pytest.ExitCode.OK:
    monkeypatch.setattr(table, "missing", list)
  table.pytest_sessionfinish(session, session.exitstatus)
  assert session.exitstatus == wanted


@pytest.mark.slow
def test_a_run_whose_tests_are_in_another_process(tmp_path):
  """Parameters, tables of the module, marks and measurements come from the worker; a part of the suite is no check."""
  path = tmp_path / "table.md"
  command = [sys.executable, "-m", "pytest", "-n", "1", "-p", "no:cacheprovider", f"--components={path}"]
  command += ["tests/test_norm.py", "tests/position/test_query_scale.py", "-k", "unit or length_512"]
  run = subprocess.run(command, cwd=components.ROOT, capture_output=True, text=True)
  assert run.returncode == 0, run.stdout + run.stderr
  rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[3:] for line in path.read_text().splitlines()}
  assert rows["rms"][0].endswith("vs float64") and rows["rms"][1] == "5 |"
  assert rows["log_n"][0].endswith("vs fifty digits") and rows["log_n"][1] == "2 |"
  assert rows["yarn"] == ["-", "- |"]
  assert "jaxllm/norm.py" in run.stdout and "Zhang and Sennrich (2019)" in run.stdout


def test_a_path_that_is_taken_for_the_file_is_refused():
  command = [sys.executable, "-m", "pytest", "--components", "tests/nn"]
  run = subprocess.run(command, cwd=components.ROOT, capture_output=True, text=True)
  assert run.returncode == pytest.ExitCode.USAGE_ERROR
  assert "--components: found 'tests/nn', expected --components or --components=FILE.md" in run.stderr
