"""Persimmon: squared ReLU, queries and keys normalised by a LayerNorm that all heads share, fused projections a head."""

from __future__ import annotations

import dataclasses

from jaxllm.activation import Mlp
from jaxllm.config import ModelConfig
from jaxllm.hf.families import relative
from jaxllm.hf.family import Family, Grouped, Key, linear, linears, lm_head, norm, qk_norms
from jaxllm.hf.settings import FLAG, Settings
from jaxllm.norm import LayerNorm

KIND = relative.Relative(
  **dict(context=16384, eps=1e-5, eps_key="layer_norm_eps", norm=LayerNorm(), activation="relu2", mlp=Mlp),
  **dict(biases=("q", "k", "v", "o", "up", "down"), divides=True, head=dict(partial=0.5)),
)
NAMES = {"attn/o": "self_attn.dense", "mlp/up": "mlp.dense_h_to_4h", "mlp/down": "mlp.dense_4h_to_h"}
QK_NORMS = {name: f"self_attn.{name}_layernorm" for name in "qk"}


def read(s: Settings) -> ModelConfig:
  """qk_layernorm is true where it is missing."""
  kind = dataclasses.replace(KIND, qk_over="head" if s.take("qk_layernorm", FLAG, True) else None)
  cfg = relative.read(s, kind)
  for name, heads in (("head_dim", cfg.embed_dim // cfg.num_heads), ("num_key_value_heads", cfg.num_heads)):
    s.settle(name, heads, why="transformers has no such setting in this family")
  return cfg


def write(cfg: ModelConfig) -> dict:
  """The inverse of `read`."""
  plain = relative.write(cfg, KIND) | {"qk_layernorm": cfg.qk_norm is not None}
  return {name: value for name, value in plain.items() if name not in ("head_dim", "num_key_value_heads")}


def keys(cfg: ModelConfig) -> list[Key]:
  """Queries, keys and values a head."""
  at, ours = "model.layers.{i}.", "layers/{i}/"
  qkv = (f"{ours}attn/{name}" for name in "qkv")
  return [
    Key("model.embed_tokens.weight", ("embed",)),
    *norm(cfg.norm, f"{at}input_layernorm", f"{ours}attn_norm"),
    *linear(cfg, f"{at}self_attn.query_key_value", *qkv, layout=Grouped()),
    *qk_norms(cfg, at, QK_NORMS),
    *linears(cfg, at, NAMES),
    *norm(cfg.norm, f"{at}post_attention_layernorm", f"{ours}mlp_norm"),
    *norm(cfg.norm, "model.final_layernorm", "final_norm"),
    *lm_head(cfg),
  ]


PERSIMMON = Family("persimmon", "PersimmonForCausalLM", read, write, keys, eos=2, unused=relative.ROTARY)
