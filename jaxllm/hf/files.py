"""Model directories as they lie on disk: JSON and safetensors, read strictly, and tensors as views of the mapped files."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import mmap
import os
import re
import stat
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxllm.errors import CheckpointError, JaxllmError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
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

JSON_LIMIT = 64 << 20
HEADER_LIMIT = 16 << 20
TENSORS_LIMIT, NAME_LIMIT, RANK_LIMIT, DIMENSION_LIMIT = 200_000, 512, 8, 2**40
"""What no model's files come near; files beyond are refused, the header before it is parsed."""

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


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


class Checkpoint:
  """The tensors of a model directory, by name; nothing is read but the headers until `view`.

  Raises CheckpointError, in one message, for all that is wrong with the files as such: none, pickles only, files missing,
  damaged, or that disagree with the index, tensors twice.
  """

  def __init__(self, directory: str | os.PathLike):
    self.directory = Path(directory)
    self.tensors: dict[str, Stored] = {}
    self._maps: dict[Path, mmap.mmap] = {}
    if os.path.lexists(self.directory / SINGLE):  # as transformers does where there is an index too
      self.tensors = read_header(plain_file(self.directory, SINGLE))
    elif os.path.lexists(self.directory / INDEX):
      self._read_shards(plain_file(self.directory, INDEX))
    else:
      raise CheckpointError(_nothing(self.directory))

  def view(self, name: str) -> np.ndarray:
    """The tensor, read-only: an array over the mapped file, read from disk where it is first touched."""
    stored = self.tensors[name]
    if 0 in stored.shape:
      return np.empty(stored.shape, stored.dtype)
    if stored.file not in self._maps:
      with open(stored.file, "rb") as file:
        self._maps[stored.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    count = math.prod(stored.shape)
    return np.frombuffer(self._maps[stored.file], stored.dtype, count, stored.start).reshape(stored.shape)

  def _read_shards(self, index: Path) -> None:
    weight_map = read_json(index, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
      raise CheckpointError(f"{index}: found no weight_map, expected {{tensor: file}}")
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
      if not isinstance(shard, str) or not re.fullmatch(r"\w[\w.-]{0,250}\.safetensors", shard, re.ASCII):
        raise CheckpointError(
          f"{index}: weight_map has {name!r} in {shard!r}, expected the plain name of a .safetensors file in that directory"
        )
      shards.setdefault(shard, []).append(name)
    problems = []
    for shard, names in shards.items():
      if not os.path.lexists(self.directory / shard):
        first = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        problems.append(f"{shard}: no such file; it should hold {len(names)} tensors ({first})")
        continue
      found = read_header(plain_file(self.directory, shard))
      problems += [f"{shard}: lacks {name}, which the index has there" for name in names if name not in found]
      for name in found:
        other = weight_map.get(name)
        if other != shard:
          where = "not in the index" if other is None else f"which the index has in {other}"
          problems.append(f"{shard}: holds {name}, {where}")
      self.tensors |= found
    if problems:
      raise CheckpointError(f"{index}: the files do not fit it; fetch them again\n  {shown(problems)}")


def read_json(path: str | os.PathLike, error: type[JaxllmError]) -> dict[str, Any]:
  """The object of a JSON file; anything else, a key twice, NaN or an infinity is an `error` that names the file and the key."""
  path = Path(path)
  if path.stat().st_size > JSON_LIMIT:
    raise error(f"{path}: found {path.stat().st_size:,} bytes, expected at most {JSON_LIMIT:,}")
  value = parse_json(path.read_bytes(), str(path), error)
  if not isinstance(value, dict):
    raise error(f"{path}: found a JSON {type(value).__name__}, expected an object")
  return value


def parse_json(data: bytes, source: str, error: type[JaxllmError]) -> Any:
  """The value of JSON in UTF-8, as `read_json` says."""

  def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
    plain = dict(items)
    if len(plain) < len(items):
      twice = collections.Counter(name for name, _ in items).most_common(1)[0][0]
      raise error(f"{source}: found the key {twice[:100]!r} twice, expected it once")
    return plain

  def constant(text: str) -> None:
    raise error(f"{source}: found {text}, expected finite numbers, as JSON has no other")

  try:
    return json.loads(data.decode(), object_pairs_hook=pairs, parse_constant=constant)
  except error:
    raise
  except (
    ValueError,
    RecursionError,
  ) as e:  # not UTF-8, not JSON, numbers of thousands of digits, nested too deep
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


def read_header(path: Path) -> dict[str, Stored]:
  """The tensors of a safetensors file by name, once all of its header holds together and fits the size of the file.

  8 bytes of length n, n bytes of JSON {name: {dtype, shape, data_offsets}}, and the data, without a gap; else CheckpointError.
  Source: the format's description in the README of github.com/huggingface/safetensors.
  """
  with open(path, "rb") as file:
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
      raise CheckpointError(
        f"{path}: found {size:,} bytes, expected a header of {length if size >= 8 else 8:,}: cut short, or no safetensors "
        "file; fetch the file again"
      )
    if not 2 <= length <= HEADER_LIMIT:
      raise CheckpointError(
        f"{path}: found a header of {length:,} bytes, expected 2 to {HEADER_LIMIT:,}; fetch the file again"
      )
    header = parse_json(file.read(length), f"{path}: header", CheckpointError)
  if not isinstance(header, dict) or len(header) > TENSORS_LIMIT:
    raise CheckpointError(f"{path}: header: expected an object of at most {TENSORS_LIMIT:,} tensors")
  metadata = header.pop("__metadata__", {})
  if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
    raise CheckpointError(f"{path}: header: __metadata__ is not an object of texts")
  data = 8 + length
  tensors = {name: _tensor(path, data, name, entry) for name, entry in header.items()}
  _check_layout(path, data, size, sorted(tensors.values(), key=lambda t: (t.start, t.stop)))
  return tensors


def _tensor(path: Path, data: int, name: str, entry: Any) -> Stored:
  """One entry of a header; `data` is where the data begins."""

  def wrong(what: str) -> CheckpointError:
    return CheckpointError(f"{path}: {name[:NAME_LIMIT]!r}: {what}")

  if len(name) > NAME_LIMIT:
    raise wrong(f"a name of {len(name)} characters, expected at most {NAME_LIMIT}")
  if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
    raise wrong("expected dtype, shape, data_offsets and nothing else in its entry of the header")
  kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
  if not isinstance(kind, str) or kind not in DTYPES:
    raise wrong(f"found dtype {str(kind)[:40]!r}, expected one of {', '.join(DTYPES)}")
  if not _naturals(shape) or len(shape) > RANK_LIMIT or max(shape, default=0) > DIMENSION_LIMIT:
    raise wrong(
      f"found shape {str(shape)[:100]}, expected at most {RANK_LIMIT} whole numbers up to {DIMENSION_LIMIT:,}"
    )
  if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
    raise wrong(f"found data_offsets {str(offsets)[:100]}, expected [begin, end]")
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


def _nothing(directory: Path) -> str:
  """What to do about a directory without safetensors."""
  if not directory.is_dir():
    return f"{directory}: no such directory"
  found = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
  if not found:
    return f"{directory}: no {SINGLE} or {INDEX}; give the directory that a model was saved to"
  return pickles_only(directory, found)


def missing_weights(directory: Path) -> list[str]:
  """The files of weights that a directory lacks: model.safetensors where there is no index either, or shards of the index.

  An index that cannot be read lacks none: `Checkpoint` says what is wrong with it.
  """
  if os.path.lexists(directory / SINGLE):
    return []
  if not os.path.lexists(directory / INDEX):
    return [SINGLE]
  try:
    shards = set(read_json(plain_file(directory, INDEX), CheckpointError)["weight_map"].values())
    return sorted(shard for shard in shards if not (directory / shard).exists())
  except (JaxllmError, AttributeError, KeyError, TypeError):
    return []


def pickles_only(where: str | Path, found: list[str]) -> str:
  """What to do about a directory or a repository that has its weights as pickles, `found`, only."""
  target = where.rpartition("/")[2] if isinstance(where, str) else where
  return (
    f"{where}: found {', '.join(found[:3])}, expected {SINGLE}: pickles run code when they are read, so they are not read "
    'here.  Where you trust the file, convert it: python -c "from transformers import AutoModelForCausalLM as M; '
    f"M.from_pretrained('{where}', dtype='auto').save_pretrained('{target}-safe')\""
  )


def listed(names: list[str], most: int = 3) -> str:
  """The names on a line, and how many more there are."""
  return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def shown(lines: list[str], most: int = 20) -> str:
  """The lines of a message, indented, and how many more there are."""
  return "\n  ".join(lines[:most]) + (f"\n  (+{len(lines) - most} more)" if len(lines) > most else "")
