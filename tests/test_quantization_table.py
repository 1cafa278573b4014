"""The tables of `pytest --quantization`: numbers that differ fail their row, and a run prints what it measured."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import tables
from quantization_table import KINDS, close, differ, equal, nearest, refused
from test_generation_table import tables_of

from jaxllm.errors import QuantError


@pytest.fixture
def said(monkeypatch):
  """What the running test records, here that of a test within this one."""
  monkeypatch.setattr(tables, "RUNNING", [item := SimpleNamespace(user_properties=[])])
  return item.user_properties


def test_kinds_are_numbered():
  assert [kind.number for kind in KINDS.values()] == list(range(1, 9))


def test_bits_are_compared_and_not_values(said):
  x = np.array([0.0, 1.0, np.nan], np.float32)
  assert differ(x, x.copy()) == 0 and differ(x, np.array([-0.0, 1.0, np.nan], np.float32)) == 1
  assert differ(jnp.ones(2, jnp.bfloat16), jnp.array([1, 1.0078125], jnp.bfloat16)) == 1
  with pytest.raises(AssertionError):
    differ(x, x.astype(np.float64))
  equal("a: b", x, x)
  assert said[1] == ("quantization measured", ["equal", "a: b", {"compared": 3, "differ": 0}])


def test_a_number_that_is_another_fails_its_row_before_it_is_measured(said):
  with pytest.raises(AssertionError, match="a: 1 of 3 numbers differ, expected at most 0"):
    equal("a", np.arange(3), np.array([0, 1, 3]))
  exact = np.array([0.2, 1.5, -2.4])
  nearest("b", np.array([0, 1, -2]), exact)  # 1.5 may go either way
  with pytest.raises(AssertionError):
    nearest("c", np.array([0, 1, -3]), exact)
  with pytest.raises(AssertionError):
    close("d", [1.0, 1e-3], [1.0, 1.001e-3], 1e-5)
  close("e", [1.0, 1e-3], [1.0, 1.001e-3], 1e-5, whole=True)
  assert [value[1] for key, value in said if key.endswith("measured")] == ["b", "e"]


def test_an_error_is_a_row_without_the_directory_of_its_test(said, tmp_path):
  refused("a case", QuantError(f"{tmp_path}/config.json: found\n3"), at=tmp_path)
  assert said[0][1] == ["bad input", "a case", {"error": "QuantError", "says": "DIR/config.json: found 3"}]


def test_a_run_prints_and_writes_the_tables(tmp_path):
  status, output, text = tables_of(
    tmp_path, "tests/quant/test_bad_input.py", "-n", "0", "-k", "no_scheme_or_rule", option="quantization"
  )
  assert status == 0 and "8. Bad input" in output and "failed" not in text, output
  assert "| scheme='int8', rules=() | ConfigError | scheme: found 'int8', expected a value such as" in text
