"""Checkpoints of a training run by Orbax: committed whole or not at all, and checked before they are used."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxllm import tree
from jaxllm.errors import CheckpointError
from jaxllm.failpoint import failpoint
from jaxllm.parallel import multihost
from jaxllm.train import disk, manifest

State = Any

_STATE = "default"
"""Orbax's directory in that of a step."""
_OLD = "_CHECKPOINT_METADATA"
"""What stands beside it where the step was saved before there were manifests."""
_OURS = re.compile(r"[0-9]+\.(saving|removing|orbax-checkpoint-tmp.*)")
"""Directories that a save was killed over; the last kind is of runs before there were manifests."""
_NOT_DAMAGE = (errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM)
"""Errors of the system on reading, which say nothing about what is on disk."""
_log = logging.getLogger(__name__)


class Checkpoints:
  """The steps saved in one directory, the newest `keep` of them.

  A step is written into a temporary directory, its manifest with it, and gets its name last: what has the name of a step is
  whole, or was damaged later.  `save` returns when the step is on disk; older ones are removed after that.  One process
  writes at a time: a script holds `study.files.Lock`.  The processes of one run all make the same calls, in a directory that
  they share; the first of them writes manifests, moves and removes.
  """

  def __init__(self, directory: str | Path, keep: int = 2):
    # Orbax tells of every save, and of the errors that it raises
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    self.directory = Path(directory).absolute()
    self._keep = keep
    self._about: dict[str, Any] = {}
    self._orbax = _orbax()
    self._by_first(self._clean)

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, *_):
    self._orbax.close()

  @property
  def steps(self) -> list[int]:
    """Steps on disk, oldest first."""
    return _steps(self.directory)

  def check_room(self, state: State) -> None:
    """Raises OSError, which names the bytes needed and free, where there is no room to save such a state."""
    self._by_first(lambda: disk.check_room(self.directory, _size(state)))

  def save(self, step: int, state: State) -> None:
    """Commit `state` as `step`; a save that did not happen raises, OSError if the system refused it."""
    if step in (steps := self.steps) or (steps and step < steps[-1]):
      there = "it" if step in steps else f"step {steps[-1]}"
      raise CheckpointError(
        f"{self.directory}: step {step} was not saved, as {there} is there already; use another directory"
      )
    failpoint("save")
    self.check_room(state)
    staging = self.directory / f"{step}.saving"
    try:
      self._by_first(lambda: _made_anew(staging))
      self._orbax.save(staging / _STATE, args=ocp.args.StandardSave(state))
      failpoint("arrays_written")
      self._by_first(lambda: self._commit(staging, step, state))
    except BaseException as e:
      if jax.process_index() == 0:
        shutil.rmtree(staging, ignore_errors=True)
      if not isinstance(e, Exception) or isinstance(e, (MemoryError, jax.errors.JaxRuntimeError)):
        raise  # the second is of a device, or of a process that was lost
      # whatever Orbax and the formats below it raise for a failed write
      raise disk.refusal(disk.number(e), self.directory, _size(state), e) from e
    self._by_first(self._remove_old)

  def restore(self, target: State) -> State | None:
    """The newest step that is as it was saved, in the shapes and types of `target`; None if nothing is saved.

    Leaves of `target` are arrays or `jax.ShapeDtypeStruct`s; those that lie over a mesh are restored onto it, on whatever mesh
    they were saved.  A step that is damaged is moved aside (into `quarantine/`) and the one before it is used.  Raises
    CheckpointError, and moves nothing, when all are damaged or when the saved state is of another model; OSError when the
    system does not let this process read.
    """
    damaged: dict[int, CheckpointError] = {}
    step = self._by_first(lambda: self._newest(damaged), tell=True)
    if step is None:
      return None
    state = _read(self._orbax, self.directory, step, target)
    self._by_first(lambda: [move_aside(self.directory / str(s), e) for s, e in damaged.items()])
    return state

  def check_identity(self, identity: dict) -> None:
    """Write `run.json` on first use; later raise CheckpointError unless it holds the same JSON values, naming the others."""
    path = self.directory / "run.json"
    text = json.dumps(identity, indent=2, allow_nan=False) + "\n"
    self._about["config_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    self._by_first(lambda: None if path.exists() else disk.write_whole(path, text.encode()))
    try:
      there, here = (tree.flatten(json.loads(each)) for each in (path.read_bytes(), text))
    except (ValueError, AttributeError):
      raise CheckpointError(f"{path}: not a JSON object; restore the file, or use another --out") from None
    keys = [key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key)]
    if keys:
      other = [f"{key}: {_short(there.get(key))} there, {_short(here.get(key))} here" for key in keys]
      raise CheckpointError(
        f"{path}: another run's checkpoints ({'; '.join(other)}); use another --out, or what that run had"
      )

  def _newest(self, damaged: dict[int, CheckpointError]) -> int | None:
    steps = self.steps
    for step in reversed(steps):
      try:
        _check(self._orbax, self.directory, step)
        return step
      except CheckpointError as e:
        damaged[step] = e
    if steps:
      problems = "; ".join(str(e) for e in damaged.values())
      raise CheckpointError(
        f"{self.directory}: none of the steps {steps} can be read; remove the directory to train again ({problems})"
      )
    return None

  def _commit(self, staging: Path, step: int, state: State) -> None:
    about = {"jax": jax.__version__, "processes": jax.process_count(), "mesh": _mesh(state), **self._about}
    manifest.write(staging, step, state, about)
    failpoint("manifest_written")
    staging.rename(self.directory / str(step))
    failpoint("step_renamed")
    disk.sync(self.directory)

  def _remove_old(self) -> None:
    for step in self.steps[: -self._keep]:
      going = self.directory / f"{step}.removing"  # half of a step is none
      try:
        (self.directory / str(step)).rename(going)
        failpoint("step_removing")
        shutil.rmtree(going)
      except OSError as e:  # the new step is saved all the same
        _log.warning("%s: step %s is no longer needed, but cannot be removed (%s)", self.directory, step, e)

  def _clean(self) -> None:
    """Remove what a killed save of this run has left, and nothing else."""
    self.directory.mkdir(parents=True, exist_ok=True)
    for path in self.directory.iterdir():
      if _OURS.fullmatch(path.name):
        shutil.rmtree(path)

  def _by_first(self, work: Callable[[], Any], tell: bool = False) -> Any:
    return multihost.by_first(work, self.directory, tell)


def move_aside(path: Path, problem: object) -> None:
  """Move what cannot be read into `quarantine/` beside it, under a name that is free, and tell of it."""
  parent = path.parent / "quarantine"
  parent.mkdir(exist_ok=True)
  names = (f"{path.name}-{i}" if i else path.name for i in itertools.count())
  aside = next(parent / name for name in names if not (parent / name).exists())
  _log.warning("%s; moved to %s", problem, aside)
  failpoint("moving_aside")
  shutil.move(path, aside)
  disk.sync(path.parent)


def restore_tree(directory: str | Path) -> tuple[int, State]:
  """(step, state) of the newest step that is whole, as nested dicts and lists of NumPy arrays; for reading a finished run.

  Nothing is moved; a warning names the steps that cannot be read.  Raises CheckpointError where none can, and OSError when
  the system does not let this process read.
  """
  directory = Path(directory).absolute()
  if not directory.is_dir():
    raise CheckpointError(
      f"{directory}: no such directory; give the --out of a run of experiments.length_extrapolation"
    )
  with contextlib.closing(_orbax()) as orbax:
    problem = f"{directory}: no checkpoint there"
    for step in reversed(_steps(directory)):
      try:
        _check(orbax, directory, step)
        return step, _read(orbax, directory, step)
      except CheckpointError as e:
        problem = str(e)
        _log.warning("%s", problem)
    raise CheckpointError(f"{problem}; run the command that trained it again")


def _orbax() -> ocp.Checkpointer:
  return ocp.Checkpointer(ocp.StandardCheckpointHandler())


def _steps(directory: Path) -> list[int]:
  return sorted(int(path.name) for path in directory.iterdir() if _is_step(path))


def _is_step(path: Path) -> bool:
  return re.fullmatch(r"0|[1-9][0-9]{0,17}", path.name) is not None and path.is_dir()


def _check(orbax: ocp.Checkpointer, directory: Path, step: int) -> None:
  """Raises CheckpointError, with the files, for a step that is not as it was saved."""
  path = directory / str(step)
  try:
    if not (path / manifest.NAME).exists() and (path / _OLD).exists():
      if jax.process_count() == 1:  # Orbax reads in all processes together
        _read(orbax, directory, step)
      _log.warning("%s: not verified, as it was saved before checkpoints had manifests", path)
    else:
      manifest.verified(path, step)
  except CheckpointError as e:
    where = f"{directory}, step {step}: cannot be read"
    raise e if str(e).startswith(where) else CheckpointError(f"{where} ({e})") from e


def _read(orbax: ocp.Checkpointer, directory: Path, step: int, target: State | None = None) -> State:
  """The state of a step, laid out as `target`'s, or as nested dicts and lists of NumPy arrays.

  Raises CheckpointError if it is damaged or of other names, shapes and types, OSError if the system does not let this process
  read.
  """
  path, source = directory / str(step) / _STATE, f"{directory}, step {step}"
  with _errors(directory, f"{source}: cannot be read"):
    saved = orbax.metadata(path).item_metadata.tree
  want = {} if target is None else _fitting(target, saved, source)

  def asked(key, leaf):
    sharding = getattr(want.get(manifest.plain(key)), "sharding", None)
    if isinstance(sharding, jax.sharding.Sharding) and not _on_one_device(sharding):
      return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    # else on the host: what Orbax is not told of goes to the devices it was saved from
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)

  asked_for = jax.tree_util.tree_map_with_path(asked, saved)
  with _errors(directory, f"{source}: cannot be read"):
    found = orbax.restore(path, args=ocp.args.StandardRestore(asked_for))
  if target is None:
    return jax.tree.map(np.asarray, found)
  have = {manifest.plain(key): leaf for key, leaf in jax.tree_util.tree_leaves_with_path(found)}
  differing = [name for name, leaf in want.items() if manifest.kind(have[name]) != manifest.kind(leaf)]
  assert not differing, f"{source}: {differing} came back in other types"
  leaves = [x if isinstance(x, jax.Array) else jax.numpy.asarray(x) for x in (have[name] for name in want)]
  return jax.tree.unflatten(jax.tree.structure(target), leaves)


@contextlib.contextmanager
def _errors(directory: Path, problem: str):
  """What Orbax raises as CheckpointError, or as OSError where the system is the cause."""
  try:
    yield
  except MemoryError:
    raise
  except Exception as e:  # whatever Orbax and the formats below it raise for damaged files
    if (code := disk.number(e)) in _NOT_DAMAGE:
      raise disk.refusal(code, directory) from e
    raise CheckpointError(f"{problem} ({e})") from e


def _fitting(target: State, saved: State, source: str) -> dict[str, Any]:
  """{name: leaf} of `target`, once every saved leaf has its name, shape and type (a restore casts in silence)."""
  want = {manifest.plain(key): leaf for key, leaf in jax.tree_util.tree_leaves_with_path(target)}
  here, there = manifest.kinds(target), manifest.kinds(saved)
  problems = [
    f"{name}: found {there.get(name, 'nothing')}, expected {expected}"
    for name, expected in here.items()
    if there.get(name) != expected
  ]
  problems += [f"{name}: not expected" for name in sorted(there.keys() - here.keys())]
  if problems:
    raise CheckpointError(f"{source}: not a state of this model: " + "; ".join(problems[:8]))
  return want


def _on_one_device(sharding: jax.sharding.Sharding) -> bool:
  return len(sharding.device_set) == 1


def _mesh(state: State) -> str | None:
  """The mesh that a state lies over, as in fsdp=2,tensor=4."""
  meshes = {
    leaf.sharding.mesh
    for leaf in jax.tree.leaves(state)
    if isinstance(leaf, jax.Array) and isinstance(leaf.sharding, jax.sharding.NamedSharding)
  }
  shapes = {",".join(f"{axis}={size}" for axis, size in mesh.shape.items()) for mesh in meshes}
  return "; ".join(sorted(shapes)) or None


def _short(value: Any) -> str:
  text = json.dumps(value)
  return text if len(text) <= 80 else f"{text[:80]}..."


def _made_anew(path: Path) -> None:
  shutil.rmtree(path, ignore_errors=True)
  path.mkdir()


def _size(state: State) -> int:
  """Bytes of all arrays of a state."""
  return sum(leaf.nbytes for leaf in jax.tree.leaves(state))
