"""StarCoder 2: LayerNorm, one window on all layers, biases everywhere or nowhere."""

from __future__ import annotations

import dataclasses

from jaxllm.activation import Mlp
from jaxllm.config import ModelConfig
from jaxllm.hf import rope
from jaxllm.hf.families import relative
from jaxllm.hf.family import Family, Key, linears
from jaxllm.hf.settings import FLAG, Settings
from jaxllm.norm import LayerNorm

KIND = relative.Relative(
  **dict(kv_heads=2, context=4096, eps=1e-5, eps_key="norm_epsilon", norm=LayerNorm()),
  **dict(activation="gelu_pytorch_tanh", mlp=Mlp),
)
BIASES = ("q", "k", "v", "o", "up", "down")
NAMES = {f"attn/{name}": f"self_attn.{name}_proj" for name in "qkvo"}
NAMES |= {"mlp/up": "mlp.c_fc", "mlp/down": "mlp.c_proj"}
IGNORED = (
  *("activation_function", "residual_dropout", "embedding_dropout"),
  *("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32"),
)
"""The authors' own name of an activation, of which transformers reads hidden_act only; scores are float32 here."""


def read(s: Settings) -> ModelConfig:
  """use_bias: whether the matrices of all layers have biases."""
  only = {"norm_type": "layer_norm", "mlp_type": "default", "scale_attn_weights": True}
  for name, value in only.items():
    s.settle(name, value, why="transformers' StarCoder 2 has no other")
  kind = dataclasses.replace(KIND, biases=BIASES if s.take("use_bias", FLAG, True) else ())
  cfg = relative.read(s, kind, relative.one_window(s, None, lambda head: rope.read(s, head)))
  s.settle("layer_norm_epsilon", cfg.norm.eps, why="as norm_epsilon, which is what counts")
  return cfg


def write(cfg: ModelConfig) -> dict:
  """The inverse of `read`."""
  own = {"sliding_window": cfg.layers[0].window, "use_bias": "q" in cfg.biases}
  return relative.write(cfg, KIND) | own


def keys(cfg: ModelConfig) -> list[Key]:
  """With the names of GPT-2's feed-forward layer."""
  at = "model.layers.{i}."
  return [
    Key("model.embed_tokens.weight", ("embed",)),
    *linears(cfg, at, NAMES),
    *relative.ends(cfg, at, relative.NORMS),
  ]


STARCODER2 = Family(
  *("starcoder2", "Starcoder2ForCausalLM", read, write, keys),
  **dict(tied=True, eos=50256, ignored=IGNORED, unused=relative.ROTARY),
)
