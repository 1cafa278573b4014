"""Model directories as they lie on disk: JSON and safetensors, read strictly, and tensors as views of the mapped files."""

from __future__ import annotations

import math
import mmap
import os
import re
from pathlib import Path

import numpy as np

from jaxllm.errors import CheckpointError, JaxllmError
from jaxllm.hf.header import Stored, read_header
from jaxllm.hf.plain import brief, odd_name, open_plain, plain_file, read_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
WEIGHTS = ".safetensors"
_SHARD = re.compile(r"\w[\w.-]{0,238}\.safetensors", re.ASCII)
"""The plain name of a file of weights, of at most 250 bytes."""
CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib", "*.npz", "*.npy")
"""Files of weights that run code when they are read, or can."""


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

  @property
  def read_files(self) -> set[str]:
    """The names of the files that say which tensors there are."""
    shards = {stored.file.name for stored in self.tensors.values()}
    return shards if shards == {SINGLE} else shards | {INDEX}

  def view(self, name: str) -> np.ndarray:
    """The tensor, read-only: an array over the mapped file, read from disk where it is first touched."""
    stored = self.tensors[name]
    if 0 in stored.shape:
      return np.empty(stored.shape, stored.dtype)
    if stored.file not in self._maps:
      with open_plain(stored.file) as file:
        self._maps[stored.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if len(self._maps[stored.file]) < stored.stop:
      raise CheckpointError(
        f"{stored.file}: {name}: the file was cut short while it was read; load it again once it is whole"
      )
    count = math.prod(stored.shape)
    return np.frombuffer(self._maps[stored.file], stored.dtype, count, stored.start).reshape(stored.shape)

  def _read_shards(self, index: Path) -> None:
    weight_map = read_json(index, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
      raise CheckpointError(f"{index}: found no weight_map, expected {{tensor: file}}")
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
      if (odd := odd_name(name)) is not None:
        raise CheckpointError(f"{index}: weight_map: {name[:100]!r}: {odd}; fetch the file again")
      if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
        raise CheckpointError(
          f"{index}: weight_map has {name!r} in {brief(shard)}, expected the plain name of a .safetensors file there"
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
    return sorted(one for one in shards if _SHARD.fullmatch(one) and not os.path.lexists(directory / one))
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
