"""OLMo 1, 2 and 3: LayerNorm without weights; norms of what is added only, and of all queries and keys at once; windows."""

from __future__ import annotations

import dataclasses

from jaxllm.config import Layer, ModelConfig
from jaxllm.hf import rope
from jaxllm.hf.families import relative
from jaxllm.hf.family import Family, Key
from jaxllm.hf.settings import COUNT, POSITIVE, Settings
from jaxllm.norm import LayerNorm, RMSNorm
from jaxllm.wiring import PostOnly

KIND1 = relative.Relative(attention_bias=True, norm=LayerNorm(1e-5, scale=None, bias=False), eps_key=None)
KIND = relative.Relative(eps=1e-5, attention_bias=True, norm=RMSNorm(), qk_over="all")
KIND3 = dataclasses.replace(KIND, base=5e5)
NORMS = {"attn_norm": "post_attention_layernorm", "mlp_norm": "post_feedforward_layernorm"}


def read1(s: Settings) -> ModelConfig:
  """clip_qkv: queries, keys and values clipped."""
  return relative.read(s, KIND1, clip_qkv=s.take("clip_qkv", POSITIVE, None))


def write1(cfg: ModelConfig) -> dict:
  """The inverse of `read1`."""
  return relative.write(cfg, KIND1) | {"clip_qkv": cfg.clip_qkv}


def read(s: Settings) -> ModelConfig:
  """Every layer alike."""
  return relative.read(s, KIND, wiring=PostOnly())


def write(cfg: ModelConfig) -> dict:
  """The inverse of `read`."""
  return relative.write(cfg, KIND)


def read3(s: Settings) -> ModelConfig:
  """Windows on three layers of four, whose RoPE is not that of the others: rope_scaling is of the others only."""
  size = s.take("sliding_window", COUNT, 4096, null=None)
  why = (
    "version 4 of transformers reads it for all layers and version 5 for those without a window; "
    "rope_parameters says it by the type of layer"
  )
  s.settle("rope_theta", KIND3.base, int(KIND3.base), why=why)

  def layers(num_layers: int, head: rope.Head) -> list[Layer]:
    head = dataclasses.replace(head, bases=())
    methods = relative.ropes_by_type(s, head, head)
    windows = relative.layer_windows(s, num_layers, size, lambda i: (i + 1) % 4 != 0)
    return [Layer(methods[window is not None], window) for window in windows]

  return relative.read(s, KIND3, layers, wiring=PostOnly())


def write3(cfg: ModelConfig) -> dict:
  """The inverse of `read3`, in the form of version 5."""
  plain = relative.write(cfg, KIND3) | relative.window_settings(cfg)
  plain["rope_parameters"] = relative.write_ropes_by_type(cfg, relative.head_of(cfg, KIND3))
  return {name: value for name, value in plain.items() if name not in ("rope_theta", "rope_scaling")}


def keys(cfg: ModelConfig) -> list[Key]:
  """With the names of the norms after."""
  return relative.keys(cfg, NORMS)


OLMO = Family("olmo", "OlmoForCausalLM", read1, write1, relative.keys, eos=50279, unused=relative.ROTARY)
OLMO2 = Family("olmo2", "Olmo2ForCausalLM", read, write, keys, eos=50279)
OLMO3 = Family("olmo3", "Olmo3ForCausalLM", read3, write3, keys, eos=50279)
