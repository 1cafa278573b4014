import json
from pathlib import Path

import pytest

from jaxllm.position.tables import make_table

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def golden():
  """The numbers from independent sources, by file name."""
  return {path.stem: json.loads(path.read_text()) for path in GOLDEN.glob("*.json")}


@pytest.fixture(scope="session")
def table_of():
  """table_of(method, rotary_dim, seq_len): the device table of one method under one base."""
  return lambda method, rotary_dim, seq_len=None: make_table([method.frequencies(rotary_dim, seq_len)])
