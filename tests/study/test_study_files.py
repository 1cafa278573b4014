import errno
import fcntl
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxllm.errors import ConfigError
from jaxllm.study import files, rows

ROOT = Path(__file__).parents[2]
CELL = {
  "scheme": "rope", "quant": "none", "method": "yarn", "factor": 8.0, "train_length": 128, "length": 1024,
  "metric": "bpb_last", "seed": 0,
}  # fmt: skip


def test_a_write_replaces_the_whole_file(tmp_path):
  path = tmp_path / "a.txt"
  files.write_text(path, "long old text")
  files.write_text(path, "naïve")
  assert path.read_bytes() == "naïve".encode()
  assert os.listdir(tmp_path) == ["a.txt"]
  files.write_json(path, {"b": 1, "a": [1.5, None]})
  assert json.loads(path.read_text()) == {"b": 1, "a": [1.5, None]}
  with pytest.raises(ValueError, match="JSON compliant"):
    files.write_json(path, {"a": math.nan})


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call):
  path = tmp_path / "a.txt"
  files.write_text(path, "old")

  def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  with monkeypatch.context() as patch:
    patch.setattr(os, call, full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/a.txt'$"):
      files.write_text(path, "new")
  assert path.read_text() == "old"
  assert os.listdir(tmp_path) == ["a.txt"]


def test_a_disk_that_takes_a_part_at_a_time_gets_all_of_it(tmp_path, monkeypatch):
  write = os.write
  monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
  files.write_bytes(tmp_path / "a", b"0123456789")
  assert (tmp_path / "a").read_bytes() == b"0123456789"


def test_a_write_into_what_is_no_directory_names_the_path(tmp_path):
  (tmp_path / "file").write_text("")
  for path in (tmp_path / "file" / "a.txt", tmp_path / "absent" / "a.txt"):
    with pytest.raises(OSError) as e:
      files.write_text(path, "x")
    assert e.value.filename == str(path)


def test_digest_ignores_the_order_of_keys_and_nothing_else():
  assert files.digest({"a": 1, "b": [2]}) == files.digest({"b": [2], "a": 1})
  assert len({files.digest(x) for x in ({"a": 1}, {"a": 1.0}, {"a": "1"}, {"a": [1]}, {"a": True})}) == 5
  # sha256 of the text {"a":1}, by coreutils' sha256sum
  assert files.digest({"a": 1}) == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"


HOLD = """
import sys
from jaxllm.study.files import Lock
with Lock(sys.argv[1]):
  print("held", flush=True)
  sys.stdin.read()
"""


def hold(directory):
  pipe = subprocess.PIPE
  return subprocess.Popen(
    [sys.executable, "-c", HOLD, directory], cwd=ROOT, text=True, stdin=pipe, stdout=pipe, stderr=pipe
  )


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(tmp_path):
  out = tmp_path / "new" / "out"
  holder = hold(out)
  assert holder.stdout.readline() == "held\n"
  message = f"{out} is in use by process {holder.pid}: wait for that run to end, or use another --out"
  with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"), files.Lock(out):
    pass
  assert holder.poll() is None
  holder.kill()
  holder.communicate()
  for _ in range(2):  # and a lock given back can be taken again
    with files.Lock(out):
      assert (out / "LOCK").read_text() == f"{os.getpid()}\n"


@pytest.mark.parametrize("_", range(2))
def test_of_several_at_once_one_wins_and_the_others_name_it(tmp_path, _):
  (tmp_path / "LOCK").write_text("99999999\n")  # what a run long dead has left
  racers = [hold(tmp_path) for _ in range(5)]
  losers = [racer for racer in racers if racer.stdout.readline() == ""]
  (winner,) = (racer for racer in racers if racer not in losers)
  for loser in losers:
    assert f"is in use by process {winner.pid}:" in loser.communicate()[1]
  assert winner.communicate(input="")[1] == "" and winner.returncode == 0


def test_a_disk_without_locks_is_an_error_that_names_the_file(tmp_path, monkeypatch):
  def refuse(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

  monkeypatch.setattr(fcntl, "flock", refuse)
  with pytest.raises(OSError, match="LOCK"), files.Lock(tmp_path):
    pass


def test_equal_rows_give_equal_bytes_in_columns_of_a_fixed_order(tmp_path):
  table = [
    rows.ok(CELL, 0.1 + 0.2),
    rows.failed({**CELL, "seed": 1}, 'ValueError: "no", he said'),
    rows.not_applicable({**CELL, "length": 64}, "shorter than trained"),
  ]
  files.write_results(tmp_path, table)
  first = {name: (tmp_path / name).read_bytes() for name in ("results.jsonl", "results.csv")}
  files.write_results(tmp_path, [dict(reversed(row.items())) for row in table])
  assert {name: (tmp_path / name).read_bytes() for name in first} == first
  assert first["results.csv"].decode() == (
    "scheme,quant,method,factor,train_length,length,metric,value,seed,status,reason\n"
    "rope,none,yarn,8.0,128,1024,bpb_last,0.30000000000000004,0,ok,\n"
    'rope,none,yarn,8.0,128,1024,bpb_last,,1,failed,"ValueError: ""no"", he said"\n'
    "rope,none,yarn,8.0,128,64,bpb_last,,0,not applicable,shorter than trained\n"
  )
  assert [json.loads(line) for line in first["results.jsonl"].splitlines()] == table


@pytest.mark.parametrize(
  "change, message",
  [
    ({"value": math.nan}, "value is nan"),
    ({"value": math.inf}, "value is inf"),
    ({"factor": math.inf}, "factor is inf"),
    ({"value": None}, "status is 'ok' with value None"),
    ({"value": "2.5"}, "status is 'ok' with value '2.5'"),
    ({"value": True}, "value is a bool"),
    ({"reason": "why"}, "status is 'ok' with value 2.5 and reason 'why'"),
    ({"status": "failed"}, "status is 'failed' with value 2.5"),
    ({"status": "failed", "value": None}, "status is 'failed' with value None and reason None"),
    ({"status": "fine"}, "status is 'fine'"),
    ({"method": ["yarn"]}, "method is a list"),
    ({"extra": 1}, "columns"),
  ],
)
def test_what_is_no_row_is_never_written(tmp_path, change, message):
  with pytest.raises(AssertionError, match=message):
    files.write_results(tmp_path, [rows.ok(CELL, 2.5) | change])
  assert not os.listdir(tmp_path)


def test_a_value_that_is_not_finite_makes_a_failed_row():
  assert rows.ok(CELL, math.nan) == rows.failed(CELL, "the value is nan")
  assert rows.ok(CELL, -math.inf)["reason"] == "the value is -inf"
