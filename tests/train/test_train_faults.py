"""Checkpoints that the system refuses, that are of another run or all damaged; file names and folders that are hard to read."""

import dataclasses
import errno
import os
import resource
import shutil
import signal

import jax.numpy as jnp
import numpy as np
import pytest
import train_cases

from jaxllm.errors import CheckpointError, DataError
from jaxllm.nn import Transformer
from jaxllm.train import data, loop
from jaxllm.train.checkpoint import Checkpoints

# A restore that fails inside Orbax leaves callbacks for an event loop that is closed by then.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def state(step):
  weights = np.random.default_rng(step).standard_normal((64, 64)).astype(np.float32)
  return {"step": jnp.int32(step), "w": jnp.asarray(weights)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  directory = tmp_path_factory.mktemp("saved")
  with Checkpoints(directory) as checkpoints:
    for step in (10, 20):
      checkpoints.save(step, state(step))
  return directory


@pytest.fixture
def run(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / "run")


def damage(directory):
  for path in directory.rglob("*"):
    if path.is_file():
      path.write_bytes(path.read_bytes()[:7])


def restore(directory):
  with Checkpoints(directory) as checkpoints:
    return checkpoints.restore(state(0))


@pytest.mark.core
def test_a_disk_that_takes_no_more_is_an_os_error_and_the_save_can_be_repeated(run):
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  with Checkpoints(run) as checkpoints:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
      with pytest.raises(OSError) as e:
        checkpoints.save(30, state(30))
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
      signal.signal(signal.SIGXFSZ, ignored)
    assert e.value.errno == errno.EFBIG and e.value.filename == str(run)
    assert checkpoints.steps == [10, 20]
    checkpoints.save(30, state(30))
  assert int(restore(run)["step"]) == 30


@pytest.mark.parametrize(
  ("raised", "code"),
  [
    (ValueError("Failed to write 9 bytes: No space left on device [os_error_code='28']"), errno.ENOSPC),
    (RuntimeError("No space left on device"), errno.ENOSPC),
    (OSError(errno.EDQUOT, "quota"), errno.EDQUOT),
    (ValueError("DATA_LOSS"), errno.EIO),
  ],
)
def test_errors_of_a_save_keep_their_number(run, monkeypatch, raised, code):
  with Checkpoints(run) as checkpoints:
    monkeypatch.setattr(checkpoints._orbax, "save", raising(raised))
    with pytest.raises(OSError) as e:
      checkpoints.save(30, state(30))
  assert (e.value.errno, e.value.filename) == (code, str(run))
  assert code != errno.EIO or "(ValueError: DATA_LOSS)" in e.value.strerror


def raising(error):
  def call(*args, **kwargs):
    raise error

  return call


@pytest.mark.parametrize(
  "raised",
  [
    MemoryError(),
    OSError(errno.EMFILE, "files"),
    PermissionError(errno.EACCES, "no"),
    ValueError("PERMISSION_DENIED: Error opening [os_error_code='13']"),
  ],
  ids=["memory", "files", "access", "access in the text"],
)
def test_what_is_no_damage_moves_nothing(run, monkeypatch, raised):
  with Checkpoints(run) as checkpoints:
    monkeypatch.setattr(checkpoints._orbax, "restore", raising(raised))
    with pytest.raises(MemoryError if isinstance(raised, MemoryError) else OSError):
      checkpoints.restore(state(0))
    assert checkpoints.steps == [10, 20]
  assert not (run / "quarantine").exists()


def test_one_step_can_be_damaged_again_and_again(run):
  for _ in range(3):
    damage(run / "20")
    with Checkpoints(run) as checkpoints:
      assert int(checkpoints.restore(state(0))["step"]) == 10
      checkpoints.save(20, state(20))
  assert sorted(path.name for path in (run / "quarantine").iterdir()) == ["20", "20-1", "20-2"]


def test_all_damaged_says_the_same_on_every_run(run):
  damage(run)
  for _ in range(2):
    with pytest.raises(CheckpointError, match=r"none of the steps \[10, 20\] can be read"):
      restore(run)
  assert not (run / "quarantine").exists()


def test_the_identity_is_written_once_and_compared(tmp_path):
  identity = {"model": {"embed_dim": 16, "layers": [{"window": None}]}, "seed": 0}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.check_identity(identity)
    checkpoints.check_identity(identity)
    with pytest.raises(
      CheckpointError,
      match=r"run.json: another run's .*\(model/layers: .* there, .* here; seed: 0 there, 1 here\).*--out",
    ):
      checkpoints.check_identity({"model": {"embed_dim": 16, "layers": [{"window": 4}]}, "seed": 1})
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"run.json: not a JSON object"):
      checkpoints.check_identity(identity)


@pytest.fixture
def traced_once(monkeypatch):
  monkeypatch.setattr(loop, "make_step", train_cases.compiled_step)
  monkeypatch.setattr(loop, "init_state", train_cases.first_state)


def fit(directory, text=train_cases.TEXT, seed=3, steps=2, cfg=train_cases.CFG, **config):
  config = train_cases.config(steps, **config)
  source = data.Stretches(text, seed, train_cases.BATCH, train_cases.LENGTH)
  return loop.fit(Transformer(cfg), config, source, seed, directory)


@pytest.mark.parametrize(
  ("other", "named"),
  [
    ({"text": train_cases.TEXT[:-1]}, "text_sha256"),
    ({"seed": 4}, "seed"),
    ({"weight_decay": 0.2}, "training/weight_decay"),
    ({"cfg": dataclasses.replace(train_cases.CFG, dtype="bfloat16")}, "model/dtype"),
  ],
)
def test_checkpoints_of_another_run_are_not_trained_on(tmp_path, traced_once, other, named):
  before = train_cases.bytes_of(fit(tmp_path))
  with pytest.raises(
    CheckpointError, match=rf"run.json: another run's checkpoints \({named}: .+ there, .+ here\)"
  ):
    fit(tmp_path, **other)
  assert train_cases.bytes_of(fit(tmp_path)) == before


def test_a_run_that_went_further_is_refused(tmp_path, traced_once):
  fit(tmp_path, steps=4)
  (tmp_path / "run.json").unlink()
  with pytest.raises(CheckpointError, match="trained for 4 steps, expected at most 2"):
    fit(tmp_path, steps=2)


NAMES = [b"caf\xe9", b"\xff\xfe", "né".encode()]


def test_names_that_are_not_utf_8(tmp_path):
  for i in range(400):
    path = os.path.join(os.fsencode(tmp_path), NAMES[i % 3] + b"%d" % i)
    with open(path, "wb") as file:
      file.write(b"file %03d\n" % i)
  corpus = data.load_corpus(str(tmp_path))
  assert corpus.about["split"] == "by file" and corpus.about["files"] == 400
  one = os.fsdecode(os.path.join(os.fsencode(tmp_path), NAMES[0] + b"0"))
  assert data.load_corpus(one).about["source"] == f"{tmp_path}/caf\\xe90"
  with open(one, "wb") as file:
    file.write(b"\xff")
  with pytest.raises(DataError, match=r"caf\\xe90: not UTF-8") as e:
    data.load_corpus(str(tmp_path))
  str(e.value).encode()


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
  for name in ("open", "shut", ".hidden"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "text").write_text(name)
  scandir = os.scandir

  def refuse(path):
    if str(path).endswith(("shut", ".hidden")):
      raise PermissionError(errno.EACCES, "Permission denied", path)
    return scandir(path)

  monkeypatch.setattr(os, "scandir", refuse)
  with pytest.raises(PermissionError) as e:
    data.load_corpus(str(tmp_path))
  assert e.value.filename == str(tmp_path / "shut")
  shutil.rmtree(tmp_path / "open")
  monkeypatch.undo()
  assert data.load_corpus(str(tmp_path)).about["bytes"] == len("shut")


def test_windows_are_not_to_share_their_last_block():
  about = {"bytes": 1000}
  corpus = lambda n: data.Corpus(np.zeros(900, np.uint8), np.zeros(n, np.uint8), about)
  data.check_size(corpus(64 + 1 + 4 * 16), "--corpus=x", 16, 64, 4)
  with pytest.raises(DataError, match=r"--corpus=x: .* validation part of 128, expected at least 129"):
    data.check_size(corpus(64 + 4 * 16), "--corpus=x", 16, 64, 4)
