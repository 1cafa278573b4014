"""Writes float32.json: frequencies of transformers itself, as the bits of its float32 numbers.

Run from the root of the repository with torch and transformers, on a CPU with AVX2:  python tests/golden/make_float32.py
Lengths are multiples of 32, so that AVX2 and AVX-512 give the same: what vectors leave over, the C library computes.
"""

import json
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

LISTS = dict(short_factor=[1 + i / 37 for i in range(64)], long_factor=[1 + i * 0.9 for i in range(64)])
ORIGINAL = ("yarn", "llama3", "longrope")
# name in POSITIONS, rope_type, rotary_dim, fields that they share, trained length, length of the call
CASES = [
  *(
    ("rope", "default", R, dict(base=base), 4096, None)
    for R, base in ((64, 1e4), (128, 5e5), (128, 1e6), (64, 15e4))
  ),
  ("pi", "linear", 128, dict(base=15e4, factor=3.0), 4096, None),
  *(
    ("dynamic_ntk", "dynamic", 128, dict(base=1e6, factor=1.3), 4096, length)
    for length in (None, 4096, 4097, 50_001)
  ),
  ("yarn", "yarn", 128, dict(base=1e6, factor=4.0), 32768, None),
  ("yarn", "yarn", 64, dict(base=15e4, factor=32.0, truncate=False), 4096, None),
  (
    "yarn",
    "yarn",
    128,
    dict(base=1e6, factor=16.0, mscale=1.3, mscale_all_dim=0.7, beta_fast=8.0),
    16384,
    None,
  ),
  *(
    ("longrope", "longrope", 128, dict(base=1e4, factor=32.0, **LISTS), 4096, length)
    for length in (4096, 4097)
  ),
  (
    "llama3",
    "llama3",
    128,
    dict(base=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0),
    8192,
    None,
  ),
  ("proportional", "proportional", 256, dict(base=1e6, factor=3.0, proportion=0.25), 4096, None),
]


def theirs(rope_type, rotary_dim, fields, trained, length):
  """(inv_freq, factor of cos and sin) of transformers."""
  rope = {"rope_type": rope_type, "rope_theta": fields["base"]} | {
    k: v for k, v in fields.items() if k != "base"
  }
  if "proportion" in rope:
    rope["partial_rotary_factor"] = rope.pop("proportion")
  if rope_type in ORIGINAL:
    rope["original_max_position_embeddings"] = trained
  config = LlamaConfig(
    hidden_size=2 * rotary_dim,
    num_attention_heads=2,
    head_dim=rotary_dim,
    max_position_embeddings=trained,
    rope_parameters=rope,
  )
  if rope_type == "default":
    return LlamaRotaryEmbedding.compute_default_rope_parameters(config)
  if rope_type == "dynamic" and length is not None and length <= trained:
    length = (
      None  # dynamic_rope_update leaves what the model started with, and else gives the length as a tensor
    )
  return ROPE_INIT_FUNCTIONS[rope_type](
    config, None, seq_len=None if length is None else torch.tensor(length)
  )


def row(name, rope_type, rotary_dim, fields, trained, length):
  inv_freq, scale = theirs(rope_type, rotary_dim, fields, trained, length)
  bits = inv_freq.view(torch.int32).tolist()
  return dict(
    method=name, kw=fields | dict(original_length=trained), rotary_dim=rotary_dim, seq_len=length
  ) | dict(scale=scale, bits=bits)


if __name__ == "__main__":
  made = dict(torch=torch.__version__, transformers=transformers.__version__)
  made["cpu"] = torch.backends.cpu.get_cpu_capability()
  text = json.dumps(dict(made_by=made, frequencies=[row(*case) for case in CASES]))
  (Path(__file__).parent / "float32.json").write_text(text.replace('{"method"', '\n{"method"') + "\n")
