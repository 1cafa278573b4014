import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.study import cells, rows
from jaxllm.study.cells import Group, Ledger
from jaxllm.study.stop import StopFlag, Stopped

ROOT = Path(__file__).parents[2]


def groups_of(count, size=2):
  return [Group(f"g{i}", tuple({"method": f"m{i}", "seed": s} for s in range(size))) for i in range(count)]


def compute(group):
  return [rows.ok(cell, 0.1 * int(group.name[1:]) + cell["seed"]) for cell in group.cells]


def ledger_of(tmp_path, config="c0"):
  return Ledger(tmp_path / "cells.jsonl", config)


def test_what_is_recorded_is_not_computed_again(tmp_path):
  groups, computed, shown = groups_of(5), [], []

  def counted(group):
    computed.append(group.name)
    return compute(group)

  assert cells.run_groups(groups[:3], ledger_of(tmp_path), counted) == 0
  assert (
    cells.run_groups(groups, ledger_of(tmp_path), counted, lambda group, _: shown.append(group.name)) == 0
  )
  assert computed == ["g0", "g1", "g2", "g3", "g4"]
  assert shown == ["g3", "g4"]
  assert ledger_of(tmp_path).done == {group.name: compute(group) for group in groups}


def test_a_group_recorded_with_other_cells_is_refused_before_anything_is_computed(tmp_path):
  groups = groups_of(3)
  cells.run_groups(groups[1:], ledger_of(tmp_path), compute)
  other = [groups[0], groups[1], Group("g2", tuple(cell | {"seed": 7} for cell in groups[2].cells))]
  with pytest.raises(CheckpointError, match=r"cells.jsonl: group 'g2' .* another version .* another --out"):
    cells.run_groups(other, ledger_of(tmp_path), lambda group: pytest.fail(group.name))
  assert list(ledger_of(tmp_path).done) == ["g1", "g2"]


def test_a_torn_last_line_is_dropped_wherever_it_is_cut(tmp_path):
  groups, path = groups_of(3), tmp_path / "cells.jsonl"
  cells.run_groups(groups, ledger_of(tmp_path), compute)
  whole = path.read_bytes()
  starts = [0] + [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
  for cut in {*range(0, len(whole), 7), *(start + i for start in starts[:-1] for i in (0, 1))}:
    path.write_bytes(whole[:cut])
    kept = max(start for start in starts if start <= cut)
    ledger = ledger_of(tmp_path)
    assert list(ledger.done) == ["g0", "g1", "g2"][: starts.index(kept)]
    assert path.read_bytes() == whole[:kept]
    if cut in starts:
      cells.run_groups(groups, ledger, compute)
      assert path.read_bytes() == whole


@pytest.mark.parametrize(
  "damage, message",
  [
    (lambda lines: [lines[0], lines[1][:-9], lines[2]], r"cells.jsonl, line 2: damaged"),
    (lambda lines: [lines[0], "", lines[2]], r"cells.jsonl, line 2: damaged"),
    (lambda lines: ["[1]", *lines], r"cells.jsonl, line 1: damaged"),
    (lambda lines: [*lines, lines[1]], r"cells.jsonl, line 4: group 'g1' stands there twice"),
    (lambda lines: [lines[0].replace('"ok"', '"fine"'), *lines[1:]], r"line 1: damaged \(status is 'fine'"),
    (lambda lines: [*lines[:2], lines[2].replace("c0", "c1")], r"line 3: computed under other settings"),
  ],
)
def test_damage_anywhere_else_is_an_error_that_names_the_line(tmp_path, damage, message):
  cells.run_groups(groups_of(3), ledger_of(tmp_path), compute)
  path = tmp_path / "cells.jsonl"
  damaged = "".join(line + "\n" for line in damage(path.read_text().splitlines()))
  path.write_text(damaged)
  with pytest.raises(CheckpointError, match=message):
    ledger_of(tmp_path)
  assert path.read_text() == damaged


def test_a_group_is_recorded_once_unless_it_failed(tmp_path):
  ledger = ledger_of(tmp_path)
  cell = {"method": "m", "seed": 0}
  ledger.record("g", [rows.failed(cell, "no")])
  ledger.record("g", [rows.ok(cell, 1.0)])
  with pytest.raises(AssertionError, match="recorded already"):
    ledger.record("g", [rows.ok(cell, 2.0)])
  with pytest.raises(AssertionError, match="value is nan"):
    ledger.record("h", [rows.ok(cell, 1.0) | {"value": float("nan")}])
  assert ledger_of(tmp_path).done == ledger.done == {"g": [rows.ok(cell, 1.0)]}


def test_a_full_disk_leaves_no_part_of_a_line(tmp_path):
  ledger, cell = ledger_of(tmp_path), {"method": "m", "seed": 0}
  ledger.record("g", [rows.ok(cell, 1.0)])
  whole = ledger.path.read_bytes()
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 10, hard))  # ten bytes of the next line fit
  try:
    with pytest.raises(OSError, match=r"cells\.jsonl"):
      ledger.record("h", [rows.ok(cell, 2.0)])
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert ledger.path.read_bytes() == whole and "h" not in ledger.done
  ledger.record("h", [rows.ok(cell, 2.0)])
  assert list(ledger_of(tmp_path).done) == ["g", "h"]


def test_a_failing_group_does_not_end_the_run_and_is_tried_again(tmp_path, capsys):
  groups = groups_of(4)

  def broken(group):
    if group.name == "g1":
      raise RuntimeError(f"no such\n  thing: {object()}")
    if group.name == "g2":
      raise ConfigError("g2: not that one")
    return compute(group)

  ledger = ledger_of(tmp_path)
  assert cells.run_groups(groups, ledger, broken) == 4
  reason = "RuntimeError: no such thing: <object object at 0x...>"
  assert ledger.done["g1"] == [rows.failed(cell, reason) for cell in groups[1].cells]
  assert ledger.done["g2"][0]["reason"] == "ConfigError: g2: not that one"
  err = capsys.readouterr().err
  assert "Traceback" in err and "RuntimeError" in err and "ConfigError" not in err

  again = []
  assert cells.run_groups(groups, ledger_of(tmp_path), lambda g: again.append(g.name) or compute(g)) == 0
  assert again == ["g1", "g2"]
  assert ledger_of(tmp_path).done == {group.name: compute(group) for group in groups}


@pytest.mark.parametrize(
  "wrong",
  [
    lambda group: compute(group)[:1],
    lambda group: compute(group)[::-1],
    lambda group: [row | {"seed": 7} for row in compute(group)],
    lambda group: [row | {"value": float("inf")} for row in compute(group)],
  ],
)
def test_rows_that_are_not_those_asked_for_are_a_failure(tmp_path, wrong):
  ledger = ledger_of(tmp_path)
  assert cells.run_groups(groups_of(1), ledger, wrong) == 2
  assert ledger.done["g0"][0]["reason"].startswith("AssertionError: g0: ")


@pytest.mark.parametrize(
  "error", [Stopped("SIGTERM"), KeyboardInterrupt(), OSError(28, "No space left", "x")]
)
def test_what_is_no_property_of_a_cell_ends_the_run(tmp_path, error):
  def interrupted(group):
    if group.name == "g1":
      raise error
    return compute(group)

  with pytest.raises(type(error)):
    cells.run_groups(groups_of(3), ledger_of(tmp_path), interrupted)
  assert list(ledger_of(tmp_path).done) == ["g0"]


def test_a_signal_ends_the_run_after_the_group_in_flight(tmp_path):
  def hit(group):
    if group.name == "g1":
      os.kill(os.getpid(), 15)
    return compute(group)

  with StopFlag() as stop, pytest.raises(Stopped, match="SIGTERM"):
    cells.run_groups(groups_of(4), ledger_of(tmp_path), hit, stop=stop)
  assert list(ledger_of(tmp_path).done) == ["g0", "g1"]


KILLED = """
import sys
from jaxllm.study import cells, files, rows
sys.path.insert(0, sys.argv[2])
from test_study_cells import compute, groups_of
out, groups = sys.argv[1], groups_of(60, size=20)
with files.Lock(out):
  ledger = cells.Ledger(f"{out}/cells.jsonl", cells.check_config(out, {"a": 1}))
  print("start", len(ledger.done), flush=True)
  cells.run_groups(groups, ledger, compute, lambda group, _: print(group.name, flush=True))
  files.write_results(out, [row for g in groups for row in ledger.done[g.name]],
                      ("method", "seed", "value", "status", "reason"))
"""


def start_killed(out):
  arguments = [sys.executable, "-c", KILLED, out, Path(__file__).parent]
  return subprocess.Popen(arguments, cwd=ROOT, text=True, stdout=subprocess.PIPE)


def test_killed_at_any_time_nothing_announced_is_lost_and_the_results_are_the_same_bytes(tmp_path):
  start_killed(tmp_path / "straight").communicate()
  rng, out, announced, kills = random.Random(0), tmp_path / "killed", set(), 0
  while True:
    process = start_killed(out)
    assert int(process.stdout.readline().split()[1]) >= len(announced)
    for _, line in zip(range(rng.randrange(1, 12)), process.stdout, strict=False):
      announced.add(line.strip())
    process.kill()
    rest = process.communicate()[0].split()  # what it had announced before the kill reached it
    announced |= set(rest)
    if process.returncode == 0:
      break
    kills += 1
    if (out / "cells.jsonl").exists():
      text = (out / "cells.jsonl").read_bytes()
      recorded = [json.loads(line)["group"] for line in text.split(b"\n")[:-1]]
      assert announced <= set(recorded) and len(set(recorded)) == len(recorded)
  assert kills >= 5
  for name in ("results.csv", "results.jsonl", "cells.jsonl", "config.json"):
    assert (out / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_another_configuration_is_refused_with_every_difference(tmp_path):
  config = {"steps": 100, "model": {"layers": 3, "width": (64, 64)}, "seeds": [0, 1], "gone": None}
  digest = cells.check_config(tmp_path, config)
  assert cells.check_config(tmp_path, dict(reversed(config.items()))) == digest
  other = {"steps": 100.0, "model": {"layers": 4, "width": [64, 64]}, "seeds": [0, 1], "new": "x"}
  with pytest.raises(ConfigError) as e:
    cells.check_config(tmp_path, other)
  assert str(e.value).splitlines() == [
    f"{tmp_path}/config.json is of a run with other settings:",
    "  gone: null there, absent now",
    "  model.layers: 3 there, 4 now",
    '  new: absent there, "x" now',
    "  steps: 100 there, 100.0 now",
    "use another --out, or its settings again",
  ]
  assert cells.check_config(tmp_path, config) == digest
  (tmp_path / "config.json").write_text('{"steps": ')
  with pytest.raises(CheckpointError, match=r"config\.json: not JSON"):
    cells.check_config(tmp_path, config)


def test_of_many_differences_the_settings_come_first_and_the_advice_last(tmp_path):
  config = lambda n: {"files": {f"part{i}": n for i in range(30)}, "settings": {"model": f"{n}/gpt2"}}
  cells.check_config(tmp_path, config(1))
  with pytest.raises(ConfigError) as e:
    cells.check_config(tmp_path, config(2))
  lines = str(e.value).splitlines()
  assert lines[1] == '  settings.model: "1/gpt2" there, "2/gpt2" now'
  assert lines[-2:] == ["  (+19 more)", "use another --out, or its settings again"]
  assert len(lines) == cells.SHOWN + 3
