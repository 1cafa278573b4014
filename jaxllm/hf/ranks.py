"""Files of tensor-parallel ranks, each with its share of every split matrix, read as the tensors they are shares of."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxllm.errors import CheckpointError
from jaxllm.hf import files
from jaxllm.hf.family import Family, Share
from jaxllm.hf.header import Stored, read_header
from jaxllm.hf.plain import plain_file

_NAME = re.compile(r"mp_rank_([0-9]{2})(_model_states)?\.safetensors")
_CONVERT = (
  'python -c "import glob, torch; from safetensors.torch import save_file as s; [s({k: v.contiguous() for k, v in '
  "torch.load(f, weights_only=True)['module'].items()}, f[:-2] + 'safetensors') for f in glob.glob('mp_rank_*.pt')]\""
)


def open_files(directory: Path, family: Family) -> files.Checkpoint:
  """The tensors of a model directory: of mp_rank_00..., where the family has such files and nothing else is there."""
  whole = any(os.path.lexists(directory / name) for name in (files.SINGLE, files.INDEX))
  if not family.ranks or whole:
    return files.Checkpoint(directory)
  names = sorted(path.name for path in directory.iterdir() if _NAME.fullmatch(path.name))
  if names:
    return RankedCheckpoint(directory, names, family)
  if pickles := sorted(path.name for path in directory.glob("mp_rank_*.pt")):
    raise CheckpointError(
      f"{directory}: found {files.listed(pickles)}, expected mp_rank_00_model_states.safetensors, ...: pickles run code when "
      f"they are read, so they are not read here.  Where you trust the files, convert them there: {_CONVERT}"
    )
  return files.Checkpoint(directory)


class _RankFile(files.Checkpoint):
  """The tensors of one file of a directory."""

  def __init__(self, directory: Path, name: str):
    self.directory, self.tensors, self._maps = (
      directory,
      read_header(plain_file(directory, name)),
      {},
    )


class RankedCheckpoint(files.Checkpoint):
  """The tensors that the ranks' files hold shares of, by name; nothing is read but the headers until `view`.

  family.ranks says how a tensor is shared; what it does not name each rank has whole.  Raises CheckpointError where a rank is
  missing or the ranks' tensors differ in name, type or shape, and from `view` where a whole one differs in value.
  Source: the files of GLM-130B, `tools/convert_tp.py` of its repository.
  """

  def __init__(self, directory: Path, names: Sequence[str], family: Family):
    self.directory, self._family = directory, family
    numbers = [int(_NAME.fullmatch(name)[1]) for name in names]
    if numbers != list(range(len(names))):
      raise CheckpointError(
        f"{directory}: found the ranks {', '.join(map(str, numbers))} ({files.listed(names)}), expected each from 0 on, once; "
        "fetch the files that are missing"
      )
    self._ranks = [_RankFile(directory, name) for name in names]
    first, problems = self._ranks[0].tensors, []
    for rank, name in zip(self._ranks, names, strict=True):
      problems += [f"{name}: lacks {one}, which {names[0]} has" for one in first.keys() - rank.tensors.keys()]
      problems += [f"{name}: has {one}, which {names[0]} lacks" for one in rank.tensors.keys() - first.keys()]
      for one in first.keys() & rank.tensors.keys():
        mine, its = (tensors[one] for tensors in (first, rank.tensors))
        if (mine.dtype, mine.shape) != (its.dtype, its.shape):
          what = f"{its.dtype} {list(its.shape)}, expected {mine.dtype} {list(mine.shape)} as in {names[0]}"
          problems.append(f"{name}: {one} is {what}")
    if problems:
      raise CheckpointError(
        f"{directory}: the files of the ranks are not of one model\n  {files.shown(sorted(problems))}"
      )
    self.tensors = {name: self._merged(stored) for name, stored in first.items()}

  @property
  def read_files(self) -> set[str]:
    """The names of the files that say which tensors there are."""
    return {stored.file.name for rank in self._ranks for stored in rank.tensors.values()}

  def view(self, name: str) -> np.ndarray:
    """The tensor: one of all ranks' shares is a copy in memory, and a whole one a view of the first rank's."""
    parts = [rank.view(name) for rank in self._ranks]
    share = self._share(self.tensors[name])
    if share is None:
      for rank, part in zip(self._ranks, parts, strict=True):
        if part.tobytes() != parts[0].tobytes():
          raise CheckpointError(
            f"{rank.tensors[name]} is not {self.tensors[name]}, expected the same values, as every rank has all of it; fetch "
            "the files again"
          )
      return parts[0]
    blocks = [np.split(part, share.blocks, share.axis) for part in parts]
    return np.concatenate([part for block in zip(*blocks, strict=True) for part in block], share.axis)

  def _share(self, stored: Stored) -> Share | None:
    found = (share for pattern, share in self._family.ranks if re.fullmatch(pattern, stored.name))
    return next(found, None)

  def _merged(self, stored: Stored) -> Stored:
    share = self._share(stored)
    if share is None:
      return stored
    shape = list(stored.shape)
    if len(shape) <= share.axis or shape[share.axis] % share.blocks:
      expected = f"at least {share.axis + 1} dimensions, and number {share.axis} a multiple of {share.blocks}"
      raise CheckpointError(f"{stored}: found the shape {shape}, expected {expected}")
    shape[share.axis] *= len(self._ranks)
    return dataclasses.replace(stored, shape=tuple(shape))
