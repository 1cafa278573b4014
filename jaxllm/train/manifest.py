"""What a saved step consists of: its files with their SHA-256, and the arrays in them by name, shape and type."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import errno
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxllm.errors import CheckpointError
from jaxllm.train import disk

NAME = "manifest.json"
"""In the directory of the step, so that it goes where the step is copied to."""
FORMAT = 1
_CHUNK = 1 << 20
_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.ELOOP)
"""Errors of the system on reading that say something of what is on disk; all others are of this process."""
_SHOWN = 4


@dataclasses.dataclass(frozen=True)
class Manifest:
  """A step as it was written.

  files: {path in the step's directory: {"bytes", "sha256"}}.  state: {name of an array: its type and shape, as `kind` has it}.
  about: what helps to understand a run later (version of jax, mesh, digest of the configuration); nothing is checked by it.
  """

  step: int
  files: Mapping[str, Mapping[str, Any]]
  state: Mapping[str, str]
  about: Mapping[str, Any]

  def text(self) -> bytes:
    """The file: one spelling for each value and the SHA-256 of all of it, so that every changed bit shows."""
    body = {"format": FORMAT, **dataclasses.asdict(self)}
    return _spelled({**body, "sha256": hashlib.sha256(_spelled(body)).hexdigest()})


def write(directory: Path, step: int, state: Any, about: Mapping[str, Any]) -> None:
  """Waits until all files of a step are on disk, and writes down what they are."""
  names = _files(directory)
  with _threads(names) as threads:
    found = list(threads.map(lambda name: _summed(directory / name, synced=True), names))
  for path in (directory, *(each for each in directory.rglob("*") if each.is_dir())):
    disk.sync(path)
  manifest = Manifest(step, dict(zip(names, found, strict=True)), kinds(state), about)
  disk.write_whole(directory / NAME, manifest.text())


def verified(directory: Path, step: int) -> Manifest:
  """The manifest of a step, every one of whose files is as it was written.

  Raises CheckpointError for a manifest that is missing, changed or another step's, and for files that are missing, changed or
  not of the step (names that begin with a dot, which file managers leave, are let be); OSError where this process may not read.
  """
  manifest = _read(directory / NAME)
  if manifest.step != step:
    raise CheckpointError(
      f"{directory / NAME}: found step {manifest.step}, expected {step}; give the directory its name again"
    )
  with _threads(manifest.files) as threads:
    found = threads.map(lambda item: _problem(directory, *item), manifest.files.items())
    problems = [problem for problem in found if problem is not None]
  others = [name for name in _files(directory) if name not in manifest.files]
  problems += [
    f"{name}: not a file of this step; remove it"
    for name in others
    if not any(part.startswith(".") for part in Path(name).parts)
  ]
  if problems:
    more = f" (and {len(problems) - _SHOWN} more)" if len(problems) > _SHOWN else ""
    raise CheckpointError("; ".join(f"{directory}/{problem}" for problem in problems[:_SHOWN]) + more)
  return manifest


def kinds(state: Any) -> dict[str, str]:
  """{name: type and shape} of all arrays of a state."""
  return {plain(path): kind(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def plain(path) -> str:
  """A path as text that is the same for attributes, keys and indices: Orbax gives named tuples back as dicts."""
  return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def kind(leaf) -> str:
  """The type and shape of an array, as in float32[2, 3]."""
  return f"{leaf.dtype}{list(leaf.shape)}"


def _files(directory: Path) -> list[str]:
  """Names, in the directory, of all in it that is no directory, but for the manifest."""
  found = []
  for parent, inner, names in os.walk(directory):
    inner.sort()
    found += [Path(parent, name).relative_to(directory).as_posix() for name in sorted(names)]
  return [name for name in found if name not in (NAME, f".{NAME}.tmp")]


def _threads(names) -> concurrent.futures.ThreadPoolExecutor:
  return concurrent.futures.ThreadPoolExecutor(max(1, min(len(names), os.cpu_count() or 1)))


def _summed(path: Path, synced: bool = False) -> dict[str, Any]:
  state, size, buffer = hashlib.sha256(), 0, memoryview(bytearray(_CHUNK))
  with open(path, "rb", buffering=0) as file:
    while count := file.readinto(buffer):
      state.update(buffer[:count])
      size += count
    if synced:
      os.fsync(file.fileno())
  return {"bytes": size, "sha256": state.hexdigest()}


def _problem(directory: Path, name: str, wanted: Mapping[str, Any]) -> str | None:
  path = directory / name
  try:
    if not path.is_file():  # a pipe would never end
      return f"{name}: {'not a regular file' if path.exists() else 'missing'}"
    if (size := path.stat().st_size) != wanted["bytes"]:
      return f"{name}: found {size} bytes, expected {wanted['bytes']}"
    found = _summed(path)
  except OSError as e:
    if e.errno not in _DAMAGE:
      raise
    return f"{name}: {e.strerror}"
  return (
    None if found == wanted else f"{name}: found the SHA-256 {found['sha256']}, expected {wanted['sha256']}"
  )


def _read(path: Path) -> Manifest:
  if not path.is_file():
    raise CheckpointError(f"{path}: {'not a regular file' if path.exists() else 'missing'}")
  raw = path.read_bytes()
  try:
    value = json.loads(raw)
    manifest = Manifest(**{field.name: value[field.name] for field in dataclasses.fields(Manifest)})
    same = manifest.text() == raw
  except (ValueError, TypeError, KeyError, RecursionError):
    same = False
  if not same:
    raise CheckpointError(f"{path}: changed since it was written")
  return manifest


def _spelled(value: Any) -> bytes:
  return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
