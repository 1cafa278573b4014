"""The recorded sweep says what was published at larger scale, wherever the margin is beyond its error."""

import csv
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[2] / "experiments" / "results" / "results.csv"
CLEAR = 0.3
"""Bits per byte (0.2 nats): what two runs of a small model on another seed have kept."""


@pytest.fixture(scope="module")
def loss():
  """loss(method, length, scheme): bits per byte of the last block."""
  with RESULTS.open() as file:
    rows = [row for row in csv.DictReader(file) if row["metric"] == "bpb_last" and row["status"] == "ok"]
  found = {(row["method"], int(row["length"]), row["scheme"]): float(row["value"]) for row in rows}
  return lambda method, length=1024, scheme="rope": found[method, length, scheme]


@pytest.mark.core
def test_the_order_of_methods_at_eight_times_the_trained_length(loss):
  """Of PI, which is within the error there, see the log; it is worse at two and four times."""
  forms = ["ntk_old", "ntk", "ntk_fixed", "ntk_mixed"]
  assert all(loss(form) < loss("none") - CLEAR for form in forms)
  assert all(loss("yarn") < loss(form) - CLEAR for form in forms)
  assert loss("rerope") < loss("yarn") - CLEAR
  assert loss("pi", 256) > loss("none", 256) + CLEAR and loss("pi", 512) > loss("none", 512) + CLEAR


def test_rerope_stays_at_its_loss_within_the_length_and_alibi_does(loss):
  assert loss("rerope") < loss("none", 128) + CLEAR
  assert loss("none", 1024, "alibi") < loss("none", 128, "alibi") + 0.05


def test_log_n_at_test_time_lowers_every_ntk_form_and_rerope(loss):
  for method in ("ntk", "ntk_fixed", "ntk_mixed", "rerope"):
    assert loss(f"{method}_logn") < loss(method), method
