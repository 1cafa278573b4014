"""Seed-OSS: Llama with biases of queries, keys and values, and a setting for that of the attention's output."""

from __future__ import annotations

import dataclasses

from jaxllm.config import ModelConfig
from jaxllm.hf.families import relative
from jaxllm.hf.family import Family
from jaxllm.hf.settings import FLAG, Settings

KIND = relative.Relative(
  **dict(kv_heads=8, head_dim=128, context=524288, mlp_bias=True),
  **dict(attention_bias=True, attention_biases="qkv", attention_biased=True),
)


def read(s: Settings) -> ModelConfig:
  """attention_bias is true where it is missing, attention_out_bias false."""
  cfg = relative.read(s, KIND)
  output = ("o",) if s.take("attention_out_bias", FLAG, False) else ()
  return dataclasses.replace(cfg, biases=cfg.biases + output)


def write(cfg: ModelConfig) -> dict:
  """The inverse of `read`."""
  return relative.write(cfg, KIND) | {"attention_out_bias": "o" in cfg.biases}


SEED_OSS = Family(
  "seed_oss", "SeedOssForCausalLM", read, write, relative.keys, eos=2, ignored=("residual_dropout",)
)
