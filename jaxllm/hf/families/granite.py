"""Granite: Llama with four multipliers."""

from __future__ import annotations

import dataclasses

from jaxllm.config import ModelConfig
from jaxllm.hf.families import relative
from jaxllm.hf.family import Family
from jaxllm.hf.settings import POSITIVE, Settings
from jaxllm.wiring import Pre

KIND = relative.Relative(attention_bias=True, mlp_bias=True)


def read(s: Settings) -> ModelConfig:
  """Each multiplier is 1 where it is missing, that of attention too; logits are divided by logits_scaling."""
  names = ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling")
  attention, embedding, residual, logits = (float(s.take(name, POSITIVE, 1.0)) for name in names)
  cfg = relative.read(s, KIND, embed_scale=embedding, wiring=Pre(residual), logit_scale=1 / logits)
  return dataclasses.replace(cfg, attention_scale=relative.attention_scale(attention, cfg.head_dim))


def write(cfg: ModelConfig) -> dict:
  """The inverse of `read`."""
  return relative.write(cfg, KIND) | {
    "attention_multiplier": cfg.head_dim**-0.5 if cfg.attention_scale is None else cfg.attention_scale,
    "embedding_multiplier": cfg.embed_scale,
    "residual_multiplier": getattr(cfg.wiring, "branch_scale", 1.0),
    "logits_scaling": 1 / cfg.logit_scale,
  }


GRANITE = Family("granite", "GraniteForCausalLM", read, write, relative.keys, eos=2)
