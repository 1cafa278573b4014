"""How far a run is: a live display on a terminal, plain lines in a log.

Clock times are shown and never returned, so none can reach a results file.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

REFRESH = 0.25  # seconds between updates on a terminal; reading a loss waits for the device


class Progress:
  """Shows training and cells as they go; what is not on a terminal gets a line every `every` seconds.

      with Progress() as progress:
        training = progress.training("rope, seed 0", total=2000, start=step, tokens_per_step=4096)
        for step in range(start, 2000):
          state, loss = train_step(state)
          training.update(step + 1, loss)
        sweep = progress.cells("sweep", total=len(groups), done=len(ledger.done))
        sweep.update("rope/yarn/1024")

  The first and the last update of each are always shown. `stream` is stderr unless given, and is flushed
  after each line.
  """

  def __init__(
    self, stream: TextIO | None = None, every: float = 5.0, clock: Callable[[], float] = time.monotonic
  ):
    self._stream = sys.stderr if stream is None else stream
    self._clock = clock
    self._live = None
    if self._stream.isatty():
      self._live = _live(self._stream)
    self._every = every if self._live is None else REFRESH

  def __enter__(self) -> Progress:
    if self._live is not None:
      self._live.start()
    return self

  def __exit__(self, *_):
    if self._live is not None:
      self._live.stop()

  def training(
    self,
    label: str,
    total: int,
    start: int = 0,
    tokens_per_step: int = 0,
    utilisation: Callable[[float], tuple[float, float] | None] | None = None,
    clock: Callable[[], float] | None = None,
  ) -> Training:
    """A training run of `total` steps of which `start` are done (not 0 after a resume).

    utilisation: (MFU, HFU) at so many tokens a second, or None where the devices' peak is not known.
    clock: seconds for the rate, where some of the time does not count as training; default the display's own.
    """
    return Training(self, label, total, start, tokens_per_step, utilisation, clock)

  def cells(self, label: str, total: int, done: int = 0) -> Cells:
    """`total` groups of cells of which `done` are recorded already."""
    return Cells(self, label, total, done)

  def note(self, text: str) -> None:
    """A line that stays, such as a warning, above the live display."""
    if self._live is None:
      print(text, file=self._stream, flush=True)
    else:
      self._live.console.print(text, markup=False, highlight=False)

  def _show(self, task, text: str) -> None:
    if self._live is None:
      print(f"{task.label}: {task.done}/{task.total}  {text}", file=self._stream, flush=True)
      return
    if task.row is None:
      task.row = self._live.add_task(task.label, total=task.total, text="")
    self._live.update(task.row, completed=task.done, text=text)


class _Task:
  """Counts towards a total, measures the rate, and decides when a line is due.

  The rate is taken from the end of the first update on: the first step compiles, and what an earlier run did
  took none of this one's time.
  """

  def __init__(
    self,
    progress: Progress,
    label: str,
    total: int,
    done: int,
    clock: Callable[[], float] | None = None,
  ):
    self.label, self.total, self.done = label, total, done
    self.row = None  # its row in the live display
    self._progress, self._clock = progress, clock or progress._clock
    self._first = None  # (units done, time) after the first update
    self._shown = None  # time of the last line

  def _advance(self, done: int, text: Callable[[], str]) -> None:
    """Sets the units done; `text` is called only when a line is due, and may wait for the device."""
    self.done = done
    shown = self._progress._clock
    if self._first is not None and done < self.total and shown() - self._shown < self._progress._every:
      return
    words = text()
    now = self._clock()
    if self._first is None:
      self._first = (done, now)
    self._shown = shown()
    self._progress._show(self, "  ".join([words, *self._pace(now)]))

  def _rate(self, now: float) -> float | None:
    done, since = self._first
    return (self.done - done) / (now - since) if self.done > done and now > since else None

  def _pace(self, now: float) -> list[str]:
    rate = self._rate(now)
    return [f"{duration((self.total - self.done) / rate)} left"] if rate and self.done < self.total else []


class Training(_Task):
  """Progress of a training run; see `Progress.training`."""

  def __init__(self, progress, label, total, start, tokens_per_step, utilisation=None, clock=None):
    super().__init__(progress, label, total, start, clock)
    self._tokens_per_step, self._utilisation = tokens_per_step, utilisation

  def update(self, step: int, loss) -> None:
    """`step` steps are done; `loss` may be an array on a device, and is read only when it is shown."""
    self._advance(step, lambda: f"loss {float(loss):.4f}")

  def _pace(self, now):
    rate = self._rate(now)
    if rate is None:
      return []
    speed = (
      f"{short(rate * self._tokens_per_step)} tokens/s" if self._tokens_per_step else f"{rate:.1f} steps/s"
    )
    used = self._utilisation and self._utilisation(rate * self._tokens_per_step)
    share = [f"MFU {used[0]:.1%}, HFU {used[1]:.1%}"] if used else []
    return [speed, *share, *super()._pace(now)]


class Cells(_Task):
  """Progress of a sweep; see `Progress.cells`."""

  def update(self, name: str) -> None:
    """One more group is done, called `name`."""
    self._advance(self.done + 1, lambda: name)


def duration(seconds: float) -> str:
  """12s, 3m05s, 2h04m."""
  seconds = round(seconds)
  if seconds < 60:
    return f"{seconds}s"
  minutes, seconds = divmod(seconds, 60)
  return f"{minutes}m{seconds:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def short(number: float) -> str:
  """950, 12.3k, 4.56M."""
  for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
    if number >= unit:
      return f"{number / unit:.3g}{letter}"
  return f"{number:.0f}"


def _live(stream: TextIO):
  from rich import console, progress

  return progress.Progress(
    progress.TextColumn("{task.description}", markup=False),
    progress.BarColumn(bar_width=24),
    progress.MofNCompleteColumn(),
    progress.TextColumn("{task.fields[text]}", markup=False),
    console=console.Console(file=stream),
  )
