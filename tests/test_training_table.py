"""The tables of `pytest --training`: published numbers are compared as they are recorded, and a run prints them."""

from types import SimpleNamespace

import pytest
import tables
from test_generation_table import tables_of
from training_table import KINDS, published


def test_kinds_are_numbered():
  assert [kind.number for kind in KINDS.values()] == list(range(1, 12))


def test_a_published_number_is_compared_before_it_is_recorded(monkeypatch):
  monkeypatch.setattr(tables, "RUNNING", [item := SimpleNamespace(user_properties=[])])
  published("a", 3, 3)
  published("b", 32.3612, 32.36, 2)
  published("c", 12.541, 12.54, rel=1e-3)
  for wrong in (("d", 3.0001, 3), ("e", 32.366, 32.36, 2)):
    with pytest.raises(AssertionError):
      published(*wrong)
  with pytest.raises(AssertionError):
    published("f", 12.56, 12.54, rel=1e-3)
  assert [value[1] for key, value in item.user_properties if key.endswith("measured")] == ["a", "b", "c"]


def test_a_run_prints_and_writes_the_tables(tmp_path):
  status, output, text = tables_of(
    tmp_path, "tests/flops/test_costs.py", "-n", "0", "-k", "zero", option="training"
  )
  assert status == 0 and "9. Published numbers" in output and "failed" not in text, output
  assert "| ZeRO 3: 7.5 B on 64 devices, GB | 1.875 | 1.88 |" in text
