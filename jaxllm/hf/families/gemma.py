"""Gemma 1, 2 and 3 (text): norms by 1 + w, embeddings times sqrt(D); from 2 on sandwich norms and windows; in 3 two RoPEs."""

from __future__ import annotations

import dataclasses

from jaxllm.config import Layer, ModelConfig
from jaxllm.hf import rope
from jaxllm.hf.families import relative
from jaxllm.hf.family import Family, Key
from jaxllm.hf.settings import COUNT, POSITIVE, Settings
from jaxllm.norm import RMSNorm
from jaxllm.wiring import Sandwich

SHARED = dict(head_dim=256, activation="gelu_pytorch_tanh", attention_bias=True, norm=RMSNorm(scale="1+w"))
LEGACY = relative.ACTIVATIONS | {"gelu": "gelu_tanh"}  # what the first release called the tanh form
KIND1 = relative.Relative(kv_heads=16, context=8192, activations=LEGACY, unread="hidden_activation", **SHARED)
SHARED |= dict(kv_heads=4, activation_key="hidden_activation", unread="hidden_act", divides=True)
KIND2 = relative.Relative(context=8192, **SHARED)
KIND3 = relative.Relative(context=131072, base=1e6, qk_over="head", **SHARED)
NORMS = relative.NORMS | {
  "attn_post_norm": "post_attention_layernorm",
  "mlp_norm": "pre_feedforward_layernorm",
  "mlp_post_norm": "post_feedforward_layernorm",
}
LOCAL_BASE = "rope_local_base_freq"


def read1(s: Settings) -> ModelConfig:
  """Like Llama but for the norm, the activation and the embeddings."""
  return _read(s, KIND1)


def write1(cfg: ModelConfig) -> dict:
  """The inverse of `read1`."""
  return relative.write(cfg, KIND1)


def read2(s: Settings) -> ModelConfig:
  """A window on every other layer, from the first on; soft caps of 50 and 30 where the settings are missing."""
  size = s.take("sliding_window", COUNT, 4096, null=None)

  def layers(num_layers: int, head: rope.Head) -> list[Layer]:
    method = rope.read(s, head)
    windows = relative.layer_windows(s, num_layers, size, lambda i: i % 2 == 0)
    return [Layer(method, window) for window in windows]

  caps = [
    s.take(f"{name}_logit_softcapping", POSITIVE, cap, null=None)
    for name, cap in (("attn", 50.0), ("final", 30.0))
  ]
  return _read(s, KIND2, layers, wiring=Sandwich(), attention_softcap=caps[0], logit_softcap=caps[1])


def write2(cfg: ModelConfig) -> dict:
  """The inverse of `read2`."""
  return _write(cfg, KIND2)


def read3(s: Settings) -> ModelConfig:
  """A RoPE a type of layer: rope_parameters by type, or rope_theta and rope_scaling, and rope_local_base_freq for windows."""
  size = s.take("sliding_window", COUNT, 4096, null=None)
  every = s.take("sliding_window_pattern", COUNT, 6)
  s.settle("attn_logit_softcapping", why="transformers does not apply it in this family")

  def layers(num_layers: int, head: rope.Head) -> list[Layer]:
    local = dataclasses.replace(head, base=1e4, bases=(LOCAL_BASE,))
    methods = relative.ropes_by_type(s, head, local)
    windows = relative.layer_windows(s, num_layers, size, lambda i: (i + 1) % every != 0)
    return [Layer(methods[window is not None], window) for window in windows]

  cap = s.take("final_logit_softcapping", POSITIVE, None)
  return _read(s, KIND3, layers, wiring=Sandwich(), logit_softcap=cap)


def write3(cfg: ModelConfig) -> dict:
  """The inverse of `read3`, in the form of version 4, which has plain RoPE where there is a window."""
  head, plain = relative.head_of(cfg, KIND3), _write(cfg, KIND3)
  full, sliding = relative.methods_by_type(cfg)
  plain |= {} if full is None else rope.write(full, head)
  plain |= {LOCAL_BASE: sliding.base} if sliding else {}
  if sliding and rope.write_group(sliding, head):
    plain["rope_parameters"] = relative.write_ropes_by_type(cfg, head)
    plain = {
      name: value for name, value in plain.items() if name not in ("rope_theta", "rope_scaling", LOCAL_BASE)
    }
  return plain


def _read(s: Settings, kind: relative.Relative, layers=None, **fields) -> ModelConfig:
  s.settle("use_bidirectional_attention", False, why="attention in both directions makes no decoder")
  query = None if kind is KIND1 else s.take("query_pre_attn_scalar", POSITIVE, 256)
  cfg = relative.read(s, kind, layers, embed_scale=s.take("hidden_size", COUNT) ** 0.5, **fields)
  if query is None:
    return cfg
  return dataclasses.replace(cfg, attention_scale=relative.attention_scale(query**-0.5, cfg.head_dim))


def _write(cfg: ModelConfig, kind: relative.Relative) -> dict:
  scale = cfg.head_dim**-0.5 if cfg.attention_scale is None else cfg.attention_scale
  numbers = {"query_pre_attn_scalar": round(scale**-2), "final_logit_softcapping": cfg.logit_softcap}
  numbers |= {"attn_logit_softcapping": cfg.attention_softcap} if kind is KIND2 else {}
  return relative.write(cfg, kind) | relative.window_settings(cfg) | numbers


def keys2(cfg: ModelConfig) -> list[Key]:
  """With the names of the four norms of a block."""
  return relative.keys(cfg, NORMS)


SHARED_ROW = dict(tied=True, eos=1, unused=relative.ROTARY)
GEMMA = Family("gemma", "GemmaForCausalLM", read1, write1, relative.keys, **SHARED_ROW)
SIZE = ("sliding_window_size",)  # an early name that transformers does not read
GEMMA2 = Family("gemma2", "Gemma2ForCausalLM", read2, write2, keys2, ignored=SIZE, **SHARED_ROW)
GEMMA3 = Family(
  "gemma3_text", "Gemma3ForCausalLM", read3, write3, keys2, ignored=("_sliding_window_pattern",), **SHARED_ROW
)
