"""Files that are whole or absent, the lock of an output directory, and the results tables."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import os
import time
from pathlib import Path

from jaxllm.errors import ConfigError
from jaxllm.failpoint import failpoint
from jaxllm.study import rows as rows_lib


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
  """Replaces the file by `data`: a reader, or a crash, sees the old bytes or the new ones, never a part.

  Temporary file beside it, fsync, rename, fsync of the directory. The temporary file is removed on failure,
  and overwritten by the next write if the process was killed; so a path has one writer at a time (`Lock`).
  Raises OSError that always names `path`.
  """
  path = Path(path)
  temporary = path.with_name(f".{path.name}.tmp")
  try:
    try:
      write_and_sync(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, data)
      os.replace(temporary, path)
    except BaseException:
      temporary.unlink(missing_ok=True)
      raise
    sync_directory(path.parent)
  except OSError as e:
    raise naming(path, e) from e


def write_text(path: str | os.PathLike, text: str) -> None:
  """`write_bytes` of UTF-8 text."""
  write_bytes(path, text.encode())


def write_json(path: str | os.PathLike, value) -> None:
  """`write_bytes` of indented JSON with a final newline; NaN and infinities are refused (ValueError)."""
  write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_and_sync(path: str | os.PathLike, mode: int, data: bytes) -> None:
  """Opens with `mode`, writes all of `data`, and waits until the disk has it."""
  fd = os.open(path, mode, 0o666)
  try:
    left = memoryview(data)
    while left:
      left = left[os.write(fd, left) :]
    os.fsync(fd)
  finally:
    os.close(fd)


def naming(path: str | os.PathLike, e: OSError) -> OSError:
  """The same error about `path`: `os.write` names no file, and a temporary file's name tells nothing."""
  return OSError(e.errno, e.strerror, str(path))


def sync_directory(path: str | os.PathLike) -> None:
  """Makes the names in a directory (a file just created or renamed) as durable as the files' contents."""
  fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
  try:
    os.fsync(fd)
  finally:
    os.close(fd)


def digest(value) -> str:
  """SHA-256 of a JSON value, independent of the order of keys: 64 hex digits."""
  text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
  return hashlib.sha256(text.encode()).hexdigest()


class Lock:
  """Holds an output directory (created if need be) for this process, by `flock` on its file LOCK.

  Raises ConfigError that names the directory and the holder's pid if another process has it. The kernel frees
  the lock when the process ends, however it ends, so there is never a stale one to remove.
  """

  def __init__(self, directory: str | os.PathLike):
    self.directory = Path(directory)

  def __enter__(self) -> Lock:
    self.directory.mkdir(parents=True, exist_ok=True)
    path = self.directory / "LOCK"
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
      fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
      failpoint("lock_taken")
      os.ftruncate(fd, 0)
      os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError:
      holder = _holder(fd)
      os.close(fd)
      raise ConfigError(
        f"{self.directory} is in use by process {holder}: wait for that run to end, or use another --out"
      ) from None
    except OSError as e:
      os.close(fd)
      raise naming(path, e) from e
    self._fd = fd
    return self

  def __exit__(self, *_):
    os.close(self._fd)


def _holder(fd: int) -> str:
  """The pid of the holder, which may be about to write it: an empty file or a dead process is read again."""
  for _ in range(50):
    text = os.pread(fd, 32, 0).decode().strip()
    if text.isdigit() and _alive(int(text)):
      return text
    time.sleep(0.01)
  return "unknown"


def _alive(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:  # somebody else's process
    return True
  return True


def write_results(
  out: str | os.PathLike, rows: list[dict], columns: tuple[str, ...] = rows_lib.COLUMNS
) -> None:
  """Writes `results.jsonl` (one flat object a line) and `results.csv`: equal rows give equal bytes.

  Rows stay in the order given and columns in the order of `columns`, which every row has exactly; floats are
  written by `repr`, which reads back as the same number, and None as null or an empty field.
  """
  for row in rows:
    problem = rows_lib.problem(row)
    assert problem is None, f"{problem} in {row}"
    assert set(row) == set(columns), f"columns {sorted(row)} are not {sorted(columns)}"
  ordered = [{name: row[name] for name in columns} for row in rows]
  lines = [json.dumps(row, allow_nan=False) + "\n" for row in ordered]
  sheet = io.StringIO()
  writer = csv.DictWriter(sheet, columns, lineterminator="\n")
  writer.writeheader()
  writer.writerows(ordered)
  write_text(Path(out) / "results.jsonl", "".join(lines))
  write_text(Path(out) / "results.csv", sheet.getvalue())
