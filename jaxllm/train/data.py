"""Byte-level text: the corpus of a run, its split, and batches that are a pure function of (seed, step)."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from jaxllm.errors import DataError
from jaxllm.train.tokens import printable

VOCAB_SIZE = 256
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_VALIDATION = 0.05  # the share of the bytes that whole validation files are to reach
_LARGEST = 1 / 3  # of the validation part may be one file: it is to be like the text, not like a file


@dataclasses.dataclass(frozen=True)
class Corpus:
  """UTF-8 text as bytes, uint8 [bytes], split by file; `about` says what it is, for the record of a run."""

  train: np.ndarray
  validation: np.ndarray
  about: dict


def load_corpus(path: str | None = None) -> Corpus:
  """The text of a file or of all files below a directory; None is the running Python's standard library.

  A twentieth of the text is for validation: whole files, chosen by the hash of their names, or the end of
  the text where files are too few or too uneven for that.  Raises DataError for a file that is not UTF-8 text (with the
  offset) and for a corpus without text, OSError for what cannot be read.
  """
  root, files = _stdlib() if path is None else text_files(Path(path))
  texts, total = _texts(root, files, path or root)
  held_out = _held_out({name: len(text) for name, text in texts.items()}, total)
  if held_out:
    train, validation = (
      b"\n".join(t for n, t in texts.items() if (n in held_out) == is_in) for is_in in (False, True)
    )
  else:
    text = b"\n".join(texts.values())
    cut = len(text) - max(1, len(text) // 20)
    while text[cut] & 0xC0 == 0x80:  # within a character
      cut -= 1
    train, validation = text[:cut], text[cut:]
  about = {
    "source": f"Python {platform.python_version()} standard library" if path is None else printable(path),
    "files": len(texts),
    "bytes": total,
    "split": "by file" if held_out else "the last twentieth of the bytes is for validation",
    "validation_files": len(held_out),
    "train_bytes": len(train),
    "validation_bytes": len(validation),
    "sha256": hashlib.sha256(train + b"\0" + validation).hexdigest(),
  }
  return Corpus(np.frombuffer(train, np.uint8), np.frombuffer(validation, np.uint8), about)


def load_text(path: str) -> tuple[str, dict]:
  """(all text of a file or of the files below a directory, joined by newlines, what it is); raises as `load_corpus` does."""
  texts, total = _texts(*text_files(Path(path)), path)
  text = b"\n".join(texts.values())
  about = {"source": printable(path), "files": len(texts), "bytes": total}
  return text.decode(), about | {"sha256": hashlib.sha256(text).hexdigest()}


def check_size(corpus: Corpus, source: str, train_length: int, test_length: int, windows: int) -> None:
  """Raise DataError unless a training sequence, and windows whose last train_length bytes are apart, can be cut."""
  for part, needed in (("train", train_length + 1), ("validation", test_length + 1 + windows * train_length)):
    found = len(getattr(corpus, part))
    if found < needed:
      raise DataError(
        f"{printable(source)}: {corpus.about['bytes']} bytes give a {part} part of {found}, expected at least {needed} for "
        f"{windows} windows of lengths up to {test_length}; give more text, shorter lengths or fewer windows"
      )


def batch(data: np.ndarray, seed: int, step: int, size: int, length: int) -> np.ndarray:
  """Batch `step` of a run: `size` stretches of length + 1 bytes from anywhere in the text, int32 [size, length + 1].

  A pure function of its arguments, so a resumed run sees what an uninterrupted one does.
  """
  rng = np.random.Generator(np.random.Philox(key=[seed, step]))
  starts = rng.integers(0, len(data) - length, size)
  return data[starts[:, None] + np.arange(length + 1)].astype(np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class Stretches:
  """The batches of a run over bytes: `batch` of each step, for `loop.fit`."""

  text: np.ndarray
  seed: int
  size: int
  length: int

  def batch(self, step: int) -> np.ndarray:
    """int32 [size, length + 1]."""
    return batch(self.text, self.seed, step, self.size, self.length)

  @property
  def identity(self) -> dict:
    """What tells the text from others."""
    return {"text_sha256": hashlib.sha256(np.ascontiguousarray(self.text)).hexdigest()}

  def describe(self, step: int) -> str:
    """Where the rows of a batch are from."""
    return f"batch {step} of the text, {self.size} stretches of {self.length + 1} bytes"


def _stdlib() -> tuple[Path, list[str]]:
  """The running Python's own sources, `pydoc_data` topics included, without tests and installed packages."""
  root = Path(sysconfig.get_paths()["stdlib"])
  return root, _below(root, lambda name: name not in _SKIPPED, lambda name: name.endswith(".py"))


def text_files(path: Path) -> tuple[Path, list[str]]:
  """(a directory, names below it) of a file, or of all files below a directory but hidden ones."""
  if path.is_file():
    return path.parent, [path.name]
  shown = lambda name: not name.startswith(".")
  return path, _below(path, shown, shown)


def _texts(root: Path, files: list[str], source: str | Path) -> tuple[dict[str, bytes], int]:
  """({name: its bytes}, their sum), of which there are some."""
  texts = {name: read_text(root / name) for name in files}
  total = sum(map(len, texts.values()))
  if total == 0:
    raise DataError(
      f"{printable(source)}: 0 bytes of text in {len(texts)} files; give a file or directory of UTF-8 text"
    )
  return texts, total


def _below(root: Path, enter: Callable[[str], bool], take: Callable[[str], bool]) -> list[str]:
  """Names below `root` of the files whose own name is to be taken, in directories that are all to be entered."""

  def unreadable(e: OSError):
    raise e

  found = []
  for directory, inner, names in os.walk(root, onerror=unreadable):
    inner[:] = filter(enter, inner)
    files = (Path(directory, name) for name in filter(take, names))
    found += [file.relative_to(root).as_posix() for file in files if file.is_file()]
  return sorted(found)


def read_text(path: Path) -> bytes:
  """The bytes of a file of UTF-8 text, which has no zero byte; DataError for another, with the offset."""
  text = path.read_bytes()
  try:
    text.decode("utf-8")
  except UnicodeDecodeError as e:
    raise DataError(
      f"{printable(path)}: not UTF-8 text (byte {e.start} of {len(text)} is 0x{text[e.start]:02x}); convert it from what it "
      "is in, as with `iconv -f latin1 -t utf-8`, or leave it out"
    ) from None
  if (zero := text.find(b"\0")) >= 0:
    raise DataError(f"{printable(path)}: not text (byte {zero} of {len(text)} is 0x00)")
  return text


def _held_out(sizes: dict[str, int], total: int) -> set[str]:
  """Names of the validation files, or none where whole files cannot make a part of the wanted size."""
  wanted = _VALIDATION * total
  chosen, reached = set(), 0
  for name in _by_hash(sizes):
    if reached < wanted and sizes[name] <= _LARGEST * wanted:
      chosen.add(name)
      reached += sizes[name]
  return chosen if reached >= wanted else set()


def _by_hash(names: Iterable[str]) -> list[str]:
  return sorted(names, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
