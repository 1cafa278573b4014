"""The rows that a run writes while it trains: JSON lines, CSV, and TensorBoard's events."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from pathlib import Path

from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.study import files

COLUMNS = (
  "step",
  "loss",
  "grad_norm",
  "learning_rate",
  "labels",
  "loss_scale",
  "skipped",
  "held_out_loss",
  "tokens_per_second",
  "mfu",
  "hfu",
)
"""step: how many are done.  loss: nats a label of that step.  labels: what it is a mean over.  skipped: steps of the run so
far whose gradients overflowed.  tokens_per_second: slots, since the row before that has it, without looks at held-out text;
of a run on several devices, of all.  mfu, hfu: where the chip is known (`flops.DEVICES`)."""


class Metrics:
  """The rows of a run, in `directory`; after a stop those beyond the step that it goes on from are cut, so that none is twice.

  Raises CheckpointError for a file that cannot be read as rows.
  """

  def __init__(self, directory: Path, start: int, tensorboard: bool = False):
    self.rows = [row for row in _read(directory / "metrics.jsonl") if row["step"] <= start]
    files.write_text(directory / "metrics.jsonl", "".join(map(_line, self.rows)))
    files.write_text(
      directory / "metrics.csv", _sheet([dict(zip(COLUMNS, COLUMNS, strict=True)), *self.rows])
    )
    self._lines = open(directory / "metrics.jsonl", "a")  # noqa: SIM115
    self._sheet = open(directory / "metrics.csv", "a", newline="")  # noqa: SIM115
    self._events = _events(directory / "tensorboard", start) if tensorboard else None

  def __enter__(self) -> Metrics:
    return self

  def __exit__(self, *_):
    for file in (self._lines, self._sheet, *filter(None, [self._events])):
      file.close()

  def add(self, row: dict) -> None:
    """Write a row; what it lacks of COLUMNS is null, and so is what is no finite number."""
    row = {name: _plain(row.get(name)) for name in COLUMNS}
    self.rows.append(row)
    self._lines.write(_line(row))
    self._sheet.write(_sheet([row]))
    for file in (self._lines, self._sheet):
      file.flush()  # for whoever watches
    if self._events is not None:
      for name, value in row.items():
        if name != "step" and value is not None:
          self._events.add_scalar(name, value, row["step"])

  def sync(self) -> None:
    """Put on disk what was written: before a checkpoint of the same steps is."""
    for file in (self._lines, self._sheet):
      file.flush()
      os.fsync(file.fileno())
    if self._events is not None:
      self._events.flush()


def check_tensorboard() -> None:
  """ConfigError where TensorBoard's writer is not installed."""
  try:
    import tensorboardX  # noqa: F401
  except ImportError:
    raise ConfigError(
      "--tensorboard: tensorboardX is not installed; pip install -e '.[tensorboard]', or leave the flag out"
    ) from None


def _events(directory: Path, start: int):
  from tensorboardX import SummaryWriter

  return SummaryWriter(str(directory), purge_step=start + 1)


def _read(path: Path) -> list[dict]:
  if not path.exists():
    return []
  lines = path.read_bytes().split(b"\n")
  rows = []
  for number, line in enumerate(lines[:-1], 1):  # the last one, without its newline, is of a kill
    try:
      row = json.loads(line)
      assert type(row["step"]) is int and row.keys() <= set(COLUMNS)
    except (ValueError, TypeError, KeyError, AssertionError, AttributeError):
      raise CheckpointError(
        f"{path}, line {number}: not a row of metrics; restore the file, or remove it"
      ) from None
    rows.append(row)
  return rows


def _plain(value):
  return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(row: dict) -> str:
  return json.dumps(row, allow_nan=False) + "\n"


def _sheet(rows: list[dict]) -> str:
  text = io.StringIO()
  csv.DictWriter(text, COLUMNS, lineterminator="\n").writerows(rows)
  return text.getvalue()
