"""Runs that are killed at any moment, at named places, or asked to stop: what was announced as saved is there, bit for bit."""

import errno
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from disturbed import Server, half_saved
from training_table import about, measured

from jaxllm.study.files import Lock

MIB = 1 << 20
FULL = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory):
  server = Server(tmp_path_factory.mktemp("server") / "log")
  yield server
  server.close()


@pytest.fixture
def log(server):
  """What was said on stderr since the test began."""
  start = server.log.stat().st_size
  return lambda: server.log.read_bytes()[start:].decode()


class Whole:
  """What undisturbed runs come to, by what was asked for."""

  def __init__(self, server, directory):
    self.server, self.directory, self.found = server, directory, {}

  def __call__(self, run, **request):
    key = str(sorted(request.items()))
    if key not in self.found:
      done = self.server.to_end(run, self.directory / f"whole-{len(self.found)}", **request)
      assert done.status == 0, self.server.log.read_text()[-2000:]
      self.found[key] = done
    return self.found[key]


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
  return Whole(server, tmp_path_factory.mktemp("whole"))


def restored(run):
  """(step, digest) of what a run began with; (0, "") where there was nothing."""
  found = run.all("RESTORED")
  if not found:
    return 0, ""
  ((_, step, sha),) = found
  return int(step), sha


class Chain:
  """A run over several processes, and what all of them have promised."""

  def __init__(self, server, run, out, **request):
    self.server, self.run, self.out, self.request = server, run, Path(out), request
    self.promised = {}

  def start(self, **fault):
    return self.server.start(self.run, self.out, **self.request, **fault)

  def check(self, run):
    """What a process found is the newest that was promised, or a later one, and no step has two contents."""
    if run.all("RESTORED"):
      step, sha = restored(run)
      assert step >= max(self.promised, default=0), f"step {max(self.promised)} is lost: began at {step}"
      assert step == 0 or self.promised.get(step, sha) == sha, f"step {step} has changed"
    for step, sha in run.saved().items():
      assert self.promised.setdefault(step, sha) == sha, f"step {step} came out otherwise"
    assert not (self.out / "quarantine").exists()

  def finish(self, expected):
    """An undisturbed process ends as a run does that was never disturbed."""
    run = self.start()
    assert run.end() == 0, self.server.log.read_text()[-2000:]
    self.check(run)
    assert run.all("DONE") == expected.all("DONE")
    assert not half_saved(self.out)
    assert {step: sha for step, sha in self.promised.items() if expected.saved().get(step, sha) != sha} == {}


@pytest.mark.parametrize(
  ("kind", "request_", "kills"),
  [
    pytest.param("saves", dict(steps=8, mib=8), 3, id="saves"),
    pytest.param("train", dict(steps=12, save_every=1, large=True), 200, id="train", marks=FULL),
  ],
)
def test_sigkill_at_any_moment(server, whole, tmp_path, kind, request_, kills):
  """Three in four a little after the first or second save began, as most kills are to meet one; the others at any time."""
  about("faults", f"SIGKILL ({kind})")
  request = request_
  expected, rng, in_save, done = whole(kind, **request), random.Random(kills), 0, 0
  assert kind == "saves" or all(int(size) >= 48 * MIB for _, _, size in expected.all("SAVING"))
  chain = Chain(server, kind, tmp_path / "0", **request)
  while done < kills:
    run = chain.start()
    goes_on = run.until("START") is not None
    if kind == "train" and done % 4:
      for _ in range(rng.randint(1, 2)):
        goes_on = goes_on and run_to(run, "SAVING")
      goes_on = goes_on and run_for(run, rng.uniform(0, 0.15))
    else:
      goes_on = goes_on and run_for(run, rng.uniform(0, 1.2))
    if not goes_on:
      assert run.status == 0, server.log.read_text()[-2000:]
      chain.check(run)
      assert run.all("DONE") == expected.all("DONE")
      chain = Chain(server, kind, tmp_path / str(done), **request)
      continue
    status = run.kill()
    if status == 0:  # it was faster
      continue
    assert status == -signal.SIGKILL
    done += 1
    in_save += bool(half_saved(chain.out))
    chain.check(run)
  chain.finish(expected)
  assert in_save >= kills / 2 or kills < 10
  measured("faults", f"SIGKILL ({kind})", tried=kills, while_saving=in_save, lost=0, bytes_differ=0)


def run_to(run, word):
  """Listens to the next line that begins with `word`; whether there was one."""
  while (words := run.next()) is not None:
    if words[0] == word:
      return True
  return False


def run_for(run, seconds):
  """Listens for some seconds; whether the run goes on."""
  end = time.monotonic() + seconds
  while (left := end - time.monotonic()) > 0:
    if run.next(left) is None:
      return False
  return True


SAVING = [
  "save",
  "arrays_half",
  "orbax_commit",
  "arrays_written",
  "file_half",
  "file_written",
  "file_renamed",
  "manifest_written",
  "step_renamed",
  "step_removing",
]
"""Places in the course of a save, in order."""
TIMES = [1, *(pytest.param(n, marks=FULL) for n in (2, 3, 4, 5))]


@pytest.mark.parametrize("n", TIMES)
@pytest.mark.parametrize("place", [pytest.param(x, marks=FULL if x == "arrays_half" else ()) for x in SAVING])
def test_sigkill_within_a_save(server, whole, tmp_path, place, n):
  about("faults", f"SIGKILL at {place}")
  request = dict(steps=8, mib=32 if place == "arrays_half" else 3)
  expected, chain = whole("saves", **request), Chain(server, "saves", tmp_path, **request)
  in_orbax = place in ("arrays_half", "orbax_commit")
  if in_orbax and n > 1:  # these strike in the first save that they meet
    assert server.to_end("saves", tmp_path, **request | {"steps": n - 1}).status == 0
  run = chain.start(fault=place if in_orbax else f"{place}:{n}")
  assert run.end() == -signal.SIGKILL
  if place == "arrays_half":
    (half,) = half_saved(tmp_path)
    assert MIB < sum(path.stat().st_size for path in half.rglob("*") if path.is_file()) < 32 * MIB
  step = n + 2 if place == "step_removing" else n
  whole_step = place in ("step_renamed", "step_removing")
  assert len(half_saved(tmp_path)) == (not whole_step and place != "save")
  assert (tmp_path / str(step)).exists() == whole_step
  chain.check(run)
  after = chain.start()
  assert after.end() == 0
  chain.check(after)
  assert restored(after)[0] == (step if whole_step else step - 1)
  assert after.all("DONE") == expected.all("DONE")
  assert sorted(path.name for path in tmp_path.iterdir()) == ["7", "8", "LOCK"]
  measured("faults", f"SIGKILL at {place}", tried=1, lost=0, bytes_differ=0)


@pytest.mark.parametrize("n", TIMES)
def test_sigkill_while_a_step_is_moved_aside(server, whole, tmp_path, log, n):
  about("faults", "SIGKILL at moving_aside")
  expected = whole("saves", steps=8)
  assert server.to_end("saves", tmp_path, steps=n + 1).status == 0
  path = sorted(path for path in (tmp_path / str(n + 1)).rglob("*") if path.is_file())[n]
  path.write_bytes(path.read_bytes()[:-1])
  for fault in ("moving_aside:1", None):
    run = server.to_end("saves", tmp_path, steps=8, **({"fault": fault} if fault else {}))
    assert run.status == (-signal.SIGKILL if fault else 0)
    assert str(path) in log() and "moved to" in log()
  assert restored(run)[0] == n and run.all("DONE") == expected.all("DONE")
  assert [each.name for each in (tmp_path / "quarantine").iterdir()] == [str(n + 1)]
  measured("faults", "SIGKILL at moving_aside", tried=1, lost=0, bytes_differ=0)


@pytest.mark.parametrize("n", TIMES)
def test_sigkill_within_a_line_of_results(server, whole, tmp_path, n):
  about("faults", "SIGKILL at line_half")
  expected = whole("lines", steps=6)
  run = server.to_end("lines", tmp_path, steps=6, fault=f"line_half:{n}")
  assert run.status == -signal.SIGKILL and len(run.all("SAVED")) == n - 1
  assert not (tmp_path / "cells.jsonl").read_bytes().endswith(b"\n")
  run = server.to_end("lines", tmp_path, steps=6)
  assert run.all("START") == [["START", str(n - 1)]] and run.all("DONE") == expected.all("DONE")
  measured("faults", "SIGKILL at line_half", tried=1, lost=0, bytes_differ=0)


@pytest.mark.parametrize("n", TIMES)
@pytest.mark.parametrize("place", [pytest.param("piece_exported", marks=FULL), "export_renamed"])
def test_sigkill_within_an_export(server, tmp_path, place, n):
  """The model that was there loads, or none does and the error says so: never a mixture; and the export can be repeated."""
  about("faults", f"SIGKILL at {place}")
  if place == "export_renamed":
    n = min(n, 2)  # of that many files
  assert server.to_end("export", tmp_path, seed=0).status == 0
  assert server.to_end("export", tmp_path, seed=1, fault=f"{place}:{n}").status == -signal.SIGKILL
  run = server.to_end("export", tmp_path, seed=1)
  (found,) = run.all("RESTORED")
  assert found[1] == ("0" if place == "piece_exported" else "none") and run.all("DONE") == [["DONE", "1"]]
  measured("faults", f"SIGKILL at {place}", tried=1, lost=0, bytes_differ=0)


def test_one_writer_and_a_lock_that_dies_with_its_holder(server, tmp_path, log):
  about("faults", "two writers")
  with Lock(tmp_path):
    second = server.to_end("saves", tmp_path, steps=3)
  assert second.status == 2 and f"in use by process {os.getpid()}:" in log()
  assert [path.name for path in tmp_path.iterdir()] == ["LOCK"]
  for fault in ("lock_taken:1", None):  # a lock that names nobody yet is no obstacle either
    found = server.to_end("lines", tmp_path, steps=1, **({"fault": fault} if fault else {}))
    assert found.status == (-signal.SIGKILL if fault else 0)
  measured("faults", "two writers", tried=1, lost=0, bytes_differ=0)


PHASES = ["START", "DATA", "STEP", "SAVING", "SAVED"]
"""After START a program is compiled, or read; after DATA the next batch is made, for 50 ms."""


@pytest.mark.parametrize(("signals", "large"), [(1, False), pytest.param(50, True, marks=FULL)])
def test_a_request_to_stop_saves_the_step_that_runs(server, whole, tmp_path, signals, large):
  about("faults", "SIGTERM")
  request = dict(steps=24 if large else 4, save_every=6 if large else 2, large=large)
  expected, rng, done, in_save, longest = whole("train", **request), random.Random(signals), 0, 0, 0.0
  chain = Chain(server, "train", tmp_path / "0", **request, data_seconds=0.05)
  while done < signals:
    run = chain.start()
    phase = PHASES[done % len(PHASES)] if signals > 1 else "DATA"
    for _ in range(rng.randint(1, 3) if phase in ("DATA", "STEP") else 1):
      words = run.next()
      while words is not None and words[0] != phase:
        words = run.next()
    if words is None or run.all("DONE"):
      assert run.end() == 0 and run.all("DONE") == expected.all("DONE")
      chain.check(run)
      chain = Chain(server, "train", tmp_path / str(done), **request, data_seconds=0.05)
      continue
    time.sleep(rng.uniform(0, 0.06))
    began = time.monotonic()
    in_save += bool(half_saved(chain.out))
    status = run.end([signal.SIGTERM, signal.SIGINT][done % 2])
    longest = max(longest, time.monotonic() - began)
    assert status == (0 if run.all("DONE") else 75), server.log.read_text()[-2000:]
    steps = [int(words[1]) for words in run.all("STEP")]
    assert max(steps, default=0) <= max([*run.saved(), restored(run)[0]]), "a step was lost"
    chain.check(run)
    done += 1
  chain.finish(expected)
  assert longest <= 20
  measured("faults", "SIGTERM", tried=signals, while_saving=in_save, lost=0, bytes_differ=0)


@pytest.mark.slow
def test_a_second_signal_within_a_save_leaves_the_last_step(server, whole, tmp_path):
  expected = whole("train", steps=4, save_every=1)
  chain = Chain(server, "train", tmp_path, steps=4, save_every=1)
  run = chain.start(save_seconds=1.5)
  run.until("SAVED")
  while run.next()[0] != "SAVING":
    pass
  os.kill(run.pid, signal.SIGTERM)
  time.sleep(0.5)
  began = time.monotonic()
  assert run.end(signal.SIGTERM) == 75 and time.monotonic() - began < 1
  assert list(run.saved()) == [1] and half_saved(tmp_path)
  chain.check(run)
  chain.finish(expected)


@pytest.mark.slow
def test_a_request_before_the_first_step_costs_no_step(server, tmp_path):
  run = server.start("train", tmp_path, steps=4, save_every=4, data_seconds=1)
  run.until("DATA")
  assert run.end(signal.SIGTERM) == 75
  assert list(run.saved()) == [1]


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
  """A file system of 64 MiB in memory, whose free bytes are what a test leaves."""
  path = tmp_path_factory.mktemp("disk")
  mounted = subprocess.run(
    ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", path], capture_output=True, check=False
  )
  if mounted.returncode:
    pytest.skip("no permission to mount a file system")
  yield path
  subprocess.run(["umount", path], check=True)


SIZE = 512 * 512 * 3 * 4 + 4
CUTS = [(i + 0.5) / 20 for i in range(20)]


@pytest.mark.parametrize("cut", [0.5, *(pytest.param(cut, marks=FULL) for cut in CUTS)])
@pytest.mark.parametrize("last", [False, True], ids=["first save", "last save"])
@pytest.mark.parametrize("kind", ["disk", "limit", "refused"])
def test_a_full_disk(server, whole, tmp_path, request, log, kind, last, cut):
  """At a part of what a step takes: 74, with the bytes; steps that were saved are there, and half of one is not."""
  about("faults", f"full disk ({kind})")
  place = request.getfixturevalue("disk") if kind == "disk" else tmp_path
  out, steps = place / "run", 4 if last else 1
  shutil.rmtree(place, ignore_errors=True) if kind != "disk" else shutil.rmtree(out, ignore_errors=True)
  out.mkdir(parents=True)
  before = server.to_end("saves", out, steps=3) if last else None
  fault = {"any_room": True} if kind != "refused" else {"free_bytes": int(cut * 1.5 * SIZE)}
  filler = place / "filler"
  if kind == "disk":
    free = os.statvfs(place)
    filler.write_bytes(bytes(free.f_bavail * free.f_frsize - int(cut * SIZE)))
  elif kind == "limit":
    fault["largest_file"] = int(cut * 0.85 * SIZE)
  run = server.to_end("saves", out, steps=steps, **fault)
  assert run.status == 74, log()
  assert str(steps) not in [step for _, step, _ in run.all("SAVED")] and not run.all("DONE")
  said = log()
  assert f"error: {out}: " in said and f"a checkpoint takes {int(1.5 * SIZE)} bytes" in said
  assert "run the same command again" in said
  if kind == "refused":
    assert f"and {fault['free_bytes']} are free" in said and os.strerror(errno.ENOSPC) in said
  assert not half_saved(out)
  assert sorted(path.name for path in out.iterdir()) == (["2", "3", "LOCK"] if last else ["LOCK"])
  filler.unlink(missing_ok=True)
  run = server.to_end("saves", out, steps=4)
  assert run.status == 0 and run.all("DONE") == whole("saves", steps=4).all("DONE")
  assert restored(run)[0] == (3 if last else 0) and (not last or restored(run)[1] == before.saved()[3])
  measured("faults", f"full disk ({kind})", tried=1, lost=0, not_noticed=0, bytes_differ=0)
