"""The models that every family is held against: one table, a row a family or a variant of it, keyword arguments of its config.

Odd shapes: three layers, widths that are no powers of two, head_dim not D / N where the family lets it be, grouped heads,
199 tokens; windows, caps, clips and multipliers that act within 600 tokens; weights at several times their initial scale.
Weights come from NumPy by the name of the tensor, so that the same model can be built with and without transformers.
"""

import dataclasses
import functools
import json
import zlib
from pathlib import Path

import family_rows_glm
import family_rows_gpt
import family_rows_llama
import family_rows_moe
import numpy as np
from family_bases import BASE, FULL, LLAMA, LLAMA3, SLIDING, YARN
from safetensors.numpy import save_file

from jaxllm.hf import match
from jaxllm.hf.families import FAMILIES, read_config
from jaxllm.nn.shapes import expected_shapes
from jaxllm.tree import unflatten

T = 600
SCALE = 0.75
SHORT, LONG = [1.0 + 0.1 * i for i in range(4)], [1.0 + 0.7 * i for i in range(4)]
LONGROPE = dict(
  rope_type="longrope", short_factor=SHORT, long_factor=LONG, partial_rotary_factor=0.45, **BASE
)
WINDOWS = dict(use_sliding_window=True, sliding_window=90, max_window_layers=1)
NEOX = dict(vocab_size=199, hidden_size=72, intermediate_size=100, num_hidden_layers=3, num_attention_heads=3)
NEOX |= dict(
  max_position_embeddings=256, rope_parameters=dict(rope_type="default", partial_rotary_factor=0.25, **BASE)
)
BLOOM = dict(vocab_size=199, hidden_size=72, n_layer=3, n_head=6)
GPT2 = dict(vocab_size=199, n_positions=640, n_embd=72, n_layer=3, n_head=4, n_inner=100)
MPT = dict(vocab_size=199, d_model=72, n_layers=3, n_heads=6, max_seq_len=T)
PHI3 = LLAMA | dict(rope_parameters=LONGROPE, original_max_position_embeddings=64, sliding_window=90)
PHI3 = {name: value for name, value in PHI3.items() if name != "head_dim"} | dict(num_attention_heads=4)
GEMMA2 = dict(attention_bias=True, query_pre_attn_scalar=30, sliding_window=90, **LLAMA)

ROWS = {
  "llama": dict(rope_parameters=BASE, **LLAMA),
  "llama, llama3 RoPE, biases": dict(rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True, **LLAMA),
  "llama, tied": dict(rope_parameters=YARN, tie_word_embeddings=True, **LLAMA | dict(num_key_value_heads=6)),
  "mistral": dict(rope_parameters=BASE, sliding_window=90, **LLAMA),
  "ministral3": dict(rope_parameters=YARN | {"llama_4_scaling_beta": 0.3}, **LLAMA),
  "qwen2": dict(rope_parameters=BASE, **WINDOWS, **LLAMA),
  "qwen3": dict(
    rope_parameters=YARN, attention_bias=True, layer_types=[SLIDING, FULL, FULL], **WINDOWS, **LLAMA
  ),
  "gemma": dict(rope_parameters=BASE, **LLAMA | dict(num_key_value_heads=1)),
  "gemma2": dict(rope_parameters=BASE, attn_logit_softcapping=3.0, final_logit_softcapping=10.0, **GEMMA2),
  "gemma3_text": dict(
    rope_parameters={FULL: dict(rope_type="linear", factor=4.0, rope_theta=4000.0), SLIDING: BASE},
    layer_types=[SLIDING, FULL, SLIDING],
    final_logit_softcapping=10.0,
    **GEMMA2,
  ),
  "phi3": PHI3,
  "olmo2": dict(rope_parameters=BASE, attention_bias=True, **LLAMA),
  "granite": dict(
    **dict(rope_parameters=BASE, attention_bias=True, mlp_bias=True, attention_multiplier=0.17),
    **dict(embedding_multiplier=1.7, residual_multiplier=0.6, logits_scaling=3.7),
    **LLAMA,
  ),
  "smollm3": dict(
    **dict(
      rope_parameters=BASE,
      no_rope_layers=[1, 0, 1],
      use_sliding_window=True,
      sliding_window=90,
      mlp_bias=True,
    ),
    **LLAMA,
  ),
  "gpt_neox": NEOX,
  "gpt_neox, serial": NEOX | dict(use_parallel_residual=False, attention_bias=False, hidden_act="gelu_fast"),
  "bloom": BLOOM,
  "bloom, residual after the norm": BLOOM | dict(apply_residual_connection_post_layernorm=True),
  "mpt": MPT | dict(attn_config=dict(clip_qkv=1.5, softmax_scale=0.3, attn_pdrop=0)),
  "gpt2": GPT2,
  "gpt2, scores not divided": GPT2 | dict(scale_attn_weights=False, activation_function="gelu"),
}
ROWS |= family_rows_llama.ROWS
ROWS |= family_rows_glm.ROWS
ROWS |= family_rows_gpt.ROWS
ROWS |= family_rows_moe.ROWS
PINNED = {"phi3": T}
"""Rows whose frequencies depend on the length, for which transformers has one length a call."""
GOLDEN = Path(__file__).parents[1] / "golden" / "families.npz"
KEPT = np.linspace(0, T - 1, 16).astype(int)
"""The positions whose logits are kept there."""
LOOSE = {"mpt": 5e-5}
"""Rows whose reference is itself further off: its ALiBi is of absolute positions, hundreds in float32."""


def family_of(row):
  """The name of a row's family."""
  return row.split(",")[0]


REMOTE = tuple(row for row in ROWS if FAMILIES[family_of(row)].remote)
"""Rows that transformers has no model of: the float64 oracle is their reference."""
THEIRS = tuple(row for row in ROWS if row not in REMOTE)


def call_of(row, count):
  """pos and prefix of a call on so many tokens of a row, where they are not the usual ones."""
  return family_rows_glm.CALLS.get(row, lambda count: {})(count)


def core_of(row):
  """Whether the row goes to the other lanes as well: one of each kind of block."""
  return row in ("llama", "gemma3_text", "bloom")


@dataclasses.dataclass(frozen=True)
class Model:
  """A row's family, config, tensors by the names of the files, and parameters."""

  family: object
  cfg: object
  tensors: dict
  params: dict


@functools.cache
def built(row, seed=0):
  """The Model of a row, without transformers."""
  return build(settings(row), seed)


def settings(row):
  """The settings of a row's config.json."""
  return dict(model_type=FAMILIES[family_of(row)].model_type, **ROWS[row])


def build(plain, seed=0):
  """A Model of the settings of a config.json, with weights of NumPy's."""
  family, cfg = read_config(plain)
  tensors = {name: draw(name, path, cfg, shape, seed) for name, path, shape in shapes(family, cfg)}
  params = from_tensors(family, cfg, tensors)
  constants = match.all_constants(family, cfg)
  tensors |= {name: np.asarray(value, np.float32) for name, value in constants.items()}
  return Model(family, cfg, tensors, params)


def shapes(family, cfg):
  """(name, path of the first parameter, shape) of all tensors of the files."""
  ours = expected_shapes(cfg)
  for key in match.all_keys(family, cfg):
    parts = [np.zeros(ours[path], np.int8) for path in key.ours]
    parts = [key.to_stored(part if key.part is None else part[key.part]) for part in parts]
    yield key.theirs, key.ours[0], key.layout.join(parts, cfg, key.axis(parts[0].ndim)).shape


def draw(name, path, cfg, shape, seed):
  """A tensor: the same for the name, the shape and the seed."""
  x = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape)
  if path.endswith("norm/scale"):
    x = (cfg.norm.scale != "1+w") + 0.3 * x
  elif path.endswith("bias"):
    x = 0.3 * x
  elif path == "embed":
    x = 0.5 * x / cfg.embed_scale
  else:
    x = SCALE * x / np.sqrt(cfg.embed_dim)
  return x.astype(np.float32)


def from_tensors(family, cfg, tensors):
  """Parameters, each an array of its own, from tensors by name."""
  flat, slices = {}, {}
  for key in match.all_keys(family, cfg):
    tensor = np.asarray(tensors[key.theirs])
    parts = key.layout.split(tensor, cfg, key.axis(tensor.ndim))
    for path, part in zip(key.ours, parts, strict=True):
      part = np.ascontiguousarray(key.to_stored(part))
      if key.part is None:
        flat[path] = part
      else:
        slices.setdefault(path, []).append(part)
  return unflatten(flat | {path: np.stack(parts) for path, parts in slices.items()})


def write(directory, row):
  """A model directory of a row, written without transformers."""
  (directory / "config.json").write_text(json.dumps(settings(row)))
  save_file(built(row).tensors, directory / "model.safetensors")
  return directory


def tokens(seed=0, shape=(1, T)):
  """Random token ids."""
  return np.random.default_rng([seed, 5]).integers(0, 199, shape, np.int32)


assert {family_of(row) for row in ROWS} == FAMILIES.keys()
