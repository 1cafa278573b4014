"""Steps whose files were changed, cut, lost, added or copied; steps of runs from before there were manifests; room."""

import errno
import json
import os
import re
import shutil

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import train_cases
from training_table import about, measured

from jaxllm.errors import CheckpointError
from jaxllm.failpoint import VARIABLE, failpoint
from jaxllm.train import checkpoint, disk, loop, manifest
from jaxllm.train.checkpoint import Checkpoints, restore_tree

# A restore that fails inside Orbax leaves callbacks for an event loop that is closed by then.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def state(step):
  draw = np.random.default_rng(step)
  weights = {name: draw.standard_normal((64, 96), np.float32) for name in ("a", "b")}
  return {"step": jnp.int32(step), "params": weights | {"half": jnp.asarray(weights["a"], jnp.bfloat16)}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  directory = tmp_path_factory.mktemp("saved")
  with Checkpoints(directory) as checkpoints:
    checkpoints.check_identity({"seed": 0})
    for step in (10, 20):
      checkpoints.save(step, state(step))
  return directory


@pytest.fixture
def run(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / "run")


def restore(directory):
  with Checkpoints(directory) as checkpoints:
    return checkpoints.restore(state(0))


def files_of(directory):
  return sorted(path for path in directory.rglob("*") if path.is_file())


def falls_back(run, caplog, path):
  """Whether the step is given up, with the file told, for the one before it; and puts it back."""
  caplog.clear()
  found = restore(run)
  told = f"{run}, step 20: cannot be read ({path}" in caplog.text and "moved to" in caplog.text
  aside = run / "quarantine" / "20"
  noticed = train_cases.bytes_of(found) == train_cases.bytes_of(state(10)) and told and aside.is_dir()
  aside.rename(run / "20")
  return noticed


def test_what_a_manifest_says(run):
  found = json.loads((run / "20" / "manifest.json").read_bytes())
  assert found["step"] == 20 and found["state"] == {
    "params/a": "float32[64, 96]",
    "params/b": "float32[64, 96]",
    "params/half": "bfloat16[64, 96]",
    "step": "int32[]",
  }
  assert found["files"].keys() == {
    path.relative_to(run / "20").as_posix() for path in files_of(run / "20")
  } - {"manifest.json"}
  assert found["about"]["mesh"] is None and len(found["about"]["config_sha256"]) == 64


@pytest.mark.parametrize("flips", [40, pytest.param(2000, marks=pytest.mark.slow)])
def test_every_changed_bit_is_noticed(run, caplog, flips):
  """Files by their bytes, but each kind of them at least a few times."""
  about("faults", "bit flips")
  paths, rng, noticed = files_of(run / "20"), np.random.default_rng(flips), 0
  sizes = np.array([path.stat().st_size for path in paths])
  chance = 0.5 * sizes / sizes.sum() + 0.5 / len(paths)
  for _ in range(flips):
    path = paths[rng.choice(len(paths), p=chance)]
    good = path.read_bytes()
    bad = bytearray(good)
    bad[rng.integers(len(bad))] ^= 1 << rng.integers(8)
    path.write_bytes(bad)
    noticed += falls_back(run, caplog, path)
    path.write_bytes(good)
  assert noticed == flips
  assert train_cases.bytes_of(restore(run)) == train_cases.bytes_of(state(20))
  measured("faults", "bit flips", tried=flips, not_noticed=0, lost=0, bytes_differ=0)


@pytest.mark.parametrize("blocks", [6, pytest.param(500, marks=pytest.mark.slow)])
def test_every_changed_block_is_noticed(run, caplog, blocks):
  about("faults", "zeroed and random blocks")
  paths, rng, noticed = files_of(run / "20"), np.random.default_rng(blocks), 0
  for i in range(blocks):
    path = paths[rng.integers(len(paths))]
    good = path.read_bytes()
    begin = rng.integers(len(good))
    size = min(len(good) - begin, 512)
    block = bytes(size) if i % 2 else rng.bytes(size)
    path.write_bytes(good[:begin] + block + good[begin + size :])
    noticed += falls_back(run, caplog, path) if path.read_bytes() != good else 1
    path.write_bytes(good)
  assert noticed == blocks
  measured("faults", "zeroed and random blocks", tried=blocks, not_noticed=0)


@pytest.mark.parametrize(
  "how", ["emptied", *(pytest.param(x, marks=pytest.mark.slow) for x in ("cut", "halved", "longer", "lost"))]
)
def test_every_file_is_needed(run, caplog, how):
  about("faults", "files cut or lost")
  paths = files_of(run / "20")
  for path in paths if how != "emptied" else paths[::3]:
    good = path.read_bytes()
    bad = {"emptied": b"", "cut": good[:-1], "halved": good[: len(good) // 2], "longer": good + b"\0"}
    path.unlink() if how == "lost" else path.write_bytes(bad[how])
    assert falls_back(run, caplog, path), path
    path.write_bytes(good)
    measured("faults", "files cut or lost", tried=1, not_noticed=0)


def test_a_lost_manifest_and_what_is_no_file(run, caplog):
  path = run / "20" / "manifest.json"
  path.unlink()
  assert falls_back(run, caplog, path) and "missing" in caplog.text
  path.mkdir()
  assert falls_back(run, caplog, path) and "not a regular file" in caplog.text
  path.rmdir()
  shutil.copy(run / "10" / "manifest.json", path)
  assert falls_back(run, caplog, path) and "found step 10, expected 20" in caplog.text
  os.remove(path)
  path = max(files_of(run / "10"), key=lambda each: each.stat().st_size)
  path.unlink()
  os.mkfifo(path)
  with pytest.raises(CheckpointError, match=r"none of the steps \[10, 20\] can be read.*not a regular file"):
    restore(run)


def test_a_run_that_was_copied_moved_or_linked(run, tmp_path):
  copy = shutil.copytree(run, tmp_path / "copy")
  moved = shutil.move(copy, tmp_path / "moved")
  (tmp_path / "link").symlink_to(moved)
  for directory in (moved, tmp_path / "link"):
    assert train_cases.bytes_of(restore(directory)) == train_cases.bytes_of(state(20))
  alone = tmp_path / "alone"
  shutil.copytree(run / "10", alone / "10")
  assert train_cases.bytes_of(restore(alone)) == train_cases.bytes_of(state(10))
  (alone / "10").rename(alone / "11")
  with pytest.raises(CheckpointError, match=r"11/manifest\.json: found step 10, expected 11; give"):
    restore(alone)


def test_files_that_are_not_of_a_step(run, caplog):
  (run / "20" / "default" / ".DS_Store").write_text("a file manager's")
  (run / "20 (copy)").mkdir()
  (run / "030").mkdir()
  (run / "40").write_text("a file")
  assert int(restore(run)["step"]) == 20 and not caplog.text
  other = run / "20" / "default" / "notes.txt"
  other.write_text("mine")
  assert falls_back(run, caplog, other) and "not a file of this step; remove it" in caplog.text
  other.unlink()
  assert int(restore(run)["step"]) == 20


def test_only_what_a_save_left_is_removed(run):
  ours = ["30.saving", "5.removing", "30.orbax-checkpoint-tmp-17"]
  for name in (*ours, "mine.saving", "saving", "x.removing"):
    (run / name).mkdir()
    (run / name / "file").write_text(name)
  assert int(restore_tree(run)[0]) == 20 and (run / ours[0]).exists()  # who reads only, removes nothing
  restore(run)
  there = {path.name for path in run.iterdir()}
  assert there == {"10", "20", "run.json", "mine.saving", "saving", "x.removing"}


def test_steps_from_before_there_were_manifests(tmp_path, caplog):
  """They are read, and said not to be verified; the next save stands beside them, and is."""
  old = ocp.CheckpointManager(
    tmp_path, options=ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
  )
  for step in (10, 20):
    assert old.save(step, args=ocp.args.StandardSave(state(step)))
  old.close()
  assert train_cases.bytes_of(restore(tmp_path)) == train_cases.bytes_of(state(20))
  assert f"{tmp_path / '20'}: not verified, as it was saved before" in caplog.text
  assert restore_tree(tmp_path)[0] == 20
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(30, state(30))
    assert checkpoints.steps == [20, 30]
  for path in files_of(tmp_path / "30"):
    path.write_bytes(path.read_bytes()[:7])
  assert train_cases.bytes_of(restore(tmp_path)) == train_cases.bytes_of(state(20))


def test_old_steps_go_once_the_new_one_has_its_manifest(run, monkeypatch):
  """A save that fails at the very end leaves the two before it."""
  refuse = lambda *args: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no"))
  with Checkpoints(run) as checkpoints:
    with monkeypatch.context() as patch:
      patch.setattr(manifest, "write", refuse)
      with pytest.raises(OSError, match="No space left"):
        checkpoints.save(30, state(30))
    assert checkpoints.steps == [10, 20]
    with monkeypatch.context() as patch:
      rmtree = shutil.rmtree
      patch.setattr(
        shutil, "rmtree", lambda path, **kw: (refuse if path.suffix == ".removing" else rmtree)(path, **kw)
      )
      checkpoints.save(30, state(30))
    assert checkpoints.steps == [20, 30] and (run / "10.removing").exists()
  assert int(restore(run)["step"]) == 30 and not (run / "10.removing").exists()


def test_a_step_before_the_newest_is_not_saved(run):
  with (
    Checkpoints(run) as checkpoints,
    pytest.raises(CheckpointError, match="step 15 was not saved, as step 20 is"),
  ):
    checkpoints.save(15, state(15))


def test_room_is_asked_for_before_a_run_and_before_each_save(run, tmp_path, monkeypatch):
  size = sum(leaf.nbytes for leaf in (jnp.int32(0), *state(0)["params"].values()))
  for free, enough in ((1.5 * size - 1, False), (1.5 * size, True), (None, True)):
    with monkeypatch.context() as patch, Checkpoints(run) as checkpoints:
      patch.setattr(disk, "free_bytes", lambda directory, free=free: free if free is None else int(free))
      if enough:
        checkpoints.check_room(state(0))
        continue
      for call in (checkpoints.check_room, lambda state: checkpoints.save(30, state)):
        with pytest.raises(
          OSError, match=rf"{1.5 * size:.0f} bytes \(1.5 times the state\), and {int(free)}"
        ) as e:
          call(state(30))
        assert (e.value.errno, e.value.filename) == (errno.ENOSPC, str(run))
      assert checkpoints.steps == [10, 20]
  stepped = []
  monkeypatch.setattr(disk, "free_bytes", lambda directory: 10)
  monkeypatch.setattr(loop, "init_state", train_cases.first_state)
  with pytest.raises(OSError, match="and 10 are free"):
    train_cases.train(tmp_path / "new", 2, on_step=lambda *args: stepped.append(args))
  assert not stepped


def test_free_bytes_are_those_of_the_file_system(tmp_path):
  assert disk.free_bytes(tmp_path) == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.05)


def test_a_file_this_process_may_not_read_is_no_damage(run, monkeypatch):
  def refuse(path, synced=False):
    raise PermissionError(errno.EACCES, "Permission denied", str(path))

  monkeypatch.setattr(manifest, "_summed", refuse)
  with pytest.raises(PermissionError):
    restore(run)
  assert not (run / "quarantine").exists()


def test_a_failpoint_is_passed_unless_it_is_named(monkeypatch):
  killed = []
  monkeypatch.setattr(os, "kill", lambda *args: killed.append(args))
  monkeypatch.delenv(VARIABLE, raising=False)
  failpoint("save")
  monkeypatch.setenv(VARIABLE, "save:3")
  for name in ("save", "other", "save"):
    failpoint(name)
  assert not killed
  before = []
  failpoint("save", lambda: before.append(len(killed)))
  assert len(killed) == 1 and before == [0]


def test_the_names_of_a_state_are_plain(saved):
  assert re.fullmatch(r"[0-9a-f]{64}", json.loads((saved / "20" / "manifest.json").read_bytes())["sha256"])
  assert checkpoint.manifest.kinds(state(1)).keys() == {"step", "params/a", "params/b", "params/half"}
