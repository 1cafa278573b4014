"""The layers of the package, held by reading its imports: arrows point down only."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "jaxllm").rglob("*.py"))

# From the bottom up.  A module may import from below and from its own package, and what SIBLINGS allows.
FLOORS = [
  ("errors", "failpoint", "tree", "leaf"),
  ("ops",),
  ("position", "norm", "activation", "experts", "wiring", "sampling"),
  ("config",),
  ("nn",),
  ("hf", "quant", "parallel", "train", "generate", "evaluate", "flops"),
  ("study", "doctor"),
]
SIBLINGS = {
  ("tree", "errors"),
  ("leaf", "errors"),
  ("leaf", "tree"),
  ("evaluate", "generate"),
  ("hf", "parallel"),
  ("experts", "activation"),
}
SIBLINGS |= {("train", "parallel"), ("doctor", "study"), ("hf", "quant")}
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
FOREIGN = {"torch", "transformers", "tensorflow", "haiku", "equinox"}
FALLBACK = {
  ("hf/tokenizer.py", "transformers")
}  # what reads tokenizers that have no tokenizer.json, where it is installed
UNSAFE = {
  "pickle",
  "cPickle",
  "_pickle",
  "dill",
  "cloudpickle",
  "joblib",
  "marshal",
  "shelve",
}  # run what they read


def imports(path):
  """Full names of all that a file imports, at any depth; `from a import b` counts as a.b."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: a relative import"
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(path):
  """Which part of the package a file is: the module or folder right below jaxllm/."""
  return path.relative_to(ROOT / "jaxllm").with_suffix("").parts[0]


@pytest.mark.core
def test_arrows_point_down():
  wrong = []
  for path in FILES:
    above = part(path)
    if above == "__init__":
      continue
    for name in imports(path):
      if name.split(".")[0] in ("experiments", "colab", "tests"):
        wrong.append(f"{path.name}: {name}")
      if name.startswith("jaxllm."):
        below = name.split(".")[1]
        if below != above and FLOOR[below] >= FLOOR[above] and (above, below) not in SIBLINGS:
          wrong.append(f"{path.relative_to(ROOT)}: {name}")
  assert not wrong


def test_every_part_has_a_floor():
  assert {part(path) for path in FILES} - {"__init__"} <= FLOOR.keys()


def test_nothing_is_exported_from_the_top():
  """A name in jaxllm/__init__.py could shadow a module."""
  assert not list(imports(ROOT / "jaxllm" / "__init__.py"))


def test_flax_is_in_nn_and_nowhere_else():
  users = {part(path) for path in FILES for name in imports(path) if name.split(".")[0] == "flax"}
  assert users == {"nn"}


def test_no_foreign_framework_and_no_pickle():
  found = {
    (path.relative_to(ROOT / "jaxllm").as_posix(), name)
    for path in FILES
    for name in imports(path)
    if name.split(".")[0] in FOREIGN | UNSAFE
  }
  assert found <= FALLBACK


RUNS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "runpy.run_path"}
"""Calls that run what they are given."""


def called(node):
  """The full name of what a call calls, as far as it is written out."""
  parts = []
  node = node.func
  while isinstance(node, ast.Attribute):
    parts.append(node.attr)
    node = node.value
  return ".".join(reversed([*parts, node.id])) if isinstance(node, ast.Name) else ""


def test_nothing_read_is_run():
  """No call that runs text or code, no arrays of objects; in hf a program is started for chat templates only."""
  found = set()
  for path in FILES:
    place = path.relative_to(ROOT / "jaxllm").as_posix()
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Call):
        name = called(node)
        allowed = any(
          keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False" for keyword in node.keywords
        )
        if name in RUNS or allowed or name.startswith("importlib.util") or name.startswith("subprocess."):
          found.add((place, name))
  assert {one for one in found if one[0].startswith("hf/")} == {("hf/chat.py", "subprocess.run")}
  assert not {name for _, name in found} & RUNS


def test_the_study_package_starts_fast():
  """--help and a bad flag are answered without jax: nothing there imports it when imported."""
  heavy = {"jax", "flax", "matplotlib", "orbax"}
  for path in (ROOT / "jaxllm" / "study").glob("*.py"):
    top = [
      node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    names = {
      alias.name if isinstance(node, ast.Import) else node.module for node in top for alias in node.names
    }
    assert not {name.split(".")[0] for name in names} & heavy, path.name


def undocumented(path):
  """Public classes and functions without a docstring; a method that overrides another's needs none."""
  tree = ast.parse(path.read_text())
  if not ast.get_docstring(tree):
    yield path.name
  defs = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
  for node in tree.body:
    if not isinstance(node, defs) or node.name.startswith("_"):
      continue
    if not ast.get_docstring(node):
      yield f"{path.name}: {node.name}"
    for method in node.body if isinstance(node, ast.ClassDef) else ():
      if isinstance(method, defs) and not method.name.startswith("_") and not ast.get_docstring(method):
        yield f"{path.name}: {node.name}.{method.name}"


def test_every_public_name_has_a_docstring():
  documented = {
    method.name
    for path in FILES
    for node in ast.parse(path.read_text()).body
    if isinstance(node, ast.ClassDef)
    for method in node.body
    if isinstance(method, ast.FunctionDef) and ast.get_docstring(method)
  }
  bare = [name for path in FILES for name in undocumented(path) if name.rpartition(".")[2] not in documented]
  assert not bare


def test_this_reads_the_package_that_is_tested():
  import jaxllm

  assert Path(sys.modules["jaxllm"].__file__) == Path(jaxllm.__file__)
  assert FILES and Path(jaxllm.__file__).parent == ROOT / "jaxllm"
