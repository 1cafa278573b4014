"""Settings of Llama's later relatives: all forms that transformers takes, bad ones, and tensors that hold a number."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from family_cases import BASE, FULL, LLAMA, SLIDING, YARN, built, settings
from safetensors.numpy import load_file, save_file

from jaxllm import hf
from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.hf.families import read_config, write_config
from jaxllm.position import NoPE, NtkRope, Rope
from jaxllm.position.scalings import Llama3Rope

FOUR = LLAMA | dict(num_hidden_layers=4)
SCALING = {name: value for name, value in YARN.items() if name != "rope_theta"}
# family: settings in one of the forms that are not those of its row
FORMS = [
  ("glm", dict(rope_theta=500.0, partial_rotary_factor=0.3, **LLAMA)),
  ("glm", dict(rope_theta=500.0, rope_scaling=SCALING | {"type": "yarn"}, **LLAMA)),
  (
    "glm4",
    dict(**{name: value for name, value in LLAMA.items() if name not in ("head_dim", "eos_token_id")}),
  ),
  ("cohere", dict(rope_theta=500.0, rope_scaling=None, **LLAMA)),
  (
    "cohere",
    dict(num_key_value_heads=None, **{k: v for k, v in LLAMA.items() if "kv" not in k and "key" not in k}),
  ),
  ("cohere2", FOUR),
  ("cohere2", dict(sliding_window_pattern=2, sliding_window=9, rope_theta=500.0, **FOUR)),
  ("cohere2", dict(rope_parameters=YARN, layer_types=[FULL, SLIDING] * 2, sliding_window_pattern=3, **FOUR)),
  ("olmo", dict(rope_theta=500.0, rope_scaling=dict(type="linear", factor=2.0), clip_qkv=None, **LLAMA)),
  ("olmo3", FOUR),
  ("olmo3", dict(rope_theta=500000, rope_scaling=SCALING, sliding_window=9, **FOUR)),
  ("olmo3", dict(rope_parameters={FULL: YARN, SLIDING: None}, **FOUR)),
  ("exaone4", FOUR),
  ("exaone4", dict(sliding_window_pattern=2, sliding_window=9, **FOUR)),
  ("exaone4", dict(sliding_window_pattern="LLLG", layer_types=[SLIDING, FULL] * 2, **FOUR)),
  ("seed_oss", dict(rope_theta=1e7, rope_scaling={"rope_type": "default"}, **LLAMA)),
  ("arcee", dict(rope_theta=500.0, rope_scaling=SCALING | {"type": "yarn"}, **LLAMA)),
  ("hunyuan_v1_dense", dict(rope_scaling=dict(type="dynamic", alpha=30.0, factor=1.0, mscale=1.0), **LLAMA)),
  ("hunyuan_v1_dense", dict(rope_parameters=YARN, **LLAMA)),
  ("apertus", LLAMA),
  ("apertus", dict(rope_parameters={}, **LLAMA)),
  (
    "apertus",
    dict(rope_theta=500.0, rope_scaling={"type": "linear", "factor": 2.0}, hidden_act="relu", **LLAMA),
  ),
]


@pytest.mark.parametrize("number", range(len(FORMS)))
def test_forms_are_read_as_transformers_reads_them(number):
  """What it makes of them, in the one form that it writes."""
  theirs = pytest.importorskip("theirs")
  name, plain = FORMS[number]
  plain = dict(model_type=name, **plain)
  assert read_config(plain)[1] == read_config(theirs.config(plain).to_dict())[1]


def test_what_the_forms_mean():
  """Three of them by hand."""
  read = lambda number: read_config(dict(model_type=FORMS[number][0], **FORMS[number][1]))[1]
  assert read(0).ropes == (Rope(500.0, rotary_dim=6, layout="interleaved", original_length=256),)
  cfg = read(6)
  assert [(layer.position, layer.window) for layer in cfg.layers] == [
    (Rope(500.0, layout="interleaved", original_length=256), 9),
    (NoPE(), None),
  ]
  assert read(17).ropes == (NtkRope(factor=30.0, original_length=256),)
  assert read(19).ropes == (Llama3Rope(1.2e7, factor=8.0, original_length=8192),)


# row, settings, error
BAD = [
  (
    "glm",
    dict(rope_parameters=dict(partial_rotary_factor=0.75)),
    "partial_rotary_factor: found 0.75.*turns 15",
  ),
  (
    "glm",
    dict(attention_bias=None, num_key_value_heads=4),
    "num_key_value_heads: found 4, expected a divisor",
  ),
  ("cohere", dict(logit_scale=0), "logit_scale: found 0"),
  ("cohere", dict(layer_norm_eps=0.0), "layer_norm_eps: found 0.0"),
  ("cohere", dict(rms_norm_eps=1e-5), r"unknown settings.*rms_norm_eps = 1e-05 \(nearest: layer_norm_eps\)"),
  ("cohere2", dict(use_qk_norm=True), "use_qk_norm: found true, expected false"),
  ("cohere2", dict(use_parallel_block=False), "use_parallel_block: found false, expected true"),
  ("cohere2", dict(layer_switch=3), "layer_switch: found 3, expected 4"),
  ("cohere2", dict(sliding_window=None), "sliding_window: found null"),
  ("olmo", dict(clip_qkv=-1.0), "clip_qkv: found -1.0"),
  ("olmo", dict(rms_norm_eps=1e-5), "unknown settings.*rms_norm_eps"),
  (
    "olmo3",
    dict(rope_theta=1e4),
    "rope_theta: found 10000.0, expected 500000.0 or 500000 .*by the type of layer",
  ),
  ("olmo3", dict(rope_parameters=YARN), "unknown settings.*rope_parameters.rope_type"),
  ("olmo3", dict(rope_scaling=SCALING), "rope_scaling: found .*expected no such key beside rope_parameters"),
  ("olmo3", dict(layer_types=[FULL] * 2), "layer_types: found .*expected a list of 3"),
  ("exaone4", dict(sliding_window=None), "sliding_window: found null"),
  ("exaone4", dict(layer_types=None, sliding_window_pattern="LLLG"), "sliding_window_pattern: found 'LLLG'"),
  ("exaone4", dict(attention_bias=True), "attention_bias: found true, expected false"),
  ("seed_oss", dict(attention_out_bias=1), "attention_out_bias: found 1"),
  (
    "arcee",
    dict(num_attention_heads=5, num_key_value_heads=5),
    "num_attention_heads: found 5, expected a divisor",
  ),
  (
    "hunyuan_v1_dense",
    dict(rope_parameters=dict(rope_type="dynamic", factor=2.0)),
    "rope_parameters.alpha: found nothing, expected a number above 0",
  ),
  (
    "hunyuan_v1_dense",
    dict(rope_parameters=dict(rope_type="dynamic", alpha=-1.0)),
    "rope_parameters.alpha: found -1.0",
  ),
  (
    "hunyuan_v1_dense",
    dict(rope_parameters=YARN | dict(alpha=2.0)),
    "unknown settings.*rope_parameters.alpha",
  ),
  (
    "hunyuan_v1_dense",
    dict(rope_parameters=BASE | dict(rope_type="longrope")),
    "rope_type: found 'longrope'",
  ),
  ("hunyuan_v1_dense", dict(use_qk_norm=False), "use_qk_norm: found false, expected true"),
  ("apertus", dict(hidden_act="xelu"), "hidden_act: found 'xelu', expected one of .*xielu"),
  ("apertus", dict(post_norm=True), "post_norm: found true, expected false"),
  ("llama", dict(hidden_act="xielu"), "hidden_act: found 'xielu'"),
]


@pytest.mark.parametrize(("row", "changes", "message"), BAD)
def test_bad_settings(row, changes, message):
  with pytest.raises(ConfigError, match=rf"^config.json: .*{message}"):
    read_config(settings(row) | changes)


def test_end_ids_of_glm():
  """Those of the class where there are none, null too; that none ends a text is said otherwise."""
  plain = settings("glm") | dict(vocab_size=151552)
  del plain["eos_token_id"]
  three = (151329, 151336, 151338)
  assert read_config(plain)[1].eos_ids == read_config(plain | dict(eos_token_id=None))[1].eos_ids == three
  none = dataclasses.replace(read_config(plain)[1], eos_ids=())
  assert write_config(none, "glm")[1]["eos_token_id"] == -1
  assert read_config(write_config(none, "glm")[1])[1].eos_ids == ()


def test_a_model_of_ntk_is_longrope_elsewhere():
  """Hunyuan's own type is kept by its family only."""
  cfg = built("hunyuan_v1_dense").cfg
  assert write_config(cfg)[1]["rope_scaling"] == dict(rope_type="dynamic", alpha=30.0, factor=1.0)
  before = dataclasses.replace(cfg, qk_norm=dataclasses.replace(cfg.qk_norm, place="before"))
  family, plain = write_config(before)
  assert family.model_type == "qwen3" and plain["rope_scaling"]["rope_type"] == "longrope"


EPS = "model.layers.1.mlp.act_fn.eps"


def apertus(directory, **tensors):
  """A directory of the row, with other tensors by name, None being without."""
  (directory / "config.json").write_text(json.dumps(settings("apertus")))
  all_of_them = built("apertus").tensors | tensors
  save_file({k: x for k, x in all_of_them.items() if x is not None}, directory / "model.safetensors")
  return directory


def rounded(x, dtype):
  """A number of a half type as float32 has it."""
  return np.asarray(np.asarray(x, dtype), np.float32)


@pytest.mark.parametrize(
  "eps", [None, np.float32([-1e-6]), rounded(-1e-6, jnp.bfloat16), np.asarray(-1e-6, np.float16)]
)
def test_a_constant_may_be_rounded_or_missing(tmp_path, eps):
  cfg, params = hf.load(apertus(tmp_path, **{EPS: eps}))
  assert cfg == built("apertus").cfg
  hf.save(tmp_path / "b", cfg, params)
  found = load_file(tmp_path / "b" / "model.safetensors")
  assert found[EPS].shape == () and found[EPS] == np.float32(-1e-6)
  assert found.keys() == built("apertus").tensors.keys()


@pytest.mark.parametrize(
  ("eps", "message"),
  [
    (
      np.float32(-1e-3),
      f"constant: {EPS} of model.safetensors is -0.001, expected -1e-06: no other is supported",
    ),
    (np.float32(np.nan), f"constant: {EPS} of model.safetensors is nan, expected -1e-06"),
    (np.zeros(2, np.float32), rf"constant: {EPS} of model.safetensors is float32 \[2\], expected one number"),
    (np.asarray(0), f"constant: {EPS} of model.safetensors is int64 .*, expected one number"),
  ],
)
def test_another_constant_is_refused(tmp_path, eps, message):
  with pytest.raises(CheckpointError, match=message):
    hf.load(apertus(tmp_path, **{EPS: np.asarray(eps)}))
