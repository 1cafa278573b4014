"""Headers of safetensors files: which tensors a file holds, where, and whether all of it holds together."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxllm.errors import CheckpointError
from jaxllm.hf.plain import brief, odd_name, open_plain, parse_json

DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
  "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
  "BOOL": np.dtype(np.bool_),
} | {
  f"{kind.upper()}{bits}": np.dtype(f"{name}{bits}")
  for kind, name in (("i", "int"), ("u", "uint"))
  for bits in (8, 16, 32, 64)
}
"""The types of safetensors that NumPy arrays can have."""

HEADER_LIMIT = 16 << 20
TENSORS_LIMIT, RANK_LIMIT, DIMENSION_LIMIT = 200_000, 8, 2**40
"""What no model's files come near; files beyond are refused, the header before it is parsed."""

OTHER_FORMATS = {
  b"PK\x03\x04": "a zip archive, as torch.save and numpy.savez write: pickles run code when they are read",
  b"\x80\x02": "a pickle, which runs code when it is read",
  b"\x80\x03": "a pickle, which runs code when it is read",
  b"\x80\x04": "a pickle, which runs code when it is read",
  b"\x80\x05": "a pickle, which runs code when it is read",
  b"\x93NUMPY": "an array of NumPy",
  b"\x89HDF": "an HDF5 file",
  b"GGUF": "a GGUF file",
  b"version https://git-lfs": "a pointer of Git LFS; fetch the file itself: git lfs pull",
  b"<!DOCTYPE": "a web page",
  b"<html": "a web page",
}
"""What else is found under the name of a safetensors file, by its first bytes."""
_MAGIC = max(map(len, OTHER_FORMATS))


@dataclasses.dataclass(frozen=True)
class Stored:
  """A tensor of a file: its bytes are [start, stop) of the file."""

  name: str
  file: Path
  dtype: np.dtype
  shape: tuple[int, ...]
  start: int
  stop: int

  def __str__(self) -> str:
    return f"{self.name} of {self.file.name}"


def read_header(path: Path) -> dict[str, Stored]:
  """The tensors of a safetensors file by name, once all of its header holds together and fits the size of the file.

  8 bytes of length n, n bytes of JSON {name: {dtype, shape, data_offsets}}, and the data, without a gap; else CheckpointError.
  Source: the format's description in the README of github.com/huggingface/safetensors.
  """
  with open_plain(path) as file:
    size = os.fstat(file.fileno()).st_size
    start = file.read(_MAGIC)
    length = int.from_bytes(start[:8], "little")
    if size < 8 or length > size - 8:
      raise CheckpointError(f"{path}: {_no_header(start, size, length)}")
    if not 2 <= length <= HEADER_LIMIT:
      raise CheckpointError(
        f"{path}: found a header of {length:,} bytes, expected 2 to {HEADER_LIMIT:,}; fetch the file again"
      )
    file.seek(8)
    text = file.read(length)
  _check_count(text, path)
  header = parse_json(text, f"{path}: header", CheckpointError)
  if not isinstance(header, dict):
    raise CheckpointError(f"{path}: header: found a {type(header).__name__}, expected an object of tensors")
  metadata = header.pop("__metadata__", {})
  if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
    raise CheckpointError(f"{path}: header: __metadata__ is not an object of texts")
  data = 8 + length
  tensors = {name: _tensor(path, data, name, entry) for name, entry in header.items()}
  _check_layout(path, data, size, sorted(tensors.values(), key=lambda t: (t.start, t.stop)))
  return tensors


def _no_header(start: bytes, size: int, length: int) -> str:
  """What a file is that is too short for the header that its first bytes announce."""
  for magic, what in OTHER_FORMATS.items():
    if start.startswith(magic):
      return f"found {what}; expected a safetensors file"
  expected = f"a header of {length:,}" if size >= 8 else "8 and more"
  return f"found {size:,} bytes, expected {expected}: cut short, or no safetensors file; fetch the file again"


def _check_count(text: bytes, path: Path) -> None:
  """Refuses more tensors than there may be before they are parsed: each has its name, three keys, and up to 11 commas."""
  for mark, most in (
    (b'"data_offsets"', TENSORS_LIMIT),
    (b":", 5 * TENSORS_LIMIT),
    (b",", 16 * TENSORS_LIMIT),
  ):
    if (count := text.count(mark)) > most:
      raise CheckpointError(
        f"{path}: header: found {count:,} times {mark.decode()}, expected at most {TENSORS_LIMIT:,} tensors, which have "
        f"{most:,}; fetch the file again"
      )


def _tensor(path: Path, data: int, name: str, entry: Any) -> Stored:
  """One entry of a header; `data` is where the data begins."""

  def wrong(what: str) -> CheckpointError:
    return CheckpointError(f"{path}: {name[:100]!r}: {what}; fetch the file again")

  if (odd := odd_name(name)) is not None:
    raise wrong(odd)
  if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
    raise wrong("expected dtype, shape, data_offsets and nothing else in its entry of the header")
  kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
  if not isinstance(kind, str) or kind not in DTYPES:
    raise wrong(f"found dtype {brief(kind)}, expected one of {', '.join(DTYPES)}")
  if not _naturals(shape) or len(shape) > RANK_LIMIT or max(shape, default=0) > DIMENSION_LIMIT:
    raise wrong(
      f"found shape {brief(shape)}, expected at most {RANK_LIMIT} whole numbers up to {DIMENSION_LIMIT:,}"
    )
  if not _naturals(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] < 2**63:
    raise wrong(f"found data_offsets {brief(offsets)}, expected [begin, end]")
  nbytes = math.prod(shape) * DTYPES[kind].itemsize
  if offsets[1] - offsets[0] != nbytes:
    raise wrong(f"found {offsets[1] - offsets[0]:,} bytes, expected {nbytes:,} for {kind} {shape}")
  return Stored(name, path, DTYPES[kind], tuple(shape), data + offsets[0], data + offsets[1])


def _check_layout(path: Path, data: int, size: int, tensors: list[Stored]) -> None:
  end = tensors[-1].stop if tensors else data
  if size < end:
    cut = next(tensor for tensor in tensors if tensor.stop > size)
    raise CheckpointError(
      f"{path}: found {size:,} bytes, expected {end:,}: cut short, from {cut.name} on; fetch the file again"
    )
  place = data
  for tensor in tensors:
    if tensor.start != place:
      problem = (
        "overlaps the tensor before it"
        if tensor.start < place
        else f"leaves {tensor.start - place:,} bytes unused"
      )
      raise CheckpointError(f"{path}: {tensor.name} {problem}; the header is damaged, fetch the file again")
    place = tensor.stop
  if size > end:
    raise CheckpointError(
      f"{path}: found {size:,} bytes, expected {end:,}: more than its tensors; fetch the file again"
    )


def _naturals(values: Any) -> bool:
  return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
