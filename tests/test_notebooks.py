"""Notebooks: valid files without outputs, code that parses, only flags that the scripts they run define."""

import ast
import builtins
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
SHELL = re.compile(r"^(\s*)[!%].*$", re.MULTILINE)
RUN = re.compile(r"-m (experiments\.\w+)(.*)")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path):
  """The source of each code cell."""
  return [
    "".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"
  ]


def test_there_is_one():
  assert NOTEBOOKS


@each_notebook
def test_is_a_notebook_without_outputs(path):
  """nbformat 4.5: each cell has an id of its own; outputs belong to a run, not to the repository."""
  notebook = json.loads(path.read_text())
  assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
  assert notebook["metadata"]["kernelspec"]["language"] == "python"
  ids = [cell["id"] for cell in notebook["cells"]]
  assert len(set(ids)) == len(ids)
  for cell in notebook["cells"]:
    assert cell["cell_type"] in ("markdown", "code") and isinstance(cell["metadata"], dict)
    assert all(isinstance(line, str) for line in cell["source"])
    if cell["cell_type"] == "code":
      assert cell["outputs"] == [] and cell["execution_count"] is None


@each_notebook
def test_code_parses_and_names_are_defined_before_use(path):
  """Shell and magic lines become `pass`; a name that a cell reads is a builtin, or bound there or before."""
  bound = set(dir(builtins))
  for source in cells(path):
    names = [
      n for n in ast.walk(ast.parse(SHELL.sub(r"\1pass", source))) if isinstance(n, ast.Name | ast.alias)
    ]
    bound |= {n.asname or n.name for n in names if isinstance(n, ast.alias)}
    bound |= {n.id for n in names if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    assert {n.id for n in names if isinstance(n, ast.Name)} <= bound


@each_notebook
def test_uses_only_flags_that_the_script_defines(path):
  runs = [match.groups() for source in cells(path) for match in RUN.finditer(source)]
  assert runs
  for module, arguments in runs:
    shown = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    defined = set(re.findall(r"^ +--(\w+)", shown.stdout, re.MULTILINE))
    used = re.findall(r"--(\w+)", arguments)
    assert used and set(used) <= defined


def test_a_checkpoint_is_stretched_from_the_first_cell_to_the_figure(tmp_path):
  """The notebook as it is, but for the values of its form: a tiny checkpoint here, and lengths to match."""
  nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
  sys.path.insert(0, str(ROOT / "tests" / "experiments"))
  try:
    import loaded_case
  finally:
    sys.path.pop(0)
  model = loaded_case.save(tmp_path / "model", loaded_case.config(num_layers=1))
  (tmp_path / "text.txt").write_text(loaded_case.text(20))
  form = {
    "MODEL": str(model),
    "METHODS": "none,yarn",
    "LENGTHS": "16,32",
    "WINDOWS": 2,
    "TEXT": str(tmp_path / "text.txt"),
  }
  notebook = nbformat.read(ROOT / "colab" / "how_far_does_my_checkpoint_stretch.ipynb", as_version=4)
  for cell in notebook.cells:
    for name, value in form.items():
      cell.source = re.sub(
        rf"^{name} = .*$", lambda _, n=name, v=value: f"{n} = {v!r}", cell.source, flags=re.MULTILINE
      )
  assert all(f"{name} = {value!r}" in notebook.cells[3].source for name, value in form.items())
  last = notebook.cells[6]
  last.source = last.source.replace('clone / "runs" / "colab"', f"pathlib.Path({str(tmp_path)!r}) / 'runs'")
  nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
  printed = json.dumps(notebook.cells)
  assert "THERE IS NO TPU OR GPU" in printed and "family llama" in printed
  (figure,) = [o for o in notebook.cells[-1].outputs if "image/png" in o.get("data", {})]
  assert len(figure["data"]["image/png"]) > 10_000
  rows = (tmp_path / "runs" / "model" / "results.jsonl").read_text().splitlines()
  assert {(json.loads(row)["method"], json.loads(row)["status"]) for row in rows} == {
    ("none", "ok"),
    ("yarn", "ok"),
  }
