"""The files of a directory, safetensors among them, written whole or not at all."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.errors import CheckpointError
from jaxllm.failpoint import failpoint
from jaxllm.hf import files, header, scan, sums
from jaxllm.hf.tokenizer import FILES

SHARD = re.compile(r"model(-[0-9]{5}-of-[0-9]{5})?\.safetensors(\.index\.json)?")
_NAMES = {dtype: name for name, dtype in header.DTYPES.items()}
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Entry:
  """A tensor to be written; `read` gives its values, in memory of their own."""

  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  read: Callable[[], np.ndarray]

  @property
  def nbytes(self) -> int:
    """Its bytes in the file."""
    return math.prod(self.shape) * self.dtype.itemsize


def shards_of(entries: Sequence[Entry], most: int) -> dict[str, list[Entry]]:
  """{file name: its tensors}: as many to a file as fit; inside a file wider types first, as they are written."""
  shards: list[list[Entry]] = [[]]
  room = most
  for entry in entries:
    if shards[-1] and entry.nbytes > room:
      shards.append([])
      room = most
    shards[-1].append(entry)
    room -= entry.nbytes
  ordered = [sorted(shard, key=lambda entry: (-entry.dtype.itemsize, entry.name)) for shard in shards]
  if len(ordered) == 1:
    return {files.SINGLE: ordered[0]}
  return {f"model-{i:05}-of-{len(ordered):05}.safetensors": shard for i, shard in enumerate(ordered, 1)}


def write(
  directory: Path, shards: Mapping[str, Sequence[Entry]], texts: Mapping[str, bytes], stale: Sequence[str]
) -> None:
  """Writes the shards' tensors and the texts, {file name: bytes}, with the sums of all, and removes what they replace.

  Complete under temporary names first, and config.json, without which a directory is no model, gets its name last.
  stale: names of other files of an older save that are removed.  Raises CheckpointError for a directory that another save
  writes to, that is a file, or that has a directory in place of a file.
  """
  names = [sums.NAME, *shards, *texts]
  pieces = {name: _safetensors(entries) for name, entries in shards.items()}
  pieces |= {name: [data] for name, data in texts.items()}
  with locked(directory):
    _check_targets(directory, names)
    kept = sorted(name for name in FILES if not stale and os.path.lexists(directory / name))
    if kept:
      _log.warning(
        "%s: keeps %s, which are not of this save: no tokenizer was given", directory, ", ".join(kept)
      )
    begun = False
    try:
      digests = {name: write_file(_temporary(directory, name), each) for name, each in pieces.items()}
      write_file(_temporary(directory, sums.NAME), [sums.text(digests)])
      begun = True
      (directory / files.CONFIG).unlink(missing_ok=True)
      _sync(directory)
      for name in names[:-1]:
        os.replace(_temporary(directory, name), directory / name)
        failpoint("export_renamed")
      for old in directory.iterdir():
        name = old.name.removeprefix(".").removesuffix(".tmp")  # of a save before that was killed, too
        if old.name not in names and (SHARD.fullmatch(name) or name in (*stale, files.GENERATION_CONFIG)):
          old.unlink()
      _sync(directory)
      os.replace(_temporary(directory, files.CONFIG), directory / files.CONFIG)  # the last
      _sync(directory)
    except BaseException:
      if begun:
        _log.error(
          "%s: the save was interrupted while its files got their names; those that have not are complete under .<name>.tmp: "
          "rename them, %s the last, or save again",
          *(directory, files.CONFIG),
        )
      else:
        for name in names:
          _temporary(directory, name).unlink(missing_ok=True)
      raise


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
  """The directory, made where it is missing, is this save's alone; a file system without locks has none."""
  try:
    directory.mkdir(parents=True, exist_ok=True)
  except (FileExistsError, NotADirectoryError):
    raise CheckpointError(
      f"{directory}: a file, or in one, expected a directory to write to; give another"
    ) from None
  fd = os.open(directory, os.O_RDONLY)
  try:
    try:
      fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise CheckpointError(
        f"{directory}: another save is writing to it; wait for its end, or give another"
      ) from None
    except OSError as e:
      _log.info("%s: no lock (%s); two saves at once would be in each other's way", directory, e)
    yield
  finally:
    os.close(fd)


def _check_targets(directory: Path, names: Collection[str]) -> None:
  """Raises CheckpointError for a directory under the name of a file that is to be written, or of an older one to be removed."""
  for path in directory.iterdir():
    if (path.name in names or SHARD.fullmatch(path.name)) and path.is_dir():
      raise CheckpointError(f"{path}: found a directory, expected a file or nothing; remove it")


def _temporary(directory: Path, name: str) -> Path:
  return directory / f".{name}.tmp"


def header_of(entries: Sequence[Entry]) -> bytes:
  """What a safetensors file begins with, as long as a multiple of 64 bytes."""
  plain: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
  place = 0
  for entry in entries:
    offsets = [place, place + entry.nbytes]
    plain[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
    place += entry.nbytes
  text = json.dumps(plain, separators=(",", ":")).encode()
  text += b" " * (-(len(text) + 8) % scan.ALIGNMENT)
  return len(text).to_bytes(8, "little") + text


def _safetensors(entries: Sequence[Entry]) -> Iterator[bytes | memoryview]:
  """The pieces of a safetensors file."""
  yield header_of(entries)
  for entry in entries:
    x = entry.read()
    assert (x.shape, x.dtype) == (entry.shape, entry.dtype), f"{entry.name}: {x.dtype} {x.shape}"
    yield x.reshape(-1).view(np.uint8).data


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> str:
  """The SHA-256 of what was written, which is taken while it is written, into a new file: never through a link."""
  state = hashlib.sha256()
  path.unlink(missing_ok=True)
  with open(path, "xb") as file, concurrent.futures.ThreadPoolExecutor(1) as thread:
    for piece in pieces:
      hashed = thread.submit(state.update, piece)
      file.write(piece)
      hashed.result()
      failpoint("piece_exported")
    file.flush()
    os.fsync(file.fileno())
  return state.hexdigest()


def _sync(directory: Path) -> None:
  """Waits until the names in it are on disk."""
  fd = os.open(directory, os.O_RDONLY)
  try:
    os.fsync(fd)
  finally:
    os.close(fd)
