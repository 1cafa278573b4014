"""Whether the files of a model directory are the ones that were written: SHA-256 sums beside them, or blobs named by theirs."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import os
import re
import threading
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from jaxllm.errors import CheckpointError
from jaxllm.hf.plain import brief, open_plain, plain_file, read_bytes

NAME = "SHA256SUMS"
"""The file of sums, as `sha256sum -c` reads it: a line a file, 64 hexadecimal digits, two spaces, its name."""
LIMIT = 4 << 20
CHUNK = 1 << 20
_LINE = re.compile(r"([0-9a-f]{64}) [ *]([\w-][\w.-]{0,254})", re.ASCII)
_BLOB = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")


@dataclasses.dataclass(frozen=True)
class Sums:
  """{name: digest} of files of a directory, and where they are from: SHA256SUMS, or None for the names of a hub cache's blobs.

  A digest of 64 digits is the SHA-256 of the bytes; one of 40 is git's, the SHA-1 of "blob <size>\\0" and the bytes.
  """

  directory: Path
  digests: Mapping[str, str] = dataclasses.field(default_factory=dict)
  path: Path | None = None

  def require(self, names: Collection[str]) -> None:
    """Raises CheckpointError for files that are read and that SHA256SUMS does not list."""
    if self.path is not None and (others := sorted(set(names) - self.digests.keys())):
      raise CheckpointError(
        f"{self.path}: does not list {', '.join(others[:5])}, which is to be read; remove what is not the model's, or "
        f"{self._renew()}"
      )

  def check(self, names: Collection[str] | None = None) -> None:
    """Raises CheckpointError for all of the files (None: all that have a sum) that are missing or have another sum."""
    with self.checking(names):
      pass

  @contextlib.contextmanager
  def checking(self, names: Collection[str] | None = None) -> Iterator[None]:
    """`check` beside what is done inside, in threads; its error comes in place of a CheckpointError from there."""
    names = [name for name in self.digests if names is None or name in names]
    if missing := [name for name in names if not os.path.lexists(self.directory / name)]:
      raise CheckpointError(
        f"{self._source()}: lists {', '.join(missing[:5])}, not there; fetch the files again"
      )
    stop = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(max(1, min(len(names), os.cpu_count() or 1))) as threads:
      jobs = [threads.submit(self._problem, name, stop) for name in names]
      try:
        yield
      except CheckpointError:
        self._raise_first(jobs)
        raise
      except BaseException:
        stop.set()
        raise
      self._raise_first(jobs)

  def _raise_first(self, jobs: list[concurrent.futures.Future]) -> None:
    problems = [problem for job in jobs if (problem := job.result()) is not None]
    if problems:
      fetch = "fetch them again" if self.path is None else f"fetch them and {NAME} again"
      raise CheckpointError(
        f"{self.directory}: not the files that were saved; {fetch}, or, where the change is yours, {self._renew()}\n  "
        + "\n  ".join(problems)
      ) from None

  def _problem(self, name: str, stop: threading.Event) -> str | None:
    found, wanted = digest(plain_file(self.directory, name), self.digests[name], stop), self.digests[name]
    if found in (wanted, None):
      return None
    kind = "SHA-256" if len(wanted) == 64 else "git's SHA-1"
    return f"{name}: found the {kind} {found}, expected {wanted}, by {self._source()}"

  def _source(self) -> str:
    return "the name of its blob" if self.path is None else str(self.path)

  def _renew(self) -> str:
    return "load with verify=False" + ("" if self.path is None else f", or remove {NAME}")


def of(directory: Path) -> Sums:
  """The sums that are kept of the files of a directory: those of its SHA256SUMS or, in a hub cache, of its blobs' names.

  None of them where there is neither.  Raises CheckpointError for a SHA256SUMS that is not one.
  """
  if os.path.lexists(directory / NAME):
    return _listed(directory)
  blobs = directory.resolve().parent.parent / "blobs"
  digests = {}
  if directory.resolve().parent.name == "snapshots" and blobs.is_dir():
    for path in sorted(directory.iterdir()):
      try:
        real = path.resolve()
      except (
        OSError,
        RuntimeError,
      ):  # links in a circle, of which `plain_file` tells where they are to be read
        continue
      if path.is_symlink() and real.parent == blobs and _BLOB.fullmatch(real.name) and real.is_file():
        digests[path.name] = real.name
  return Sums(directory, digests)


def _listed(directory: Path) -> Sums:
  path = plain_file(directory, NAME)
  digests: dict[str, str] = {}
  for number, line in enumerate(
    read_bytes(path, CheckpointError, LIMIT).decode(errors="replace").splitlines(), 1
  ):
    found = _LINE.fullmatch(line)
    if found is None or found[2] in (NAME, *digests):
      raise CheckpointError(
        f"{path}: line {number}: found {brief(line)}, expected the 64 hexadecimal digits of a SHA-256, two spaces and the "
        "plain name of a file, each once; remove the file, or fetch it again"
      )
    digests[found[2]] = found[1]
  if not digests:
    raise CheckpointError(
      f"{path}: found no sums, expected a line a file; remove the file, or fetch it again"
    )
  return Sums(directory, digests, path)


def digest(path: Path, like: str, stop: threading.Event | None = None) -> str | None:
  """The digest of a file of the kind that `like` is one of, in hexadecimal digits; None where `stop` is set meanwhile."""
  buffer = memoryview(bytearray(CHUNK))
  with open_plain(path) as file:
    if len(like) == 64:
      state = hashlib.sha256()
    else:
      state = hashlib.sha1(b"blob %d\0" % os.fstat(file.fileno()).st_size, usedforsecurity=False)
    while size := file.readinto(buffer):
      if stop is not None and stop.is_set():
        return None
      state.update(buffer[:size])
  return state.hexdigest()


def text(digests: Mapping[str, str]) -> bytes:
  """The contents of a SHA256SUMS."""
  return "".join(f"{digests[name]}  {name}\n" for name in sorted(digests)).encode()
