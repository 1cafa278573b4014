"""StableLM: Llama's block with LayerNorm, a part of a head turned, and norms of queries and keys of each head's own."""

from __future__ import annotations

import dataclasses

from jaxllm.config import ModelConfig
from jaxllm.hf.families import relative
from jaxllm.hf.family import Family, Key, linears, lm_head, norm, qk_norms
from jaxllm.hf.settings import FLAG, Settings
from jaxllm.norm import LayerNorm, QkNorm
from jaxllm.wiring import Parallel, Pre

KIND = relative.Relative(
  **dict(kv_heads=32, context=4096, eps=1e-5, eps_key="layer_norm_eps", norm=LayerNorm(), divides=True),
  head=dict(partial=0.25),
)
NAMES = {f"attn/{name}": f"self_attn.{name}_proj" for name in "qkvo"}
NAMES |= {f"mlp/{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")}
QK_NORMS = {name: f"self_attn.{name}_layernorm.norms.{{j}}" for name in "qk"}


def read(s: Settings) -> ModelConfig:
  """use_parallel_residual: both parts on one norm; use_qkv_bias: biases of q, k and v; qk_layernorm: norms without biases."""
  kind = dataclasses.replace(KIND, biases=("q", "k", "v") if s.take("use_qkv_bias", FLAG, False) else ())
  cfg = relative.read(s, kind, wiring=Parallel() if s.take("use_parallel_residual", FLAG, False) else Pre())
  s.settle("head_dim", cfg.embed_dim // cfg.num_heads, why="transformers has no such setting in this family")
  if not s.take("qk_layernorm", FLAG, False):
    return cfg
  return dataclasses.replace(cfg, qk_norm=QkNorm(LayerNorm(cfg.norm.eps, bias=False), "each"))


def write(cfg: ModelConfig) -> dict:
  """The inverse of `read`."""
  plain = relative.write(cfg, KIND) | {
    "use_qkv_bias": "q" in cfg.biases,
    "use_parallel_residual": isinstance(cfg.wiring, Parallel),
    "qk_layernorm": cfg.qk_norm is not None,
  }
  return {name: value for name, value in plain.items() if name != "head_dim"}


def keys(cfg: ModelConfig) -> list[Key]:
  """A norm of queries or keys is a tensor a head."""
  at = "model.layers.{i}."
  return [
    Key("model.embed_tokens.weight", ("embed",)),
    *linears(cfg, at, NAMES),
    *qk_norms(cfg, at, QK_NORMS),
    *(
      key
      for name in cfg.wiring.norms
      for key in norm(cfg.norm, at + relative.NORMS[name], f"layers/{{i}}/{name}")
    ),
    *norm(cfg.norm, "model.norm", "final_norm"),
    *lm_head(cfg),
  ]


STABLELM = Family("stablelm", "StableLmForCausalLM", read, write, keys, eos=0, unused=relative.ROTARY)
