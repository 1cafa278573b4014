"""The numbers on the page of position methods are those of the run it names."""

import csv
import re
from pathlib import Path

from jaxllm.position import POSITIONS
from jaxllm.study import interval, methods

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "jaxllm" / "position" / "README.md"
LENGTHS = (128, 256, 512, 1024, 2048)


def values():
  """{(scheme, method, length): losses of the last block, one a seed; none where it does not apply}"""
  found = {}
  with open(ROOT / "experiments" / "results" / "all_methods.csv", newline="") as file:
    for row in csv.DictReader(file):
      if row["metric"] == "bpb_last" and row["status"] in ("ok", "not applicable"):
        cell = found.setdefault((row["scheme"], row["method"], int(row["length"])), [])
        cell += [float(row["value"])] if row["status"] == "ok" else []
  return found


def shown(cells, scheme, method):
  """A row as the page has it: mean and 95 % interval over the seeds at each of LENGTHS."""
  one = lambda x: f"{interval.mean(x):.2f} ± {interval.half_width(x):.2f}" if x else "n/a"
  return ", ".join(one(cells[scheme, method, length]) for length in LENGTHS)


def test_every_row_of_the_page_is_that_of_the_run():
  cells = values()
  rows = re.findall(
    r"`(\w+) (\w+)`: ((?:\d\.\d\d ± \d\.\d\d|n/a)(?:,\s+(?:\d\.\d\d ± \d\.\d\d|n/a)){4})", PAGE.read_text()
  )
  assert len(rows) >= 28
  for scheme, method, row in rows:
    assert " ".join(row.split()) == shown(cells, scheme, method), (scheme, method)
  told = {(scheme, method) for scheme, method, _ in rows}
  assert {scheme for scheme, _ in told} == set(methods.SCHEMES)
  assert {m for s, m in told if s == "rope"} >= {
    m for m in methods.METHODS if not m.startswith("ntk_") or m in POSITIONS
  } - {"logn"}


def test_the_run_had_three_seeds():
  assert {len(x) for x in values().values()} <= {0, 3}


def test_every_method_has_a_section():
  sections = re.findall(r"^### (.+)$", PAGE.read_text(), re.MULTILINE)
  named = {name for section in sections for name in re.findall(r"`(\w+)`", section)}
  assert named == set(POSITIONS)
