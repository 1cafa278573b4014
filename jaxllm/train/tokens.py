"""Text as token ids in a file that is mapped, not read: a byte file, or a .bin with a header of JSON beside it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from jaxllm.errors import DataError

BYTES = 256
"""The vocabulary of a byte file."""
TYPES = {"uint8": np.uint8, "uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_FIELDS = {"dtype": str, "vocab_size": int, "tokens": int, "separator": int, "tokenizer": str, "sha256": str}
_REQUIRED = ("dtype", "vocab_size", "tokens")
_CHUNK = 1 << 24
"""Tokens looked at together where all of a file is."""


@dataclasses.dataclass(frozen=True)
class Text:
  """Token ids, [tokens] of unsigned integers, most often of a mapped file.

  separator: the id that ends each document (None: they are not told apart).  source: the file, for errors.  about: what
  it is, for the record of a run.
  """

  ids: np.ndarray
  vocab_size: int
  separator: int | None = None
  source: str = "text"
  about: dict = dataclasses.field(default_factory=dict)

  def __len__(self) -> int:
    return len(self.ids)

  def read(self, start: int, size: int) -> np.ndarray:
    """The ids from `start` on, int32 [size].  Raises DataError for one that is not in the vocabulary."""
    ids = np.asarray(self.ids[start : start + size])
    if (beyond := ids >= self.vocab_size).any():
      at = start + int(np.argmax(beyond))
      width = self.ids.dtype.itemsize
      raise DataError(
        f"{self.source}: token {at} (at byte {at * width}) is {self.ids[at]}, expected an id below {self.vocab_size}, the "
        "vocabulary; the file is damaged, or its header is of another one"
      )
    return ids.astype(np.int32)

  def chunks(self) -> Iterator[tuple[int, np.ndarray]]:
    """(place of the first, int32 ids) of all of the text, some at a time."""
    for start in range(0, len(self), _CHUNK):
      yield start, self.read(start, _CHUNK)

  @functools.cached_property
  def sha256(self) -> str:
    """Of the ids as they are stored, all of which are read.  Raises DataError for another than the header has."""
    digest = hashlib.sha256()
    for start in range(0, len(self), _CHUNK):
      digest.update(self.ids[start : start + _CHUNK].tobytes())
    found, expected = digest.hexdigest(), self.about.get("sha256")
    # what a header does not say of is another's record, such as a corpus of which this is a part
    if expected not in (None, found) and "dtype" in self.about:
      raise DataError(
        f"{self.source}: its SHA-256 is {found}, expected {expected}, as its header says; the file is damaged or another; "
        "tokenize the text again"
      )
    return found

  def check(self) -> None:
    """Read all of the text: DataError for an id that is not in the vocabulary, and for another SHA-256 than the header has."""
    for _ in self.chunks():
      pass
    assert self.sha256


def open_text(path: str | os.PathLike, separator: int | None = None) -> Text:
  """The tokens of a file, mapped into memory, so that it may be larger than that.

  NAME.bin has the ids, little-endian, and NAME.json says what they are:
  {"dtype": "uint8" | "uint16" | "uint32", "vocab_size", "tokens": their number, and where known "separator": the id at the end
  of each document, "tokenizer": what made them, "sha256": of NAME.bin}.  Any other file is its bytes, a vocabulary of 256;
  `separator` is for that.

  Raises DataError for a .bin without a header, a header that does not say this, a file of another size than that of its tokens,
  and an empty one; OSError for what cannot be read.
  """
  path = Path(path)
  name = printable(path)
  size = _size(path)
  if path.suffix != ".bin":
    header = {"dtype": "uint8", "vocab_size": BYTES, "tokens": size}
    header |= {} if separator is None else {"separator": separator}
  elif separator is not None:
    raise DataError(f"{name}: separator {separator} was given, but its header says which; leave it out")
  else:
    header = _header(path.with_suffix(".json"))
  dtype = np.dtype(TYPES[header["dtype"]])
  if size == 0:
    raise DataError(f"{name}: found 0 bytes, expected tokens; give a file with text")
  if size != header["tokens"] * dtype.itemsize:
    odd = f", the last {size % dtype.itemsize} of which are no whole token" if size % dtype.itemsize else ""
    raise DataError(
      f"{name}: found {size} bytes{odd}, expected {header['tokens'] * dtype.itemsize}, as its header says {header['tokens']} "
      f"tokens of {header['dtype']}; the file was cut or is another: copy or tokenize it again"
    )
  if (end := header.get("separator")) is not None and not 0 <= end < header["vocab_size"]:
    raise DataError(
      f"{name}: the separator is {end}, expected an id from 0 to {header['vocab_size'] - 1}, the vocabulary"
    )
  ids = np.memmap(path, dtype, mode="r")
  return Text(ids, header["vocab_size"], header.get("separator"), name, {"source": name, **header})


def write_text(
  path: str | os.PathLike,
  documents: Iterable[Sequence[int]],
  vocab_size: int,
  separator: int | None = None,
  tokenizer: str | None = None,
) -> dict:
  """Write documents, each ended by `separator`, as `path` (a .bin) and its header, which is returned.

  The file is written aside and renamed, and the header comes last, so that a run that was stopped leaves none.
  Raises DataError for an id that is not in the vocabulary, and where there is nothing to write.
  """
  path = Path(path)
  if path.suffix != ".bin":
    raise DataError(f"{printable(path)}: found the ending {path.suffix!r}, expected .bin")
  beside = path.with_suffix(".json")
  kind = "uint16" if vocab_size <= 1 << 16 else "uint32"
  count, digest, aside = 0, hashlib.sha256(), path.with_suffix(".bin.partial")
  beside.unlink(missing_ok=True)
  try:
    with open(aside, "wb") as file:
      for number, document in enumerate(documents):
        ids = np.asarray([*document] if separator is None else [*document, separator], np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
          wrong = int(ids[(ids < 0) | (ids >= vocab_size)][0])
          raise DataError(
            f"document {number}: found the id {wrong}, expected one from 0 to {vocab_size - 1}, the vocabulary"
          )
        data = ids.astype(TYPES[kind]).tobytes()
        digest.update(data)
        count += len(ids)
        file.write(data)
      file.flush()
      os.fsync(file.fileno())
    if count == 0:
      raise DataError(f"{printable(path)}: 0 tokens to write; give documents with text")
    os.replace(aside, path)
  finally:
    aside.unlink(missing_ok=True)
  header = {"dtype": kind, "vocab_size": vocab_size, "tokens": count, "sha256": digest.hexdigest()}
  header |= {name: x for name, x in (("separator", separator), ("tokenizer", tokenizer)) if x is not None}
  temporary = path.with_suffix(".json.partial")
  temporary.write_text(json.dumps(header, indent=2) + "\n")
  os.replace(temporary, beside)
  return header


def printable(name: str | os.PathLike) -> str:
  """A file name for messages and reports, which are UTF-8; names on disk are any bytes."""
  return os.fsencode(name).decode("utf-8", "backslashreplace")


def _size(path: Path) -> int:
  found = path.stat()
  if not stat.S_ISREG(found.st_mode):
    raise DataError(f"{printable(path)}: not a regular file; give the file of the text")
  return found.st_size


def _header(path: Path) -> dict:
  name = printable(path)
  example = '{"dtype": "uint16", "vocab_size": 50257, "tokens": 1000}'
  if not path.exists():
    raise DataError(f"{name}: no such header of a token file; write what its ids are, as in {example}")
  _size(path)
  try:
    header = json.loads(path.read_bytes()[: 1 << 20])
  except (ValueError, RecursionError) as e:
    raise DataError(f"{name}: not JSON ({str(e)[:100]}), expected the like of {example}") from None
  if not isinstance(header, dict):
    raise DataError(f"{name}: found a JSON {type(header).__name__}, expected the like of {example}")
  header = {key: value for key, value in header.items() if value is not None}
  for key, value in header.items():
    if key not in _FIELDS:
      raise DataError(f"{name}: found the key {key[:100]!r}, expected some of {', '.join(_FIELDS)}")
    if type(value) is not _FIELDS[key]:
      raise DataError(
        f"{name}: {key} is {str(value)[:100]!r}, expected {'text' if _FIELDS[key] is str else 'a whole number'}"
      )
  if lost := [key for key in _REQUIRED if key not in header]:
    raise DataError(f"{name}: {', '.join(lost)} missing, expected the like of {example}")
  if header["dtype"] not in TYPES:
    raise DataError(f"{name}: dtype is {header['dtype'][:100]!r}, expected one of {', '.join(TYPES)}")
  if not 1 <= header["vocab_size"] < 1 << 31:
    raise DataError(f"{name}: vocab_size is {header['vocab_size']}, expected from 1 to 2^31 - 1")
  if not 0 <= header["tokens"] < 1 << 60:
    raise DataError(f"{name}: tokens is {header['tokens']}, expected the number of ids in the file")
  return header
