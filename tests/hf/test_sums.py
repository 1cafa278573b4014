"""SHA-256 of all that a save writes: found again at loading, whichever bit of whichever file has changed."""

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import damage
import numpy as np
import pytest
from checkpoint_case import assert_equal_trees

from jaxllm import hf, tree
from jaxllm.errors import CheckpointError
from jaxllm.hf import loading, sums, writing
from jaxllm.leaf import dense

pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """What `save` writes of a model with a tokenizer, in two files of weights."""
  root = tmp_path_factory.mktemp("sums")
  good = damage.good(root / "good")
  cfg, params = hf.load(good)
  hf.save(root / "saved", cfg, params, hf.load_tokenizer(good), max_shard_bytes=150_000)
  return root / "saved"


@pytest.fixture
def copy(saved, tmp_path):
  return Path(shutil.copytree(saved, tmp_path / "model"))


def flip(path, at, bit):
  """One bit of a file changed in its place."""
  with open(path, "r+b") as file:
    file.seek(at)
    byte = file.read(1)[0]
    file.seek(at)
    file.write(bytes([byte ^ 1 << bit]))


@pytest.mark.core
def test_sha256sum_reads_them(copy):
  """All that was written is there, but for the sums themselves."""
  names = {path.name for path in copy.iterdir()}
  assert len([name for name in names if name.endswith(".safetensors")]) == 2
  assert sums.of(copy).digests.keys() == names - {sums.NAME}
  for name, digest in sums.of(copy).digests.items():
    assert digest == hashlib.sha256((copy / name).read_bytes()).hexdigest()
  if shutil.which("sha256sum"):
    done = subprocess.run(
      ["sha256sum", "--strict", "-c", sums.NAME], cwd=copy, capture_output=True, text=True, check=True
    )
    assert done.stdout.count(": OK") == len(names) - 1


def load(directory, name, **kwargs):
  """What reads a file: all of them the model, but for those of the tokenizer."""
  return (hf.load_tokenizer if name.startswith("tokenizer") else hf.load)(directory, **kwargs)


@pytest.mark.parametrize("count", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_a_bit_of_any_file(copy, count):
  """Found, whatever else would be said of it: the file, both sums, and what to do."""
  rng = np.random.default_rng(0)
  names = sorted(sums.of(copy).digests)
  assert len(names) == 7
  for name in names:
    data = (copy / name).read_bytes()
    for at in [0, len(data) - 1, *rng.integers(len(data), size=count)]:
      flip(copy / name, int(at), int(rng.integers(8)))
      found = hashlib.sha256((copy / name).read_bytes()).hexdigest()
      with pytest.raises(CheckpointError) as e:
        load(copy, name)
      assert re.search(
        rf"{copy}: not the files that were saved; fetch them and SHA256SUMS again, or, .* verify=False, or remove SHA256SUMS\n"
        rf"  {name}: found the SHA-256 {found}, expected {hashlib.sha256(data).hexdigest()}, by {copy}/SHA256SUMS$",
        str(e.value),
      )
      (copy / name).write_bytes(data)
  load(copy, "config.json")
  load(copy, "tokenizer.json")


def test_without_verification_a_finite_flip_gets_in(copy, caplog):
  """Which is what the sums are for; the log says that nothing was verified, once."""
  name = "model-00001-of-00002.safetensors"
  flip(copy / name, (copy / name).stat().st_size - 1, 0)
  with caplog.at_level(logging.INFO, logger="jaxllm"):
    hf.load(copy, verify=False)
  assert caplog.text.count("the files were not verified") == 1
  with pytest.raises(CheckpointError, match=name):
    hf.load(copy)


def test_what_was_verified_is_said(copy, caplog):
  with caplog.at_level(logging.INFO, logger="jaxllm"):
    hf.load(copy)
  assert caplog.text.count("2 of 2 files of weights have the sums that were kept of them") == 1
  caplog.clear()
  (copy / sums.NAME).unlink()
  with caplog.at_level(logging.INFO, logger="jaxllm"):
    hf.load(copy)
  assert caplog.text.count("the files were not verified, as there is no SHA256SUMS beside them") == 1


DAMAGED = {
  "a file that is missing": (damage.gone("generation_config.json"), "lists generation_config.json, not there"),
  "a shard that is missing": (
    damage.gone("model-00002-of-00002.safetensors"),
    "lists model-00002-of-00002.safetensors, not there; fetch the files again",
  ),
  "no sums": (damage.content(sums.NAME, ""), "found no sums"),
  "other lines": (damage.content(sums.NAME, "# sums\n"), "line 1: found '# sums', expected the 64 hexadecimal"),
  "no digits": (damage.content(sums.NAME, f"{'g' * 64}  config.json\n"), "line 1: found 'ggg"),
  "no text": (damage.content(sums.NAME, b"\xff\0" * 50), "line 1: found"),
  "too large": (damage.content(sums.NAME, "0" * (5 << 20)), "expected at most 4,194,304"),
  "a name twice": (damage.content(sums.NAME, 2 * f"{'0' * 64}  config.json\n"), "line 2: found"),
  "itself": (damage.content(sums.NAME, f"{'0' * 64}  {sums.NAME}\n"), "line 1: found"),
  "a link outside": (lambda directory: damage.instead(sums.NAME, damage.outside)(directory), "outside of the model"),
  "a fifo": (damage.instead(sums.NAME, os.mkfifo), "not a regular file"),
} | {
  f"the name {name!r}": (damage.content(sums.NAME, f"{'0' * 64}  {name}\n"), "line 1: found .*the plain name of a file")
  for name in ("../x", "/etc/passwd", "a/b", "..", "C:\\x", "")
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_sums_that_do_not_fit(copy, case):
  change, reason = DAMAGED[case]
  change(copy)
  with pytest.raises(CheckpointError, match=reason):
    hf.load(copy)
  if "missing" not in case:
    hf.load(copy, verify=False)


def test_weights_that_were_put_there_are_not_read(copy):
  """A model.safetensors comes before the index: one that was not saved with the rest is refused by its name."""
  cfg, params = hf.load(copy)
  hf.save(copy.parent / "other", cfg, params)
  shutil.copy(copy.parent / "other" / "model.safetensors", copy)
  with pytest.raises(CheckpointError, match=r"SHA256SUMS: does not list model.safetensors, which"):
    hf.load(copy)


def test_a_save_over_another_has_its_own_sums(copy):
  """And of files that stay from before, as the tokenizer, nothing is said any more."""
  cfg, params = hf.load(copy)
  hf.save(copy, cfg, params)
  assert sums.of(copy).digests.keys() == {"config.json", "generation_config.json", "model.safetensors"}
  assert (copy / "tokenizer.json").exists() and hf.load_tokenizer(copy).vocab_size == 5
  hf.load(copy)


def test_files_are_read_while_they_are_hashed(copy, monkeypatch):
  """Weights are read before their sums are known, and no parameters come out where one of them is another."""
  order, read = [], threading.Event()
  digest, load_params = sums.digest, loading.load_params

  def hashing(path, like, stop=None):
    if path.suffix == ".safetensors":
      assert read.wait(60)
      order.append("hashed")
    return digest(path, like, stop)

  def reading(*args):
    out = load_params(*args)
    order.append("read")
    read.set()
    return out

  monkeypatch.setattr(sums, "digest", hashing)
  monkeypatch.setattr(loading, "load_params", reading)
  hf.load(copy)
  assert order == ["read", "hashed", "hashed"]


def test_an_interruption_does_not_wait_for_the_sums(copy, monkeypatch):
  def interrupted(*args):
    raise KeyboardInterrupt

  monkeypatch.setattr(loading, "load_params", interrupted)
  monkeypatch.setattr(sums, "CHUNK", 1)  # a call of the system a byte, stopped after the first
  with pytest.raises(KeyboardInterrupt):
    hf.load(copy)


def git(data):
  """The name that git has for a blob."""
  return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@pytest.fixture
def snapshot(saved, tmp_path):
  """A hub cache of the model: blobs of weights are named by their SHA-256, others as git names them."""
  home = tmp_path / "models--owner--tiny"
  directory = home / "snapshots" / "abc"
  for place in (directory, home / "blobs"):
    place.mkdir(parents=True)
  for path in saved.iterdir():
    if path.name != sums.NAME:
      data = path.read_bytes()
      name = hashlib.sha256(data).hexdigest() if path.suffix == ".safetensors" else git(data)
      (home / "blobs" / name).write_bytes(data)
      (directory / path.name).symlink_to(f"../../blobs/{name}")
  return directory


def test_blobs_of_the_hub_have_their_sums_as_names(snapshot, saved):
  assert_equal_trees(
    hf.load(snapshot)[1],
    tree.unflatten({k: np.asarray(dense(v)) for k, v in tree.flatten(hf.load(saved)[1]).items()}),
  )
  for name, kind in (
    ("model-00001-of-00002.safetensors", "SHA-256"),
    ("config.json", "git's SHA-1"),
    ("tokenizer.json", "git's SHA-1"),
  ):
    data = (snapshot / name).read_bytes()
    flip((snapshot / name).resolve(), len(data) - 1, 1)
    with pytest.raises(
      CheckpointError,
      match=rf"{name}: found the {kind} [0-9a-f]+, expected [0-9a-f]+, by the name of its blob",
    ):
      load(snapshot, name)
    (snapshot / name).resolve().write_bytes(data)


def test_other_names_of_blobs_say_nothing(snapshot, caplog):
  for i, path in enumerate(sorted(snapshot.iterdir())):
    path.resolve().rename(blob := path.resolve().with_name(f"etag-{i}"))
    path.unlink()
    path.symlink_to(blob)
  with caplog.at_level(logging.INFO, logger="jaxllm"):
    hf.load(snapshot)
  assert caplog.text.count("the files were not verified") == 1


def test_a_link_to_itself_is_told_where_it_is_read(snapshot):
  (snapshot / "notes.txt").symlink_to("notes.txt")
  hf.load(snapshot)
  (snapshot / "config.json").unlink()
  (snapshot / "config.json").symlink_to("config.json")
  with pytest.raises(CheckpointError, match=r"config.json: cannot be read \((RuntimeError|OSError)"):
    hf.load(snapshot)


def test_the_sums_are_of_what_was_written(tmp_path):
  """Not of what was meant: the file is hashed piece by piece as it goes out."""
  pieces = [b"a" * 10, memoryview(b"b" * 100_000), b""]
  assert (
    writing.write_file(tmp_path / "x", iter(pieces))
    == hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest()
  )


def test_the_flag_of_the_scripts(copy, tmp_path):
  """--noverify reads what --verify refuses, of the same text."""
  (tmp_path / "text").write_text("hello world " * 30)
  flip(
    copy / "model-00001-of-00002.safetensors",
    -1 % (copy / "model-00001-of-00002.safetensors").stat().st_size,
    0,
  )
  from experiments.checkpoint import Checkpoint

  with pytest.raises(CheckpointError, match="not the files that were saved"):
    Checkpoint.open(str(copy)).params()
  assert json.dumps(sorted(Checkpoint.open(str(copy), verify=False).params())) == json.dumps(
    ["embed", "final_norm", "head", "layers"]
  )
  for module in ("evaluate", "length_extrapolation"):
    done = subprocess.run(
      [sys.executable, "-m", f"experiments.{module}", "--help"], capture_output=True, text=True, check=True
    )
    assert re.search(r"--verify  \(default true\)\s+.*compare the files with the SHA-256", done.stdout)
