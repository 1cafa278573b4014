"""What a single file of a model directory may be: a regular file of that directory, and JSON that is read strictly."""

from __future__ import annotations

import collections
import json
import math
import os
import reprlib
import stat
from pathlib import Path
from typing import Any, BinaryIO

from jaxllm.errors import CheckpointError, JaxllmError

JSON_LIMIT = 64 << 20
SETTINGS_LIMIT = 4 << 20
"""Bytes of config.json, of generation_config.json, of a template: no model's come near; indexes and tokenizers are larger."""
NAME_LIMIT = 512


def read_json(path: str | os.PathLike, error: type[JaxllmError], most: int = JSON_LIMIT) -> dict[str, Any]:
  """The object of a JSON file; anything else, a key twice, NaN or an infinity is an `error` that names the file and the key."""
  path = Path(path)
  value = parse_json(read_bytes(path, error, most), str(path), error)
  if not isinstance(value, dict):
    raise error(f"{path}: found a JSON {type(value).__name__}, expected an object")
  return value


def read_bytes(path: Path, error: type[JaxllmError], most: int) -> bytes:
  """All of a file of at most so many bytes."""
  with open_plain(path, error) as file:
    size = os.fstat(file.fileno()).st_size
    if size > most:
      raise error(f"{path}: found {size:,} bytes, expected at most {most:,}; fetch the file again")
    return file.read(most)


def open_plain(path: Path, error: type[JaxllmError] = CheckpointError) -> BinaryIO:
  """A regular file, open for reading; an `error` where it is none by now, never a wait for one, or may not be read."""
  try:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
  except OSError as e:
    raise error(f"{path}: cannot be read ({e.__class__.__name__}: {e.strerror})") from None
  if not stat.S_ISREG(os.fstat(fd).st_mode):
    os.close(fd)
    raise error(f"{path}: not a regular file; put the file itself there")
  return open(fd, "rb")


def parse_json(data: bytes, source: str, error: type[JaxllmError]) -> Any:
  """The value of JSON in UTF-8, as `read_json` says."""

  def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
    plain = dict(items)
    if len(plain) < len(items):
      twice = collections.Counter(name for name, _ in items).most_common(1)[0][0]
      raise error(f"{source}: found the key {twice[:100]!r} twice, expected it once")
    return plain

  def constant(text: str) -> None:
    raise error(f"{source}: found {text[:100]}, expected finite numbers, as JSON has no other")

  def number(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else constant(text)  # 1e999

  try:
    return json.loads(data.decode(), object_pairs_hook=pairs, parse_constant=constant, parse_float=number)
  except error:
    raise
  # not UTF-8, not JSON, numbers of thousands of digits, nested too deep
  except (ValueError, RecursionError) as e:
    raise error(f"{source}: not JSON ({str(e)[:100]}); fetch the file again") from None


def plain_file(directory: Path, name: str) -> Path:
  """The path of a regular file of the directory; CheckpointError for anything else, which is not opened.

  A symbolic link may lead elsewhere in the directory or, in a hub cache, from models--<name>/snapshots/<revision> to its blobs.
  """
  path = directory / name
  try:
    real, home = path.resolve(strict=True), directory.resolve()
    mode = real.stat().st_mode
  except (OSError, RuntimeError) as e:
    raise CheckpointError(f"{path}: cannot be read ({e.__class__.__name__}: {str(e)[:200]})") from None
  if not stat.S_ISREG(mode):
    raise CheckpointError(f"{path}: not a regular file; put the file itself there")
  roots = [home] + ([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])
  if not any(real.is_relative_to(root) for root in roots):
    raise CheckpointError(
      f"{path}: a link to {real}, outside of the model's directory; put the file itself there"
    )
  return path


def odd_name(name: str) -> str | None:
  """What is wrong with the name of a tensor, in words; None: nothing.  What does not print could rewrite a terminal."""
  size = len(name.encode(errors="surrogatepass"))
  if size > NAME_LIMIT:
    return f"a name of {size} bytes, expected at most {NAME_LIMIT}"
  return None if name.isprintable() else "a name with characters that do not print"


def brief(value: Any) -> str:
  """A value nearly as JSON has it, cut where it is long or deep."""
  if value is None or isinstance(value, bool):
    return {None: "null", True: "true", False: "false"}[value]
  return _BRIEF.repr(value)


class _Brief(reprlib.Repr):
  """Python writes no number of more than 4300 digits."""

  def __init__(self):
    super().__init__()
    self.maxlevel, self.maxstring, self.maxother = 3, 80, 80

  def repr_int(self, x: int, level: int) -> str:
    return super().repr_int(x, level) if abs(x) <= 10**30 else "a number of very many digits"


_BRIEF = _Brief()
