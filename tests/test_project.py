"""The files around the code agree with it: README, CI, version, licence, contribution guide, layout."""

import ast
import configparser
import importlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jaxllm
from jaxllm.config import Layer, ModelConfig

ROOT = Path(__file__).parents[1]
MAIN_JOB = "pip install -e . && python -m experiments.length_extrapolation"
TESTS = "pip install -e '.[test,parity]' && pytest"

TOP_LEVEL = {
  *(".ci", ".gitignore", "pyproject.toml", "ruff.toml", "setup.cfg"),
  *("BENCHMARKS.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md"),
  *("colab", "experiments", "jaxllm", "tests"),
}

# written so that this file does not hold what it forbids
OPEN_ENDS = re.compile(r"\b(TO" + r"DO|FIX" + r"ME)\b")
MACHINE_PATHS = re.compile(r"(?<![\w.~$}/-])/(work|root|tmp|home/\w+|Users/\w+)/")
REGISTRY_HOSTS = re.compile(r"py" + r"pi\.org|python" + r"hosted\.org|regis" + r"try\.npmjs|index-" + r"url")


def git_files():
  """The tracked files; in an unpacked archive there is nothing to ask."""
  listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
  if listed.returncode:
    pytest.skip("not a git checkout")
  return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]


def text_files():
  return [path for path in git_files() if b"\0" not in path.read_bytes()]


def blocks(path, language):
  """The fenced blocks of a Markdown file in one language."""
  return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


def setup_cfg():
  parser = configparser.ConfigParser()
  parser.read(ROOT / "setup.cfg")
  return parser


def test_readme_counts_the_families():
  from jaxllm.hf.families import FAMILIES

  tens, ones = (
    ["Twenty", "Thirty", "Forty", "Fifty", "Sixty"],
    ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
  )
  number = tens[len(FAMILIES) // 10 - 2] + (f"-{ones[len(FAMILIES) % 10 - 1]}" if len(FAMILIES) % 10 else "")
  assert f"{number} families: " in (ROOT / "README.md").read_text()


def test_readme_opens_with_the_two_commands():
  """The main job, then the tests; they do all the set-up, so nothing stands before them."""
  fenced = re.findall(r"^```[a-z]*\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
  lines = [line.split(" #")[0].strip() for block in fenced for line in block.splitlines()]
  assert [line for line in lines if line and not line.startswith("#")][:2] == [MAIN_JOB, TESTS]


def test_ci_runs_what_readme_says():
  script = (ROOT / ".ci" / "run").read_text()
  assert f'main_job="{MAIN_JOB}"\n' in script and f'tests="{TESTS}"\n' in script
  assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
  subprocess.run(["bash", "-n", ROOT / ".ci" / "run"], check=True)


def test_paths_in_the_documents_exist():
  """What README and CONTRIBUTING name in backticks or link to: a moved file takes its mention along."""
  for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    named = re.findall(r"`((?:jaxllm|tests|experiments|colab|\.ci)/[\w./]*)`", text)
    linked = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if ":" not in link]
    missing = [name for name in (*named, *linked) if name and not (ROOT / name).exists()]
    assert not missing, f"{path.name} names {missing}"


def test_one_version():
  """jaxllm.__version__ is the only place; the changelog's newest release is that one."""
  config = setup_cfg()
  assert config["metadata"]["version"] == "attr: jaxllm.__version__"
  assert config["metadata"]["name"] == "jaxllm"
  releases = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
  assert releases[0] == jaxllm.__version__


def test_the_licence():
  text = (ROOT / "LICENSE").read_text()
  assert "Apache License\n                           Version 2.0, January 2004" in text
  assert "END OF TERMS AND CONDITIONS" in text and "Copyright 2026 The jaxllm authors" in text
  assert [int(n) for n in re.findall(r"^   (\d)\. [A-Z]", text, re.MULTILINE)] == list(range(1, 10))
  assert setup_cfg()["metadata"]["license"] == "Apache-2.0"


def test_top_level_entries():
  """A new one is a decision: it goes into this list and into the documents."""
  found = {path.relative_to(ROOT).parts[0] for path in git_files()}
  assert found <= TOP_LEVEL, f"new at the top level: {sorted(found - TOP_LEVEL)}"
  assert found >= TOP_LEVEL, f"missing: {sorted(TOP_LEVEL - found)}"


@pytest.mark.parametrize(
  "what, pattern",
  [("open ends", OPEN_ENDS), ("machine paths", MACHINE_PATHS), ("registry hosts", REGISTRY_HOSTS)],
)
def test_tracked_text_is_free_of(what, pattern):
  found = []
  for path in text_files():
    for number, line in enumerate(path.read_text().splitlines(), 1):
      if pattern.search(line):
        found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
  assert not found, "\n".join([what, *found])


@pytest.mark.parametrize(
  "pattern, text", [(OPEN_ENDS, "# TO" + "DO: x"), (MACHINE_PATHS, "open('/ro" + "ot/x')")]
)
def test_the_patterns_find_what_they_are_for(pattern, text):
  assert pattern.search(text)


def test_files_stay_small():
  """One concept a file: split by concept at 400 lines."""
  long = {p.name: n for p in (ROOT / "jaxllm").rglob("*.py") if (n := len(p.read_text().splitlines())) >= 400}
  assert not long


def test_what_is_imported_is_declared():
  """Every top-level import of the package is Python's own, jaxllm's, or in install_requires."""
  requires = re.findall(
    r"^([A-Za-z][\w-]*)", setup_cfg()["options"]["install_requires"].strip(), re.MULTILINE
  )
  declared = {
    "orbax" if name == "orbax-checkpoint" else name.removesuffix("-py").replace("-", "_") for name in requires
  }
  allowed = declared | {"jaxllm", "experiments"} | set(sys.stdlib_module_names)
  for folder in ("jaxllm", "experiments"):
    for path in (ROOT / folder).rglob("*.py"):
      for node in ast.parse(path.read_text()).body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
        undeclared = {name.split(".")[0] for name in names} - allowed
        assert not undeclared, f"{path.relative_to(ROOT)} imports {sorted(undeclared)}"


def test_the_method_of_the_contribution_guide_works():
  """Its class, run as if it stood in rope.py: its frequencies, and a table of the common structure."""
  source = next(block for block in blocks(ROOT / "CONTRIBUTING.md", "python") if "class " in block)
  assert len(source.splitlines()) <= 10
  namespace = dict(vars(importlib.import_module("jaxllm.position.rope")))
  exec(source, namespace)
  name = re.search(r"^class (\w+)\(Rope\)", source, re.MULTILINE)[1]
  inv_freq, scale = namespace[name](power=0.3).frequencies(64)
  expected = [10000.0 ** (-i / 32) * (1 - i / 32) ** 0.3 for i in range(32)]
  np.testing.assert_allclose(inv_freq, expected, rtol=1e-14, atol=0)
  assert scale == 1.0
  size = dict(vocab_size=8, embed_dim=64, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=64, mlp_dim=8)
  new, plain = (
    ModelConfig(**size, layers=(Layer(m()),)).rope_tables() for m in (namespace[name], namespace["Rope"])
  )
  assert new.ropes[0].hi.shape == plain.ropes[0].hi.shape and not np.array_equal(
    new.ropes[0].hi, plain.ropes[0].hi
  )


def test_the_family_of_the_contribution_guide_is_in_the_tree():
  """Each block stands as it is in the file named last before it."""
  section = (ROOT / "CONTRIBUTING.md").read_text().partition("## Add a model family")[2].partition("\n## ")[0]
  shown = re.findall(r"`((?:jaxllm|tests)/[\w/]+\.py)`[^`]*\n\n```python\n(.*?)^```$", section, re.M | re.S)
  assert len(shown) == len(re.findall("^```python$", section, re.M)) == 4
  for path, code in shown:
    assert code in (ROOT / path).read_text(), f"{path} has no\n{code}"
