"""Kills a small sweep again and again, and holds what it ends with against a run that nothing disturbed.

    python tests/experiments/kill_sweep.py --kills=20

The moments are spread over the whole course of the sweep (each step of training, each group of cells, and now and then
the start of the program); they are chosen by what the run says of itself, and each is a little after it.  Checked: equal
results.csv, each group recorded once, and at most 25 steps of training done again after a kill.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SAVE_EVERY = 25
SWEEP = (
  "--train_length=32",
  "--steps=120",
  "--other_steps=60",
  "--embed_dim=32",
  "--num_layers=3",
  "--mlp_dim=64",
  "--windows=2",
  "--batch_size=4",
  "--lengths=32,64,128",
  "--methods=none,pi,yarn,ntk,rerope",
  "--schemes=rope,alibi",
)
# The sweep as it is, but with a line of progress for every step.
PROGRAM = """
import functools, sys
from experiments import length_extrapolation
from jaxllm.study import progress, run_app
progress.Progress = functools.partial(progress.Progress, every=0.0)
run_app(length_extrapolation.main, check=length_extrapolation.read_settings)
"""
SEEN = re.compile(r"(?:train (?P<scheme>\w+), seed \d+|cells): (?P<done>\d+)/(?P<total>\d+)  ")


class Run:
  """A sweep in its own process, and what it says of itself."""

  def __init__(self, out: Path, args: tuple[str, ...]):
    env = {name: item for name, item in os.environ.items() if name != "XLA_FLAGS"}
    self._process = subprocess.Popen(
      [sys.executable, "-c", PROGRAM, f"--out={out}", *args],
      cwd=ROOT,
      env=env,
      text=True,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
    )
    self.steps: dict[str, list[int]] = collections.defaultdict(
      list
    )  # of training, by scheme, as they were shown
    self.cells: list[int] = []
    self.errors = ""

  def next(self) -> tuple[str, int] | None:
    """The next ("rope" or "cells", how many are done), or None at the end of the process."""
    for line in self._process.stderr:
      if found := SEEN.match(line):
        name, done = found["scheme"] or "cells", int(found["done"])
        (self.cells if name == "cells" else self.steps[name]).append(done)
        return name, done
      self.errors += line
    return None

  def end(self, number: signal.Signals | None = None) -> int:
    """Send a signal, if there is one, read the rest, and give the exit status."""
    if number is not None:
      self._process.send_signal(number)
    while self.next() is not None:
      pass
    self._process.stderr.close()
    return self._process.wait()


@dataclasses.dataclass(frozen=True)
class Course:
  """What an undisturbed run shows, in order, each with the seconds until the next."""

  events: tuple[tuple[str, int], ...]
  seconds: tuple[float, ...]

  def moments(self, count: int, rng: random.Random) -> list[int]:
    """Indices of `count` events in order, evenly spread with cells weighing as much as ten steps."""
    weights = [10 if name == "cells" else 1 for name, _ in self.events[:-1]]  # the last event is the end
    ends = [sum(weights[: i + 1]) for i in range(len(weights))]
    places = [(i + rng.random()) * ends[-1] / count for i in range(count)]
    return [next(i for i, end in enumerate(ends) if place < end) for place in places]


def undisturbed(out: Path, args: tuple[str, ...]) -> Course:
  """Run the sweep to its end."""
  run, events, times = Run(out, args), [], []
  while (event := run.next()) is not None:
    events.append(event)
    times.append(time.monotonic())
  code = run.end()
  assert code == 0, (code, run.errors)
  return Course(
    tuple(events), tuple(b - a for a, b in zip(times, [*times[1:], time.monotonic()], strict=True))
  )


def ledger(out: Path) -> list[dict]:
  """The whole lines of cells.jsonl."""
  path = out / "cells.jsonl"
  lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
  return [json.loads(line) for line in lines]


def last_steps(steps: dict[str, list[int]], so_far: dict[str, int], problems: list[str]) -> int:
  """Hold a run's first steps against the last ones `so_far`, and bring these up to date; the most that was repeated."""
  repeated = 0
  for scheme, shown in steps.items():
    if scheme in so_far:
      again = so_far[scheme] - (shown[0] - 1)
      repeated = max(repeated, again)
      if not 0 <= again <= SAVE_EVERY:
        problems.append(f"{scheme}: at step {so_far[scheme]} when it was killed, went on from {shown[0] - 1}")
    so_far[scheme] = max(shown[-1], so_far.get(scheme, 0))
  return repeated


def disturb(out: Path, args: tuple[str, ...], course: Course, signals, seed: int) -> dict:
  """Run the sweep, ended by each of `signals` in turn, and then to its end; counts, and what is wrong."""
  rng, problems, so_far = random.Random(seed), [], {}
  total = sum(name == "cells" for name, _ in course.events)
  counts = collections.Counter(kills=0, between=0, in_training=0, in_cells=0, at_start=0, most_repeated=0)
  for number, moment in zip(signals, course.moments(len(signals), rng), strict=True):
    run, at_start = Run(out, args), counts["kills"] % 7 == 4
    if at_start:
      time.sleep(rng.uniform(0, 3))
    else:
      while (event := run.next()) is not None and course.events.index(event) < moment:
        pass
      if event is None:
        problems.append(f"ended by itself before {course.events[moment]}: {run.errors[-500:]}")
      time.sleep(rng.uniform(0, course.seconds[moment]))
    code = run.end(number)
    wanted = {-signal.SIGKILL} if number == signal.SIGKILL else {75}
    if at_start:
      wanted.add(-number)  # before there was a handler
    if code not in wanted:
      problems.append(f"status {code} after {number.name}: {run.errors[-500:]}")
    counts["most_repeated"] = max(counts["most_repeated"], last_steps(run.steps, so_far, problems))
    recorded = len(ledger(out))
    counts["kills"] += 1
    counts["between"] += bool(so_far) and recorded < total
    kind = "at_start" if at_start else "in_cells" if course.events[moment][0] == "cells" else "in_training"
    counts[kind] += 1
  run = Run(out, args)
  if (code := run.end()) != 0:
    problems.append(f"status {code} of the last run: {run.errors[-500:]}")
  counts["most_repeated"] = max(counts["most_repeated"], last_steps(run.steps, so_far, problems))
  groups = collections.Counter(line["group"] for line in ledger(out))
  counts["groups"] = len(groups)
  if set(groups.values()) != {1} or len(groups) != total:
    problems.append(f"groups recorded: {groups}, expected {total}, each once")
  return dict(counts) | {"problems": problems}


def differing(one: Path, other: Path) -> list[str]:
  """Files of two runs that are not equal, byte for byte."""
  names = ("results.csv", "results.jsonl", "report.md", "positions.csv", "windows.csv")
  return [name for name in names if (one / name).read_bytes() != (other / name).read_bytes()]


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--kills", type=int, default=20)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--signal", default="SIGKILL", help="SIGKILL or SIGTERM")
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory() as directory:
    whole, killed = Path(directory) / "whole", Path(directory) / "killed"
    course = undisturbed(whole, SWEEP)
    signals = [signal.Signals[arguments.signal]] * arguments.kills
    found = disturb(killed, SWEEP, course, signals, arguments.seed)
    problems = found.pop("problems") + [f"{name} differs" for name in differing(whole, killed)]
  counts = ", ".join(f"{name} {count}" for name, count in found.items())
  print(f"{counts}; {'; '.join(problems) or 'results.csv byte-identical, each group recorded once'}")
  return 1 if problems else 0


if __name__ == "__main__":
  sys.exit(main())
