"""experiments.llama_cpp: which checkpoints it writes as GGUF, how, and which it refuses; none needs llama.cpp or gguf."""

import dataclasses
import importlib.util
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from absl.testing import flagsaver
from model_cases import MODELS
from model_cases import params as params_of
from safetensors.numpy import load_file, save_file

from experiments import decoding, llama_cpp
from jaxllm import hf
from jaxllm.errors import ConfigError

CFG = dataclasses.replace(MODELS["rope"], num_layers=2, layers=MODELS["rope"].layers[:1])
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def directory(tmp_path):
  hf.save(tmp_path / "llama", CFG, params_of(CFG))
  return tmp_path / "llama"


def test_names_are_those_of_gguf(directory):
  names = llama_cpp.gguf_names(str(directory))
  assert set(names) == set(load_file(directory / "model.safetensors"))
  layer = [
    "attn_norm",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_output",
    "ffn_norm",
    "ffn_gate",
    "ffn_up",
    "ffn_down",
  ]
  expected = {f"blk.{i}.{name}.weight" for i in range(2) for name in layer}
  assert set(names.values()) == expected | {"token_embd.weight", "output_norm.weight", "output.weight"}
  assert names[Q] == "blk.1.attn_q.weight"


class Writer:
  """What gguf.GGUFWriter is called with."""

  def __init__(self, path, architecture):
    self.settings, self.tensors = {"path": path, "architecture": architecture}, {}

  def add_tensor(self, name, value, raw_dtype=None):
    self.tensors[name] = value, raw_dtype

  def __getattr__(self, name):
    return lambda *values: self.settings.__setitem__(name, *values or (None,))


def test_halves_of_heads_become_neighbours_and_matrices_integers(monkeypatch, directory):
  written = []
  fake = SimpleNamespace(
    GGUFWriter=lambda *args: written.append(Writer(*args)) or written[0],
    GGMLQuantizationType=SimpleNamespace(Q8_0="Q8_0"),
    quantize=lambda value, kind: value,
  )
  monkeypatch.setitem(sys.modules, "gguf", fake)
  llama_cpp.write(str(directory), "out.gguf")
  (writer,), stored = written, load_file(directory / "model.safetensors")
  found, kind = writer.tensors["blk.1.attn_q.weight"]
  H = CFG.head_dim
  for head in range(CFG.num_heads):
    for i in range(H // 2):
      np.testing.assert_array_equal(found[head * H + 2 * i], stored[Q][head * H + i])
      np.testing.assert_array_equal(found[head * H + 2 * i + 1], stored[Q][head * H + H // 2 + i])
  assert kind == "Q8_0" and writer.tensors["output_norm.weight"][1] is None
  np.testing.assert_array_equal(
    writer.tensors["blk.1.attn_v.weight"][0], stored[Q.replace("q_proj", "v_proj")]
  )
  assert (writer.settings["add_head_count"], writer.settings["add_head_count_kv"]) == (
    CFG.num_heads,
    CFG.num_kv_heads,
  )
  assert "close" in writer.settings


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_beside_a_tied_embedding_is_not_written(directory, tied):
  config = directory / "config.json"
  config.write_text(json.dumps(json.loads(config.read_text()) | dict(tie_word_embeddings=tied)))
  stored = set(load_file(directory / "model.safetensors"))
  assert "lm_head.weight" in stored
  names = llama_cpp.gguf_names(str(directory))
  assert set(names) == stored - ({"lm_head.weight"} if tied else set())
  assert ("output.weight" in names.values()) != tied


BAD = {
  "of another family": (dict(model_type="gemma"), "found model_type = 'gemma', expected 'llama'"),
  "of another activation": (dict(hidden_act="gelu"), "found hidden_act = 'gelu', expected 'silu'"),
  "of a method": (dict(rope_parameters=dict(rope_type="yarn", factor=4.0)), "found RoPE of yarn"),
  "of an older config": (
    dict(rope_parameters=None, rope_scaling=dict(type="linear", factor=2.0)),
    "found RoPE of linear, expected the default",
  ),
  "of Llama 3": (dict(rope_parameters=None, rope_scaling=dict(rope_type="llama3")), "found RoPE of llama3"),
}


@pytest.mark.parametrize(("settings", "reason"), BAD.values(), ids=BAD)
def test_what_llama_cpp_would_compute_otherwise_is_refused(directory, settings, reason):
  config = directory / "config.json"
  config.write_text(json.dumps(json.loads(config.read_text()) | settings))
  with pytest.raises(ConfigError, match=f"--llama_cpp: {directory}: {reason}.*; leave the flag out"):
    llama_cpp.write(str(directory), "out.gguf")


def test_a_tensor_that_a_llama_has_not_is_refused(directory):
  path, name = directory / "model.safetensors", Q.replace("weight", "bias")
  save_file(load_file(path) | {name: np.zeros(24, np.float32)}, path)
  with pytest.raises(ConfigError, match=f"found {name}, expected the tensors of a Llama; leave the flag out"):
    llama_cpp.write(str(directory), "out.gguf")


@pytest.mark.parametrize("lacking", [["llama_cpp"], ["gguf"], ["llama_cpp", "gguf"], []])
def test_packages_that_are_not_installed_are_named(monkeypatch, lacking):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in lacking else "found")
  packages = [name.replace("llama_cpp", "llama-cpp-python") for name in lacking]
  assert llama_cpp.missing() == packages
  saved = flagsaver.save_flag_values(decoding.FLAGS)
  try:
    decoding.FLAGS(["decoding", "--llama_cpp"])
    if not lacking:
      return decoding.check(decoding.FLAGS)
    with pytest.raises(
      ConfigError, match=rf"{' and '.join(packages)} not installed; pip install {' '.join(packages)}"
    ):
      decoding.check(decoding.FLAGS)
  finally:
    flagsaver.restore_flag_values(saved, decoding.FLAGS)
