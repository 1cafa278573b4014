"""Phi 1, 1.5 and 2: attention and feed-forward side by side on one LayerNorm, a part of a head turned, biases everywhere."""

from __future__ import annotations

import dataclasses

from jaxllm.activation import Mlp
from jaxllm.config import ModelConfig
from jaxllm.hf.families import relative
from jaxllm.hf.family import Family, Key, linears, lm_head, norm, qk_norms
from jaxllm.hf.settings import FLAG, Settings
from jaxllm.norm import LayerNorm
from jaxllm.wiring import Parallel

KIND = relative.Relative(
  **dict(context=2048, eps=1e-5, eps_key="layer_norm_eps", norm=LayerNorm(), activation="gelu_new", mlp=Mlp),
  **dict(biases=("q", "k", "v", "o", "up", "down", "head"), head=dict(partial=0.5)),
)
NAMES = {f"attn/{name}": f"self_attn.{name}_proj" for name in "qkv"}
NAMES |= {"attn/o": "self_attn.dense", "mlp/up": "mlp.fc1", "mlp/down": "mlp.fc2"}
QK_NORMS = {name: f"self_attn.{name}_layernorm" for name in "qk"}


def read(s: Settings) -> ModelConfig:
  """qk_layernorm: queries and keys normalised a head, with weights that all heads share."""
  normed = s.take("qk_layernorm", FLAG, False)
  kind = dataclasses.replace(KIND, qk_over="head" if normed else None)
  cfg = relative.read(s, kind, wiring=Parallel())
  if normed and cfg.head_dim != cfg.embed_dim // cfg.num_heads:
    raise s.error("head_dim", "hidden_size / num_attention_heads, as transformers' qk_layernorm is so wide")
  return cfg


def write(cfg: ModelConfig) -> dict:
  """The inverse of `read`."""
  return relative.write(cfg, KIND) | {"qk_layernorm": cfg.qk_norm is not None}


def keys(cfg: ModelConfig) -> list[Key]:
  """One norm a block."""
  at, ours = "model.layers.{i}.", "layers/{i}/"
  return [
    Key("model.embed_tokens.weight", ("embed",)),
    *norm(cfg.norm, f"{at}input_layernorm", f"{ours}attn_norm"),
    *linears(cfg, at, NAMES),
    *qk_norms(cfg, at, QK_NORMS),
    *norm(cfg.norm, "model.final_layernorm", "final_norm"),
    *lm_head(cfg),
  ]


PHI = Family("phi", "PhiForCausalLM", read, write, keys, eos=2, unused=relative.ROTARY)
