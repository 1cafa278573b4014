"""Stopping a run in good order: the first signal asks, the second one ends it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time

STOPPED = 75  # EX_TEMPFAIL: the exit status of a run that stopped early; the same command continues it
SIGNALS = (signal.SIGTERM, signal.SIGINT)

# timeout(1), shells and launchers deliver one request twice (to the process and to its group) within
# milliseconds; a person's second Ctrl-C, or a scheduler's second signal, comes later than this (seconds).
SAME_REQUEST = 0.3


class Stopped(BaseException):
  """The run was asked to stop and has reached a safe point.

  Not an `Exception`, for the reason KeyboardInterrupt is not: `except Exception` around a cell must not turn
  a request to stop into a failed cell.
  """


class StopFlag:
  """Turns SIGTERM and SIGINT into a flag that loops poll with `check()`.

      with StopFlag() as stop:
        for step in range(start, steps):
          state = train_step(state)
          stop.check()                        # raises Stopped; the state is whole here

  A second signal ends the process at once with status 75. It does so from a thread fed by the C-level
  handler, because a Python handler would wait for a compilation of minutes to return. The old handlers come
  back at the end. Use it from the main thread (Python installs handlers nowhere else).
  """

  def __init__(self):
    self._signal = None

  def __enter__(self) -> StopFlag:
    self._read_end, self._write_end = os.pipe()
    os.set_blocking(self._write_end, False)  # as set_wakeup_fd demands
    self._old_fd = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
    self._old_handlers = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
    self._thread = threading.Thread(target=self._watch, name="stop", daemon=True)
    self._thread.start()
    return self

  def __exit__(self, *_):
    for number, handler in self._old_handlers.items():
      signal.signal(number, handler)
    signal.set_wakeup_fd(self._old_fd)
    os.close(self._write_end)  # the thread reads the end of the pipe and returns
    self._thread.join()
    os.close(self._read_end)

  def __bool__(self) -> bool:
    """Whether a signal has come."""
    return self._signal is not None

  def check(self) -> None:
    """Raises Stopped if a signal has come. Call it where all that is worth keeping is on disk."""
    if self._signal is not None:
      raise Stopped(self._signal)

  def _on_signal(self, number, _frame):
    self._signal = signal.Signals(number).name

  def _watch(self):
    first = None
    while received := os.read(self._read_end, 1):
      if received[0] not in SIGNALS:
        continue
      now = time.monotonic()
      if first is None:
        first = now
        name = signal.Signals(received[0]).name
        _say(f"\n{name}: stopping at the next safe point; a second signal ends the run at once\n")
      elif now - first > SAME_REQUEST:
        _say("second signal: ending now\n")
        os._exit(STOPPED)


def _say(text: str) -> None:
  """Writes past Python's buffers (the main thread may be inside a write); a closed stderr is no obstacle."""
  with contextlib.suppress(OSError):
    os.write(2, text.encode())
