"""Model directories read strictly: what safetensors writes is read; what is refused is in bad_files.py."""

import json
import os

import damage
import ml_dtypes
import numpy as np
import pytest
from checkpoint_case import write
from safetensors.numpy import save_file

from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.hf import header
from jaxllm.hf.files import Checkpoint
from jaxllm.hf.header import read_header
from jaxllm.hf.plain import open_plain, plain_file, read_json


@pytest.mark.core
def test_views_of_what_safetensors_wrote(tmp_path):
  """Of every type, empty and scalar ones too, without a copy and read-only."""
  rng = np.random.default_rng(0)
  kinds = [
    kind
    for kind in header.DTYPES.values()
    if kind.name not in ("float8_e8m0fnu", "float8_e4m3fn", "float8_e5m2")
  ]
  stored = {f"t{i}": rng.integers(0, 2, (i, 3)).astype(kind) for i, kind in enumerate(kinds)}
  stored |= {
    "scalar": np.array(2.5, np.float32),
    "bf16": rng.standard_normal((5, 7)).astype(ml_dtypes.bfloat16),
  }
  save_file(stored, tmp_path / "model.safetensors")
  checkpoint = Checkpoint(tmp_path)
  assert checkpoint.tensors.keys() == stored.keys()
  for name, x in stored.items():
    view = checkpoint.view(name)
    assert view.dtype == x.dtype and view.shape == x.shape and view.tobytes() == x.tobytes()
    assert not view.flags.writeable or not view.size
    assert not view.flags.owndata or not view.size


def test_a_file_cut_anywhere_is_refused(tmp_path):
  damage.raw(name="whole")(tmp_path)
  whole = (tmp_path / "whole").read_bytes()
  assert read_header(tmp_path / "whole")["a"].start == len(whole) - 25
  for n in range(len(whole)):
    (tmp_path / "cut").write_bytes(whole[:n])
    with pytest.raises(CheckpointError, match=r"cut short|found a header of 0"):
      read_header(tmp_path / "cut")


def index(directory, weight_map):
  (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_that_disagree_with_the_index_are_named_in_one_message(tmp_path):
  one = np.ones(2, np.float32)
  save_file({"a": one, "b": one, "extra": one}, tmp_path / "one.safetensors")
  save_file({"b": one, "c": one}, tmp_path / "two.safetensors")
  index(
    tmp_path,
    dict(
      a="one.safetensors", b="one.safetensors", c="two.safetensors", d="two.safetensors", e="gone.safetensors"
    ),
  )
  with pytest.raises(CheckpointError) as e:
    Checkpoint(tmp_path)
  assert [line.strip() for line in str(e.value).splitlines()[1:]] == [
    "one.safetensors: holds extra, not in the index",
    "two.safetensors: lacks d, which the index has there",
    "two.safetensors: holds b, which the index has in one.safetensors",
    "gone.safetensors: no such file; it should hold 1 tensors (e)",
  ]


def test_a_directory_without_a_model(tmp_path):
  with pytest.raises(CheckpointError, match=r"no model.safetensors or model.safetensors.index.json"):
    Checkpoint(tmp_path)
  with pytest.raises(CheckpointError, match="no such directory"):
    Checkpoint(tmp_path / "none")


def test_links_stay_inside(tmp_path):
  """In the directory, or from a snapshot of a hub cache to the blobs of its own repository."""
  home = tmp_path / "models--owner--name" / "snapshots" / "abc"
  blobs = tmp_path / "models--owner--name" / "blobs"
  for folder in (home, blobs, tmp_path / "else"):
    folder.mkdir(parents=True)
    (folder / "file").write_text("{}")
  for target, allowed in ((home, True), (blobs, True), (tmp_path / "else", False)):
    (home / "link").unlink(missing_ok=True)
    (home / "link").symlink_to(target / "file")
    if allowed:
      assert plain_file(home, "link").read_text() == "{}"
    else:
      with pytest.raises(CheckpointError, match=r"a link to .*outside of the model's directory"):
        plain_file(home, "link")
  (tmp_path / "else" / "link").symlink_to(blobs / "file")
  with pytest.raises(CheckpointError, match="outside"):  # no snapshot
    plain_file(tmp_path / "else", "link")


def test_one_file_comes_before_an_index(tmp_path):
  """As transformers has it; the index beside it is not read."""
  write(tmp_path)
  index(tmp_path, {"a": "gone.safetensors"})
  assert "lm_head.weight" in Checkpoint(tmp_path).tensors


def test_json_files(tmp_path):
  (tmp_path / "a.json").write_text('{"ä": [1, 2.5, true, null]}')
  assert read_json(tmp_path / "a.json", ConfigError) == {"ä": [1, 2.5, True, None]}
  with pytest.raises(ConfigError, match="expected at most 10"):
    read_json(tmp_path / "a.json", ConfigError, 10)
  (tmp_path / "a.json").write_text("[1]")
  with pytest.raises(ConfigError, match="a JSON list, expected an object"):
    read_json(tmp_path / "a.json", ConfigError)


@pytest.mark.parametrize("kind", ["fifo", "directory", "nothing", "unreadable"])
def test_what_is_no_file_by_the_time_it_is_opened(tmp_path, monkeypatch, kind):
  """It is told at once: the open of a FIFO would wait for somebody who writes."""
  path = tmp_path / "x"
  if kind == "fifo":
    os.mkfifo(path)
  if kind == "directory":
    path.mkdir()
  if kind == "unreadable":  # the tests may be run by root, who may read all

    def refuse(*args):
      raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
  with pytest.raises(
    CheckpointError, match=rf"{path}: (not a regular file|cannot be read \((FileNotFound|Permission)Error)"
  ):
    open_plain(path)
