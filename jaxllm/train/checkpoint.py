"""Checkpoints of a training run by Orbax: committed whole or not at all, and checked before they are used."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxllm import tree
from jaxllm.errors import CheckpointError

State = Any

_NOT_DAMAGE = (errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM)
"""Errors of the system on reading, which say nothing about what is on disk."""


class Checkpoints:
  """The steps saved in one directory, the newest `keep` of them.

  Orbax writes a step into a temporary directory and renames it, so a kill leaves the step before it whole.  `save` returns
  when the step is on disk.
  """

  def __init__(self, directory: str | Path, keep: int = 2):
    # Orbax tells of every save, and of the errors that it raises
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    self.directory = Path(directory).absolute()
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
    )
    self._manager = ocp.CheckpointManager(self.directory, options=options)

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, *_):
    self._manager.close()

  @property
  def steps(self) -> list[int]:
    """Steps on disk, oldest first."""
    return sorted(self._manager.all_steps())

  def save(self, step: int, state: State) -> None:
    """Commit `state` as `step`; a save that did not happen raises, OSError if the system refused it."""
    try:
      saved = self._manager.save(step, args=ocp.args.StandardSave(state))
      self._manager.wait_until_finished()
    except MemoryError:
      raise
    except Exception as e:  # whatever Orbax and the formats below it raise for a failed write
      raise _os_error(_errno(e) or errno.EIO, self.directory) from e
    if not saved:
      raise CheckpointError(
        f"{self.directory}: step {step} was not saved, as it is there already; use another directory"
      )

  def restore(self, target: State) -> State | None:
    """The newest step that can be read, in the shapes and types of `target`; None if nothing is saved.

    A step that cannot be read is moved aside (into `unreadable/`) and the one before it is used.  Raises CheckpointError,
    and moves nothing, when none can be read or when the saved state is of another model; OSError when the system does not
    let this process read.
    """
    steps = self.steps
    damaged: dict[int, Exception] = {}
    for step in reversed(steps):
      try:
        found = _read(self._manager, step)
      except CheckpointError as e:
        damaged[step] = e
        continue
      state = _fitted(target, found, f"{self.directory}, step {step}")
      for later, problem in damaged.items():
        self._move_aside(later, problem)
      return state
    if steps:
      raise CheckpointError(
        f"{self.directory}: none of the steps {steps} can be read; remove the directory to train again"
      )
    return None

  def check_identity(self, identity: dict) -> None:
    """Write `run.json` on first use; later raise CheckpointError unless it holds the same JSON values, naming the others."""
    path = self.directory / "run.json"
    text = json.dumps(identity, indent=2, allow_nan=False) + "\n"
    if not path.exists():
      temporary = path.with_name(".run.json.tmp")
      with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
      os.replace(temporary, path)
      return
    try:
      there, here = (tree.flatten(json.loads(each)) for each in (path.read_bytes(), text))
    except (ValueError, AttributeError):
      raise CheckpointError(f"{path}: not a JSON object; restore the file, or use another --out") from None
    other = [key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key)]
    if other:
      raise CheckpointError(
        f"{path}: another run's checkpoints ({', '.join(other)} differ); use another --out"
      )

  def _move_aside(self, step: int, problem: Exception) -> None:
    move_aside(self.directory / str(step), problem)
    self._manager.reload()


def move_aside(path: Path, problem: object) -> None:
  """Move what cannot be read into `unreadable/` beside it, under a name that is free, and tell of it."""
  parent = path.parent / "unreadable"
  parent.mkdir(exist_ok=True)
  names = (f"{path.name}-{i}" if i else path.name for i in itertools.count())
  aside = next(parent / name for name in names if not (parent / name).exists())
  logging.getLogger(__name__).warning("%s; moved to %s", problem, aside)
  shutil.move(path, aside)


def _read(manager: ocp.CheckpointManager, step: int) -> State:
  """The state of a step; CheckpointError if it is damaged, OSError if the system does not let this process read."""
  try:
    return manager.restore(step, args=ocp.args.StandardRestore())
  except MemoryError:
    raise
  except Exception as e:  # whatever Orbax and the formats below it raise for damaged files
    if (code := _errno(e)) in _NOT_DAMAGE:
      raise _os_error(code, manager.directory) from e
    raise CheckpointError(f"{manager.directory}, step {step}: cannot be read ({e})") from e


def _os_error(code: int, directory) -> OSError:
  return OSError(code, os.strerror(code), str(directory))


def _errno(error: Exception) -> int | None:
  """The system's error number; the formats below Orbax have it in their text only."""
  if isinstance(error, OSError):
    return error.errno
  if found := re.search(r"os_error_code\W*(\d+)", str(error)):
    return int(found[1])
  return errno.ENOSPC if "No space left" in str(error) else None


def restore_tree(directory: str | Path) -> tuple[int, State]:
  """(step, state) of the newest step that can be read, as nested dicts and lists of NumPy arrays; for reading a finished run.

  Nothing is moved; a warning names the steps that cannot be read.  Raises CheckpointError where none can, and OSError when
  the system does not let this process read.
  """
  directory = Path(directory).absolute()
  if not directory.is_dir():
    raise CheckpointError(
      f"{directory}: no such directory; give the --out of a run of experiments.length_extrapolation"
    )
  with ocp.CheckpointManager(directory) as manager:
    problem = f"{directory}: no checkpoint there"
    for step in sorted(manager.all_steps(), reverse=True):
      try:
        return step, jax.tree.map(np.asarray, _read(manager, step))
      except CheckpointError as e:
        problem = str(e)
        logging.getLogger(__name__).warning("%s", problem)
    raise CheckpointError(f"{problem}; run the command that trained it again")


def _fitted(target: State, found: State, source: str) -> State:
  """`found` in the structure of `target`, once every leaf has its name, shape and type (a restore casts in silence)."""
  want = jax.tree_util.tree_leaves_with_path(target)
  have = {_plain(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(found)}
  problems = [
    f"{_plain(path)}: found {_kind(have.get(_plain(path)))}, expected {_kind(leaf)}"
    for path, leaf in want
    if _kind(have.get(_plain(path))) != _kind(leaf)
  ]
  problems += [f"{name}: not expected" for name in sorted(have.keys() - {_plain(path) for path, _ in want})]
  if problems:
    raise CheckpointError(f"{source}: not a state of this model: " + "; ".join(problems[:8]))
  leaves = [jax.numpy.asarray(have[_plain(path)]) for path, _ in want]
  return jax.tree.unflatten(jax.tree.structure(target), leaves)


def _plain(path) -> str:
  """A path as text that is the same for attributes, keys and indices: Orbax gives named tuples back as dicts."""
  return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def _kind(leaf) -> str:
  return "nothing" if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"
