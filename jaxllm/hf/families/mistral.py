"""Mistral, with one window on all layers, and Ministral 3, whose queries are scaled by their position."""

from __future__ import annotations

import dataclasses

from jaxllm.config import ModelConfig
from jaxllm.hf import rope
from jaxllm.hf.families import relative
from jaxllm.hf.family import Family
from jaxllm.hf.settings import Settings
from jaxllm.position.query_scale import Llama4Scale

MISTRAL_KIND = relative.Relative(kv_heads=8, context=4096 * 32)
BETA, LENGTH = "llama_4_scaling_beta", rope.LENGTH
MINISTRAL_KIND = relative.Relative(
  kv_heads=8, head_dim=128, context=262144, eps=1e-5, head={"extra": (BETA, "max_position_embeddings")}
)
MINISTRAL_ROPE = {
  "type": "yarn",
  "rope_theta": 1e6,
  "factor": 16.0,
  LENGTH: 16384,
  "mscale": 1.0,
  "mscale_all_dim": 1.0,
}
MINISTRAL_ROPE[BETA] = 0.1
"""rope_parameters where config.json has none."""


def read_mistral(s: Settings) -> ModelConfig:
  """A missing sliding_window is 4096, null is none."""
  return relative.read(s, MISTRAL_KIND, relative.one_window(s, 4096, lambda head: rope.read(s, head)))


def write_mistral(cfg: ModelConfig) -> dict:
  """The inverse of `read_mistral`."""
  return relative.write(cfg, MISTRAL_KIND) | {"sliding_window": cfg.layers[0].window}


def read_ministral(s: Settings) -> ModelConfig:
  """q *= 1 + beta ln(1 + floor(pos / L0)) on all layers, with the L0 of the RoPE."""
  group = rope.group_of(s) or Settings(MINISTRAL_ROPE, s.source, "rope_parameters")
  beta = group.take(BETA, relative.NOT_NEGATIVE)
  cfg = relative.read(
    s, MINISTRAL_KIND, relative.one_window(s, None, lambda head: rope.read_group(s, group, head))
  )
  scale = Llama4Scale(cfg.ropes[0].original_length, float(beta)) if beta else None
  return dataclasses.replace(cfg, query_scale=scale)


def write_ministral(cfg: ModelConfig) -> dict:
  """The inverse of `read_ministral`, in the form of version 5, which is the first that knows the family."""
  head, method = relative.head_of(cfg, MINISTRAL_KIND), relative.rope_of(cfg)
  group = {"rope_type": "default", "rope_theta": method.base} | rope.write_group(method, head)
  scale, length = cfg.query_scale, method.original_length or head.context
  known = isinstance(scale, Llama4Scale)
  group |= {BETA: scale.beta if known else 0.0, LENGTH: scale.original_length if known else length}
  plain = relative.write(cfg, MINISTRAL_KIND) | {"sliding_window": cfg.layers[0].window}
  plain["rope_parameters"] = group
  return {name: value for name, value in plain.items() if name not in ("rope_theta", "rope_scaling")}


MISTRAL = Family(
  "mistral", "MistralForCausalLM", read_mistral, write_mistral, relative.keys, eos=2, unused=relative.ROTARY
)
MINISTRAL3 = Family(
  "ministral3", "Ministral3ForCausalLM", read_ministral, write_ministral, relative.keys, eos=2
)
