"""hf.load and hf.save on whole directories of real families, beside transformers."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from checkpoint_case import assert_equal_trees
from family_cases import THEIRS, built, settings
from model_checks import relative_error
from safetensors.numpy import save_file

from jaxllm import hf, parallel
from jaxllm.errors import CheckpointError, ConfigError, TokenizerError
from jaxllm.hf import byte_tokenizer
from jaxllm.leaf import Matrix
from jaxllm.nn import Transformer

LAYOUTS = ("llama, tied", "phi3", "bloom", "gpt2")
"""Rows of one kind of weight layout each; the others wait for the full counts."""
IDS = np.arange(1, 25, dtype=np.int32)[None] * 7 % 199


def write(directory, row="llama", stored=None, **changes):
  """A directory of a row's config.json and tensors."""
  directory.mkdir(exist_ok=True)
  (directory / "config.json").write_text(json.dumps(settings(row) | changes))
  tensors = built(row).tensors
  save_file(
    {name: x.astype(stored or x.dtype) for name, x in tensors.items()}, directory / "model.safetensors"
  )
  return directory


@pytest.mark.parametrize(
  "row", [row if row in LAYOUTS else pytest.param(row, marks=pytest.mark.slow) for row in THEIRS]
)
def test_transformers_opens_what_was_saved(tmp_path, row):
  """Written by transformers, loaded, saved, and opened by transformers: the same tensors bit for bit, the same logits."""
  theirs = pytest.importorskip("theirs")
  before = theirs.row_model(row)
  before.save_pretrained(tmp_path / "a")
  cfg, params = hf.load(tmp_path / "a")
  assert cfg == built(row).cfg
  assert_equal_trees(params, built(row).params)
  pinned = row == "phi3"
  hf.save(tmp_path / "b", cfg, params, pinned=pinned, family=row.split(",")[0], max_shard_bytes=100_000)
  after, info = theirs.transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "b", attn_implementation=theirs.attention_of(settings(row)), output_loading_info=True
  )
  assert not any(info.values()), info
  state = after.state_dict()
  assert state.keys() == before.state_dict().keys()
  for name, x in before.state_dict().items():
    assert state[name].dtype == x.dtype and bool((state[name] == x).all()), name
  # of equal weights; torch's products depend on where these lie in memory
  assert relative_error(theirs.logits(after.eval(), IDS), theirs.logits(before, IDS)) <= 2e-6
  again, reloaded = hf.load(tmp_path / "b")
  assert again == cfg
  assert_equal_trees(reloaded, built(row).params)


@pytest.mark.core
def test_a_directory_of_numpy_alone(tmp_path):
  cfg, params = hf.load(write(tmp_path))
  assert cfg == built("llama").cfg
  assert_equal_trees(params, built("llama").params)
  hf.save(tmp_path / "b", cfg, params)
  again, reloaded = hf.load(tmp_path / "b")
  assert again == cfg
  assert_equal_trees(reloaded, built("llama").params)


@pytest.mark.parametrize(
  "stored, named, wanted, types",
  [
    ("float16", {"dtype": "float16"}, "auto", ("float16", "float16")),
    ("float16", {"torch_dtype": "float32"}, "auto", ("float16", "float32")),
    ("float16", {}, "auto", ("float16", "float16")),
    ("float16", {"dtype": "bfloat16"}, "float32", ("float32", "float32")),
    ("float32", {"dtype": "float32"}, "bfloat16", ("bfloat16", "bfloat16")),
  ],
)
def test_types(tmp_path, stored, named, wanted, types):
  """Of the parameters, and of the computation."""
  cfg, params = hf.load(write(tmp_path, stored=stored, **named), dtype=wanted)
  assert ({leaf.dtype.name for leaf in jax.tree.leaves(params)}, cfg.dtype) == ({types[0]}, types[1])


@pytest.mark.parametrize("row", ["llama", "mixtral"])
def test_on_a_mesh(tmp_path, row):
  """Experts too, which are a tensor each in the files, and one parameter here."""
  mesh = parallel.make_mesh("fsdp=4,tensor=2")
  cfg, params = hf.load(write(tmp_path, row), mesh=mesh)
  whole = parallel.shard(hf.load(tmp_path)[1], mesh, parallel.RULES["fsdp_tensor"], cfg)
  for mine, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(whole), strict=True):
    assert mine.sharding == theirs.sharding
    np.testing.assert_array_equal(mine, theirs)


def test_rope_precision(tmp_path):
  assert hf.load(write(tmp_path), rope_precision="hf")[0] == dataclasses.replace(
    built("llama").cfg, rope_precision="hf"
  )


@pytest.mark.parametrize("ids, expected", [([5, 9], (5, 9)), (4, (4,)), (None, (3, 7)), ([5, 199, -1], (5,))])
def test_eos_ids_of_generation_come_first(tmp_path, ids, expected):
  """Ids that the model does not have never occur."""
  (write(tmp_path) / "generation_config.json").write_text(json.dumps({"eos_token_id": ids, "top_p": 0.9}))
  cfg, params = hf.load(tmp_path)
  assert cfg.eos_ids == expected
  hf.save(tmp_path / "b", cfg, params)
  assert hf.load(tmp_path / "b")[0].eos_ids == expected


def test_remote_code_is_not_run(tmp_path, caplog):
  write(tmp_path, auto_map={"AutoModelForCausalLM": "evil.Model"})
  (tmp_path / "evil.py").write_text("raise SystemExit('run')")
  cfg, _ = hf.load(tmp_path)
  assert cfg == built("llama").cfg and "auto_map" in caplog.text and "never run" in caplog.text


def test_directories_that_are_none(tmp_path):
  with pytest.raises(CheckpointError, match=r"no config.json; give the directory"):
    hf.load(tmp_path)
  (tmp_path / "config.json").write_text(json.dumps(settings("llama")))
  (tmp_path / "pytorch_model.bin").write_bytes(b"")
  with pytest.raises(
    CheckpointError, match=r"found pytorch_model.bin, expected model.safetensors: pickles run code"
  ):
    hf.load(tmp_path)
  with pytest.raises(
    ConfigError, match=r"dtype: found 'int8', expected one of auto, float32, bfloat16, float16"
  ):
    hf.load(tmp_path, dtype="int8")
  (tmp_path / "config.json").write_text('{"model_type": "llama", "model_type": "mistral"}')
  with pytest.raises(ConfigError, match=r"config.json: found the key 'model_type' twice"):
    hf.load(tmp_path)


def test_shapes_are_traced_to_the_settings_of_the_family(tmp_path):
  write(tmp_path, intermediate_size=101)
  with pytest.raises(CheckpointError) as e:
    hf.load(tmp_path)
  assert (
    "mlp.up_proj.weight of model.safetensors is [100, 72], expected [101, 72] (hidden_size = 72, intermediate_size = 101)"
    in str(e.value)
  )


def test_the_tokenizer_goes_along(tmp_path):
  """And is refused where the model has too few embeddings."""
  row = built("llama")
  with pytest.raises(TokenizerError, match="ids up to 255, but the embedding of the model has 199 rows"):
    hf.save(tmp_path / "b", row.cfg, row.params, byte_tokenizer())
  assert not (tmp_path / "b").exists()
  cfg = dataclasses.replace(row.cfg, vocab_size=256)
  params = row.params | {"embed": np.zeros((256, 72), np.float32), "head": np.zeros((72, 256), np.float32)}
  hf.save(tmp_path / "b", cfg, params, byte_tokenizer())
  assert hf.load_tokenizer(tmp_path / "b").encode("é") == [0xC3, 0xA9]
  assert hf.load_tokenizer(tmp_path / "b", cfg).vocab_size == 256


def test_matrices_compute_what_plain_arrays_do(tmp_path):
  """Those of a checkpoint, kept [out, in], beside the same ones [in, out]."""
  cfg, params = hf.load(write(tmp_path))
  assert isinstance(params["layers"]["0"]["attn"]["q"]["w"], Matrix)
  logits = jax.jit(lambda p: Transformer(cfg).apply({"params": p}, IDS)[0])
  np.testing.assert_allclose(logits(params), logits(built("llama").params), rtol=0, atol=1e-5)
