"""Resumable cells: what has been computed is on disk, once, and is not computed again.

A cell is one row of results before it has a value; a `Group` is the cells that one computation fills, and
the unit of resuming. The ledger holds one line a finished group, so a kill loses the group in flight.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxllm.errors import CheckpointError, ConfigError, JaxllmError
from jaxllm.failpoint import failpoint
from jaxllm.study import files
from jaxllm.study import rows as rows_lib
from jaxllm.study.stop import StopFlag

SHOWN = 12
"""At most so many differences a message lists: a run of another model differs in all that describes it."""


@dataclasses.dataclass(frozen=True)
class Group:
  """Cells computed together. `name` is unique in a run; `cells` are rows without value, status and reason."""

  name: str
  cells: tuple[dict, ...]


def check_config(out: str | os.PathLike, config: dict) -> str:
  """Writes `config.json` on the first run in `out`; later refuses another configuration. Returns its digest.

  `config` is a nested dict of JSON values. Raises ConfigError that names the keys that differ, up to SHOWN of
  them, with both values, settings first, and CheckpointError if the file there cannot be read as JSON.
  """
  path = Path(out) / "config.json"
  config = json.loads(
    json.dumps(config, allow_nan=False)
  )  # tuples become lists, as they will be when read back
  if not path.exists():
    files.write_json(path, config)
    return files.digest(config)
  try:
    found = json.loads(path.read_bytes())
  except ValueError as e:
    raise CheckpointError(f"{path}: not JSON ({e}); restore the file, or use another --out") from None
  there, here = dict(_leaves(found)), dict(_leaves(config))
  differences = [
    f"  {key}: {there.get(key, 'absent')} there, {here.get(key, 'absent')} now"
    for key in sorted(there.keys() | here.keys(), key=lambda key: (not key.startswith("settings."), key))
    if there.get(key) != here.get(key)
  ]
  if differences:
    shown = differences[:SHOWN]
    if more := len(differences) - len(shown):
      shown.append(f"  (+{more} more)")
    raise ConfigError(
      "\n".join(
        [f"{path} is of a run with other settings:", *shown, "use another --out, or its settings again"]
      )
    )
  return files.digest(config)


def _leaves(value, prefix: str = ""):
  """(dotted key, JSON text) of every leaf; text, as 1, 1.0 and true differ as settings but not in Python."""
  if isinstance(value, dict) and value:
    for key, item in value.items():
      yield from _leaves(item, f"{prefix}.{key}" if prefix else key)
  else:
    yield prefix, json.dumps(value)


class Ledger:
  """The append-only record of finished groups: {"group", "config", "rows"}, one line each, in `path`.

  A line is written by one write and synced, so a kill leaves at most one line without its newline, the last;
  opening drops it. `done` maps a group's name to its rows. A group that has failed rows may be recorded again
  (the later line counts); any other repetition, a damaged line, or a line of another configuration raises
  CheckpointError that names file and line. One process at a time: hold `files.Lock` on the directory.
  """

  def __init__(self, path: str | os.PathLike, config_digest: str):
    self.path = Path(path)
    self.config_digest = config_digest
    self.done: dict[str, list[dict]] = {}
    if not self.path.exists():
      files.write_bytes(self.path, b"")
    data = self.path.read_bytes()
    self._size = data.rfind(b"\n") + 1
    if self._size < len(data):
      os.truncate(self.path, self._size)
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
      self._read(number, line)

  def finished(self, group: str) -> bool:
    """Whether the group is recorded with no failed row: there is nothing left to compute."""
    return group in self.done and all(row["status"] != "failed" for row in self.done[group])

  def record(self, group: str, rows: list[dict]) -> None:
    """Appends a group; when it returns the rows are on disk. If the write fails nothing of it stays."""
    assert not self.finished(group), f"group {group!r} is recorded already"
    problems = [problem for row in rows if (problem := rows_lib.problem(row))]
    assert rows and not problems, f"group {group!r}: {problems or 'no rows'}"
    entry = {"group": group, "config": self.config_digest, "rows": rows}
    line = (json.dumps(entry, allow_nan=False) + "\n").encode()
    append = functools.partial(files.write_and_sync, self.path, os.O_WRONLY | os.O_APPEND)
    failpoint("line_half", lambda: append(line[: len(line) // 2]))
    try:
      append(line)
    except OSError as e:
      os.truncate(self.path, self._size)
      raise files.naming(self.path, e) from e
    self._size += len(line)
    self.done[group] = rows

  def _read(self, number: int, line: bytes) -> None:
    where = f"{self.path}, line {number}"
    try:
      entry = json.loads(line)
      group, config, rows = entry["group"], entry["config"], entry["rows"]
      problems = [problem for row in rows if (problem := rows_lib.problem(row))]
    except (ValueError, TypeError, KeyError):
      problems = ["not a line of this ledger"]
    if problems:
      raise CheckpointError(f"{where}: damaged ({problems[0]}); delete the line to compute its group again")
    if config != self.config_digest:
      raise CheckpointError(f"{where}: computed under other settings than config.json's; use another --out")
    if self.finished(group):
      raise CheckpointError(f"{where}: group {group!r} stands there twice; delete one of the lines")
    self.done[group] = rows


def run_groups(
  groups: Sequence[Group],
  ledger: Ledger,
  compute: Callable[[Group], list[dict]],
  on_done: Callable[[Group, list[dict]], None] | None = None,
  stop: StopFlag | None = None,
) -> int:
  """Computes and records, in order, every group that the ledger has not; returns how many cells have failed.

  `compute(group)` gives one row for each of `group.cells`, in their order (see `rows.ok`). An exception in it
  makes the group's rows "failed" with the reason (and shows the traceback, unless it is a JaxllmError), and
  the rest goes on; the same command tries failed groups again. Stopped, KeyboardInterrupt and OSError end the
  run, as they are no property of the cells.
  `on_done(group, rows)` is called after each record; `stop.check()` before each group. Raises CheckpointError,
  before anything is computed, if a finished group was recorded with other cells.
  """
  assert len({group.name for group in groups}) == len(groups), "two groups have one name"
  for group in groups:
    if ledger.finished(group.name) and _cells(ledger.done[group.name]) != list(group.cells):
      raise CheckpointError(
        f"{ledger.path}: group {group.name!r} was recorded by another version of the sweep; use another --out"
      )
  for group in groups:
    if ledger.finished(group.name):
      continue
    if stop is not None:
      stop.check()
    try:
      rows = compute(group)
      _check_rows(group, rows)
    except OSError:
      raise
    except Exception as e:
      if not isinstance(e, JaxllmError):
        traceback.print_exc()
      reason = _one_line(e)
      rows = [rows_lib.failed(cell, reason) for cell in group.cells]
    ledger.record(group.name, rows)
    if on_done is not None:
      on_done(group, rows)
  return sum(row["status"] == "failed" for group in groups for row in ledger.done[group.name])


def _cells(rows: list[dict]) -> list[dict]:
  return [{name: item for name, item in row.items() if name not in rows_lib.OUTCOME} for row in rows]


def _check_rows(group: Group, rows: list[dict]) -> None:
  cells = _cells(rows)
  assert cells == list(group.cells), f"{group.name}: rows for {cells}, asked for {list(group.cells)}"
  problems = [problem for row in rows if (problem := rows_lib.problem(row))]
  assert not problems, f"{group.name}: {problems[0]}"


def _one_line(error: Exception) -> str:
  """'Type: message' on a line of at most 300 characters, without addresses: a re-run writes equal bytes."""
  text = re.sub(r"\b0x[0-9a-fA-F]{6,}\b", "0x...", " ".join(str(error).split()))
  text = f"{type(error).__name__}: {text}" if text else type(error).__name__
  return text if len(text) <= 300 else text[:297] + "..."
