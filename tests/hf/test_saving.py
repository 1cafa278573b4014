"""Parameters to files: equal bytes of every layout and type, whole or not there, and only what could be loaded again."""

import contextlib
import dataclasses
import functools
import json
import os

import jax
import numpy as np
import pytest
from checkpoint_case import (
  BIASES,
  LAYOUTS,
  PLAIN,
  TYPES,
  assert_equal_trees,
  config,
  family,
  params,
  source,
  tensors,
  write,
)
from safetensors import safe_open
from safetensors.numpy import load_file

from jaxllm import parallel, tree
from jaxllm.errors import CheckpointError, TokenizerError
from jaxllm.hf import loading, saving, writing
from jaxllm.hf.files import Checkpoint, read_header
from jaxllm.hf.tokenizer import byte_tokenizer
from jaxllm.leaf import Matrix


def load_again(directory, cfg, layout="separate", plain=PLAIN, **kwargs):
  return loading.load_params(
    Checkpoint(directory), family(LAYOUTS[layout]), cfg, source(directory, plain), **kwargs
  )


def save(directory, cfg, weights, layout="separate", plain=PLAIN, **kwargs):
  saving.save_tensors(directory, family(LAYOUTS[layout]), plain, cfg, weights, **kwargs)


def stored(directory):
  """All tensors of a directory, by safetensors."""
  return {name: x for path in sorted(directory.glob("*.safetensors")) for name, x in load_file(path).items()}


def assert_equal_tensors(found, expected):
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    assert (found[name].dtype, found[name].shape) == (x.dtype, x.shape) and found[
      name
    ].tobytes() == x.tobytes(), name


@pytest.mark.core
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_round_trip_is_exact(tmp_path, layout, name):
  """What was loaded is saved as the tensors it came from, and loaded again the same."""
  plain = PLAIN | {"biases": BIASES, "dtype": name}
  cfg, weights, expected = write(tmp_path / "a", layout, plain, TYPES[name])
  loaded = load_again(tmp_path / "a", cfg, layout, plain)
  save(tmp_path / "b", cfg, loaded, layout, plain)
  assert_equal_tensors(stored(tmp_path / "b"), expected)
  assert_equal_trees(load_again(tmp_path / "b", cfg, layout, plain), weights)
  assert json.loads((tmp_path / "b" / "config.json").read_text()) == plain | {"biases": list(BIASES)}
  save(tmp_path / "c", cfg, weights, layout, plain)  # of plain NumPy [in, out]
  assert (tmp_path / "b" / "model.safetensors").read_bytes() == (
    tmp_path / "c" / "model.safetensors"
  ).read_bytes()


def test_the_file_as_transformers_wants_it(tmp_path):
  cfg = config()
  save(tmp_path, cfg, params(cfg))
  with safe_open(tmp_path / "model.safetensors", "np") as file:
    assert file.metadata() == {"format": "pt"}
  assert {tensor.start % 64 for tensor in read_header(tmp_path / "model.safetensors").values()} <= {0}


@pytest.mark.parametrize("most", [1, 20_000, 60_000])
def test_several_files(tmp_path, most):
  cfg, weights, expected = write(tmp_path / "a")
  save(tmp_path / "b", cfg, weights, max_shard_bytes=most)
  files = sorted((tmp_path / "b").glob("*.safetensors"))
  assert [path.name for path in files] == [
    f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))
  ]
  for path in files:
    held = load_file(path)
    assert sum(x.nbytes for x in held.values()) <= most or len(held) == 1
  index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
  assert index["metadata"]["total_size"] == sum(x.nbytes for x in expected.values())
  assert index["weight_map"] == {name: path.name for path in files for name in load_file(path)}
  assert_equal_tensors(stored(tmp_path / "b"), expected)
  assert_equal_trees(load_again(tmp_path / "b", cfg), weights)


@pytest.mark.parametrize("layout", ["blocks", "stacked", "turned"])
@pytest.mark.parametrize("rules", ["fsdp", "tensor"])
def test_from_a_mesh_without_its_padding(tmp_path, rules, layout):
  cfg, _, expected = write(tmp_path / "a", layout)
  mesh = parallel.make_mesh("fsdp=4,tensor=2")
  placed = load_again(tmp_path / "a", cfg, layout, mesh=mesh, rules=parallel.RULES[rules])
  assert (placed["embed"].shape[0] == 62) == (rules == "tensor")
  save(tmp_path / "b", cfg, placed, layout)
  assert_equal_tensors(stored(tmp_path / "b"), expected)


TWO = {"max_shard_bytes": 42_000}


@pytest.mark.parametrize("first, second", [({}, TWO), (TWO, {})])
def test_an_interrupted_save_leaves_the_old_model_the_new_one_or_none(tmp_path, monkeypatch, first, second):
  """Stopped at each call of the system that changes the disk, as a kill would stop it: nothing after it is done."""
  plain = PLAIN | {"num_hidden_layers": 1}
  cfg = config(plain)
  load = functools.partial(load_again, plain=plain)
  old, new = params(cfg), params(cfg, seed=1)
  calls = {"left": None}

  class Stop(BaseException):
    pass

  def counted(call):
    def wrapped(*args, **kwargs):
      if calls["left"] is not None:
        if calls["left"] <= 0:
          raise Stop
        calls["left"] -= 1
      return call(*args, **kwargs)

    return wrapped

  monkeypatch.setattr(os, "replace", counted(os.replace))
  monkeypatch.setattr(writing, "write_file", counted(writing.write_file))
  monkeypatch.setattr(type(tmp_path), "unlink", counted(type(tmp_path).unlink))
  outcomes, stops = [], 0
  while True:
    directory = tmp_path / str(stops)
    calls["left"] = None
    save(directory, cfg, old, **first)
    calls["left"] = stops
    with contextlib.suppress(Stop):
      save(directory, cfg, new, **second)
    done, calls["left"] = calls["left"] > 0, None
    found = load(directory, cfg) if (directory / "config.json").exists() else None
    which = "none" if found is None else "old" if np.array_equal(found["embed"], old["embed"]) else "new"
    if found is not None:
      assert_equal_trees(found, old if which == "old" else new)
    outcomes.append(which)
    if done:
      break
    # and the next save mends all of it
    save(directory, cfg, new, **second)
    assert_equal_trees(load(directory, cfg), new)
    assert not [path for path in directory.iterdir() if path.name.endswith(".tmp")]
    stops += 1
  assert outcomes == sorted(outcomes, key=["old", "none", "new"].index) and set(outcomes) == {
    "old",
    "none",
    "new",
  }


def test_a_full_disk_leaves_the_old_model(tmp_path, monkeypatch):
  cfg = config()
  old = params(cfg)
  save(tmp_path, cfg, old)
  before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

  def full(fd):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(OSError, match="No space left"):
    save(tmp_path, cfg, params(cfg, seed=1))
  assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_save_that_ends_among_the_names_loses_nothing(tmp_path, monkeypatch, caplog):
  """A file that cannot get its name after config.json went: the new model is there under the other names."""
  cfg = config()
  new = params(cfg, seed=1)
  save(tmp_path, cfg, params(cfg))
  replace = os.replace

  def refuse(source, target):
    if target.name == "model.safetensors":
      raise PermissionError(1, "not that one")
    replace(source, target)

  with monkeypatch.context() as patch:
    patch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError, match="not that one"):
      save(tmp_path, cfg, new)
  assert "are complete under .<name>.tmp: rename them, config.json the last" in caplog.text
  assert not (tmp_path / "config.json").exists()
  for name in ("model.safetensors", "config.json"):
    replace(tmp_path / f".{name}.tmp", tmp_path / name)
  assert_equal_trees(load_again(tmp_path, cfg), new)


def test_what_a_save_does_not_write_through_or_over(tmp_path):
  cfg = config()
  weights = params(cfg)
  model, other = tmp_path / "model", tmp_path / "other"
  other.write_text("mine")
  model.mkdir()
  (model / ".config.json.tmp").symlink_to(other)
  save(model, cfg, weights)
  assert other.read_text() == "mine" and not (model / "config.json").is_symlink()
  before = {path.name: path.read_bytes() for path in model.iterdir()}
  (model / "model-00002-of-00003.safetensors").mkdir()
  with pytest.raises(
    CheckpointError, match=r"00002-of-00003\.safetensors: found a directory, expected a file"
  ):
    save(model, cfg, weights, max_shard_bytes=40_000)
  (model / "model-00002-of-00003.safetensors").rmdir()
  assert {path.name: path.read_bytes() for path in model.iterdir()} == before
  for path in (other, other / "x"):
    with pytest.raises(CheckpointError, match=f"{path}: a file, or in one, expected a directory"):
      save(path, cfg, weights)
  with writing.locked(model), pytest.raises(CheckpointError, match="another save is writing to it"):
    save(model, cfg, weights)
  save(model, cfg, weights)


def test_a_tokenizer_that_stays_is_told_and_one_that_is_none_is_refused(tmp_path, caplog):
  cfg = config(PLAIN | {"vocab_size": 256})
  weights = params(cfg)
  save(tmp_path, cfg, weights, tokenizer=byte_tokenizer())
  assert not caplog.records
  save(tmp_path, cfg, weights)
  assert "keeps tokenizer.json, tokenizer_config.json, which are not of this save" in caplog.text
  with pytest.raises(TokenizerError, match=r"tokenizer: found str, expected what hf\.load_tokenizer gives"):
    saving.save(tmp_path, cfg, weights, "tokenizer.json")


@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize("failed", ["here", "there", "nowhere"])
def test_processes_fail_together(tmp_path, monkeypatch, process, failed):
  """Each reads every entry once, whatever happens, as the others wait for its shards; then each hears of all."""
  cfg, read, told = config(), [], []

  def gather(mine):
    told.append(bool(mine))
    return np.array([mine, failed == "there"][:: 1 - 2 * process])

  def full(path, pieces):
    raise OSError(28, f"No space left on device for {next(pieces)[:8]}")

  entries = saving._entries

  def counted(*args):
    def of(entry):
      def reads():
        read.append(entry.name)
        if failed == "here" and process == 1 and len(read) == 2:
          raise CheckpointError("not a number")
        return entry.read()

      return dataclasses.replace(entry, read=reads)

    return [of(entry) for entry in entries(*args)]

  monkeypatch.setattr(saving, "_entries", counted)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(jax, "process_index", lambda: process)
  monkeypatch.setattr(saving.multihost_utils, "process_allgather", gather)
  if failed == "here" and process == 0:
    monkeypatch.setattr(writing, "write_file", full)
  expected = {
    "here": (OSError, "No space") if process == 0 else (CheckpointError, "not a number"),
    "there": (CheckpointError, f"process {1 - process} could not save"),
  }
  if failed == "nowhere":
    save(tmp_path, cfg, params(cfg))
  else:
    with pytest.raises(expected[failed][0], match=expected[failed][1]):
      save(tmp_path, cfg, params(cfg))
  assert sorted(read) == sorted(set(read)) and len(read) == len(tensors("separate", cfg, params(cfg)))
  assert told == [failed == "here"]


def test_nothing_of_another_model_stays(tmp_path):
  """Files of a save before, of other names, and the tokenizer where another one comes; what is somebody's own does."""
  cfg = config(PLAIN | {"vocab_size": 256})
  weights = params(cfg)
  save(tmp_path, cfg, weights, max_shard_bytes=60_000)
  for name in ("README.md", "tokenizer.model", "special_tokens_map.json"):
    (tmp_path / name).write_text("{}")
  save(tmp_path, cfg, weights)
  left = {"README.md", "SHA256SUMS", "config.json", "model.safetensors"}
  assert {path.name for path in tmp_path.iterdir()} == left | {"tokenizer.model", "special_tokens_map.json"}
  save(tmp_path, cfg, weights, tokenizer=byte_tokenizer())
  assert {path.name for path in tmp_path.iterdir()} == left | {"tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize("ids, written", [((), None), ((2,), 2), ((2, 7), [2, 7])])
def test_eos_ids(tmp_path, ids, written):
  cfg = dataclasses.replace(config(), eos_ids=ids)
  save(tmp_path, cfg, params(cfg))
  path = tmp_path / "generation_config.json"
  assert (json.loads(path.read_text())["eos_token_id"] if path.exists() else None) == written


def replaced(path, change):
  """The parameters with another leaf at a path, or without it for None."""

  def change_one(weights):
    flat = tree.flatten(weights)
    leaf = change(flat.pop(path))
    return tree.unflatten(flat if leaf is None else flat | {path: leaf})

  return change_one


def nan(x):
  x = x.copy()
  x[7, 5] = np.nan
  return x


UP = "layers/1/mlp/up/w"
BAD = {
  "missing": (replaced(UP, lambda x: None), f"missing: {UP} .48, 80."),
  "unexpected": (lambda w: w | {"extra": w["embed"]}, "unexpected: extra"),
  "shape": (replaced(UP, lambda x: x[:, :70]), f"shape: {UP} is .48, 70., expected .48, 80."),
  "type": (
    replaced(UP, lambda x: x.astype(np.int8)),
    f"not arrays of float32, float16, bfloat16\n  {UP}: ndarray",
  ),
  "no array": (replaced(UP, lambda x: "a text"), f"{UP}: str"),
  "nan": (replaced(UP, nan), rf"params: {UP}: 1 value is NaN or infinite, the first at \[7, 5\]"),
  "stacked": (lambda w: tree.stack_layers(w, 1), "found stacked layers.*tree.unstack_layers"),
  "mixed types": (
    replaced(UP, lambda x: x.astype(np.float16)),
    f"layers/1/mlp/gate/w, {UP} are float16, float32, expected one type, as they are one tensor, .*gate_up_proj",
  ),
}


@pytest.mark.parametrize("case", BAD)
def test_parameters_that_are_not_the_model(tmp_path, case):
  change, reason = BAD[case]
  cfg = config()
  with pytest.raises(CheckpointError, match=reason):
    save(tmp_path / "x", cfg, change(params(cfg)), "blocks")
  assert not (tmp_path / "x" / "config.json").exists()


def test_jax_leaves_in_either_layout(tmp_path):
  """Matrices that hold [in, out], and arrays of JAX."""
  cfg = config()
  weights = params(cfg)
  leaves = jax.tree.map(
    lambda x: Matrix(jax.numpy.asarray(x), "io") if x.ndim == 2 and x.shape != (61, 48) else x, weights
  )
  save(tmp_path, cfg, leaves)
  assert_equal_tensors(stored(tmp_path), tensors("separate", cfg, weights))
