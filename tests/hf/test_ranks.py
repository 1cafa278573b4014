"""Files of tensor-parallel ranks are read as the tensors they hold shares of, as GLM-130B's are."""

import hashlib
import json

import numpy as np
import pytest
from checkpoint_case import assert_equal_trees
from family_cases import built, settings
from safetensors.numpy import save_file

from jaxllm import hf, parallel
from jaxllm.errors import CheckpointError
from jaxllm.hf import sums

ROW, LAYER = "glm-130b", "transformer.layers.1."
CONFIG = settings(ROW) | dict(vocab_size=200, hidden_size=96, num_attention_heads=8, inner_hidden_size=104)
SHARED = ("word_embeddings.weight", "query_key_value.weight", "query_key_value.bias", "dense_h_to_4h.weight")
SHARED += ("dense_h_to_4h.bias", "attention.dense.weight", "dense_4h_to_h.weight")


@pytest.fixture(scope="module")
def model():
  from family_cases import build

  return build(CONFIG)


def share(name, x, rank, of):
  """A rank's share, as the authors' code cuts it: a slice of whole heads, of x1 and of x2, of rows or of columns."""
  if name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")):
    width = x.shape[1] // of
    return x[:, rank * width : (rank + 1) * width]
  if "dense_h_to_4h" in name:
    half, width = len(x) // 2, len(x) // 2 // of
    mine = slice(rank * width, (rank + 1) * width)
    return np.concatenate([x[:half][mine], x[half:][mine]])
  if name.endswith(SHARED):
    return x[rank * (len(x) // of) : (rank + 1) * (len(x) // of)]
  return x


def write(directory, tensors, of=2, change=None, name="mp_rank_{:02}_model_states.safetensors"):
  """A directory of ranks; change(rank, tensors) to each before it is written."""
  (directory / "config.json").write_text(json.dumps(CONFIG))
  for rank in range(of):
    parts = {key: np.ascontiguousarray(share(key, x, rank, of)) for key, x in tensors.items()}
    if change is not None:
      change(rank, parts)
    save_file(parts, directory / name.format(rank))
  return directory


@pytest.mark.parametrize("of", [1, 4, 8])
@pytest.mark.parametrize("name", ["mp_rank_{:02}_model_states.safetensors", "mp_rank_{:02}.safetensors"])
def test_ranks_are_the_whole(tmp_path, model, of, name):
  assert sum(key.endswith(SHARED) for key in model.tensors) == 1 + 6 * 3
  cfg, params = hf.load(write(tmp_path, model.tensors, of, name=name))
  assert cfg == model.cfg
  assert_equal_trees(params, model.params)


def test_ranks_on_a_mesh_and_saved_as_a_whole(tmp_path, model):
  (tmp_path / "a").mkdir()
  mesh = parallel.make_mesh("fsdp=4,tensor=2")
  cfg, params = hf.load(write(tmp_path / "a", model.tensors), mesh=mesh)
  hf.save(tmp_path / "b", cfg, params, family="glm-130b")
  assert [path.name for path in tmp_path.glob("b/*.safetensors")] == ["model.safetensors"]
  assert_equal_trees(hf.load(tmp_path / "b")[1], model.params)


def test_the_sums_of_every_rank_are_looked_at(tmp_path, model):
  """A bit of a share that the second rank alone has."""
  write(tmp_path, model.tensors)
  names = sorted(path.name for path in tmp_path.iterdir())
  digests = {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in names}
  (tmp_path / sums.NAME).write_bytes(sums.text(digests))
  hf.load(tmp_path)
  second = tmp_path / "mp_rank_01_model_states.safetensors"
  data = bytearray(second.read_bytes())
  data[-4] ^= 1
  second.write_bytes(data)
  with pytest.raises(CheckpointError, match=f"{second.name}: found the SHA-256"):
    hf.load(tmp_path)
  hf.load(tmp_path, verify=False)


def test_a_whole_file_comes_first(tmp_path, model):
  """What was saved into the directory of the ranks is the newer."""
  write(tmp_path, model.tensors)
  newer = {name: x + 1 for name, x in model.tensors.items()}
  save_file(newer, tmp_path / "model.safetensors")
  np.testing.assert_array_equal(hf.load(tmp_path)[1]["embed"], newer["transformer.word_embeddings.weight"])


def drop(key):
  return lambda rank, parts: rank and parts.pop(key)


def put(key, function):
  def change(rank, parts):
    if rank:
      parts[key] = np.ascontiguousarray(function(parts[key]))

  return change


BAD = [
  (
    drop(f"{LAYER}attention.dense.bias"),
    "mp_rank_01_model_states.*: lacks transformer.layers.1.attention.dense.bias",
  ),
  (
    lambda rank, parts: parts.update({f"x{rank}": np.zeros(1)}),
    "mp_rank_01_model_states.*: has x1, which mp_rank_00",
  ),
  (
    put(f"{LAYER}mlp.dense_4h_to_h.weight", lambda x: x[:, :-1]),
    r"mlp.dense_4h_to_h.weight is float32 \[96, 51\], expected float32 \[96, 52\] as in mp_rank_00",
  ),
  (
    put(f"{LAYER}input_layernorm.weight", lambda x: x.astype(np.float16)),
    r"is float16 \[96\], expected float32 \[96\]",
  ),
  (
    put(f"{LAYER}input_layernorm.weight", lambda x: x + 1),
    r"input_layernorm.weight of mp_rank_01.* is not transformer.layers.1.input_layernorm.weight of mp_rank_00.*the same values",
  ),
  (
    lambda rank, parts: parts.update({"transformer.word_embeddings.weight": np.zeros((90, 96), np.float32)}),
    r"word_embeddings.weight of mp_rank_00_model_states.safetensors is \[180, 96\], expected \[200, 96\] .*vocab_size = 200",
  ),
  (
    lambda rank, parts: parts.update({f"{LAYER}mlp.dense_h_to_4h.bias": np.zeros(101, np.float32)}),
    r"dense_h_to_4h.bias of mp_rank_00.*: found the shape \[101\], expected .* number 0 a multiple of 2",
  ),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_ranks_that_do_not_fit(tmp_path, model, change, message):
  with pytest.raises(CheckpointError, match=message):
    hf.load(write(tmp_path, model.tensors, change=change))


def test_a_rank_that_is_missing(tmp_path, model):
  (write(tmp_path, model.tensors, of=4) / "mp_rank_01_model_states.safetensors").unlink()
  with pytest.raises(CheckpointError, match=r"found the ranks 0, 2, 3 .*expected each from 0 on, once"):
    hf.load(tmp_path)


def test_pickles_of_ranks(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(CONFIG))
  (tmp_path / "mp_rank_00_model_states.pt").write_bytes(b"")
  with pytest.raises(
    CheckpointError, match=r"found mp_rank_00_model_states.pt, expected mp_rank_00_model_states.safetensors"
  ):
    hf.load(tmp_path)
  (tmp_path / "mp_rank_00_model_states.pt").unlink()
  with pytest.raises(CheckpointError, match="no model"):
    hf.load(tmp_path)


def test_ranks_of_another_family(tmp_path, model):
  """Which has no such files."""
  write(tmp_path, model.tensors)
  (tmp_path / "config.json").write_text(json.dumps(settings("llama")))
  with pytest.raises(CheckpointError, match="no model"):
    hf.load(tmp_path)
  assert built(ROW).family.ranks and not built("llama").family.ranks
