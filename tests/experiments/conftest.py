"""One small text and one finished sweep for all tests of the experiments."""

import email
from pathlib import Path

import pytest
import sweep_case


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
  """A file of a few hundred kilobytes: sources of Python's own, which no change here touches."""
  path = tmp_path_factory.mktemp("corpus") / "sources.txt"
  sources = sorted(Path(email.__file__).parent.glob("*.py"))
  path.write_text("\n".join(source.read_text() for source in sources))
  return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory, corpus):
  """(the output of a sweep that ran to its end, its flags without --out); for reading and copying only."""
  out, args = tmp_path_factory.mktemp("sweep") / "finished", (*sweep_case.TINY, f"--corpus={corpus}")
  assert sweep_case.run(f"--out={out}", *args) == 0
  return out, args
