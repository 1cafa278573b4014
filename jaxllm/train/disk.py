"""What a checkpoint asks of a file system: files that are whole or absent, names that last, room, and errors by number."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from jaxllm.failpoint import failpoint

ROOM = 1.5
"""Free bytes that a save asks for, over those of the state: files of metadata, and blocks that are not full."""


def write_whole(path: Path, data: bytes) -> None:
  """A file that is there with all of `data`, or as it was before: temporary file, fsync, rename, fsync of the directory."""
  temporary = path.with_name(f".{path.name}.tmp")
  half = len(data) // 2
  try:
    with open(temporary, "wb", buffering=0) as file:
      failpoint("file_half", lambda: file.write(data[:half]))
      left = memoryview(data)
      while left:
        left = left[file.write(left) :]
      os.fsync(file.fileno())
    failpoint("file_written")
    os.replace(temporary, path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise
  failpoint("file_renamed")
  sync(path.parent)


def sync(path: Path) -> None:
  """Waits until a file's contents, or the names in a directory, are on disk."""
  fd = os.open(path, os.O_RDONLY)
  try:
    os.fsync(fd)
  finally:
    os.close(fd)


def free_bytes(directory: Path) -> int | None:
  """Bytes that this user may still write there; None where the file system does not tell."""
  found = os.statvfs(directory)
  return found.f_bavail * found.f_frsize if found.f_blocks else None


def check_room(directory: Path, size: int) -> None:
  """Raises OSError, with the bytes needed and free, where there is no room for a checkpoint of `size` bytes."""
  free = free_bytes(directory)
  if free is not None and free < ROOM * size:
    raise refusal(errno.ENOSPC, directory, size)


def refusal(
  code: int | None, directory: Path, size: int | None = None, cause: Exception | None = None
) -> OSError:
  """The system's error about a directory; of space, with the bytes that a state of `size` needs and those that are free.

  code None: an error of input or output, in the words of its cause.
  """
  if code is None:
    said = (str(cause).splitlines() or [""])[0][:200]
    return OSError(errno.EIO, f"{os.strerror(errno.EIO)} ({type(cause).__name__}: {said})", str(directory))
  text = os.strerror(code)
  if size is not None and code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
    free = free_bytes(directory)
    text += f": a checkpoint takes {ROOM * size:.0f} bytes ({ROOM} times the state), "
    text += "and how many are free is not known" if free is None else f"and {free} are free"
  return OSError(code, text, str(directory))


def number(error: Exception) -> int | None:
  """The system's error number; the formats below Orbax have it in their text only."""
  if isinstance(error, OSError):
    return error.errno
  if found := re.search(r"os_error_code\W*(\d+)", str(error)):
    return int(found[1])
  return errno.ENOSPC if "No space left" in str(error) else None
