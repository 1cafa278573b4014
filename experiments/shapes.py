"""Published models by name: their shapes, for what needs no weights."""

from __future__ import annotations

from typing import Any

from jaxllm.activation import Glu, Mlp
from jaxllm.config import Layer, ModelConfig
from jaxllm.experts import Moe
from jaxllm.norm import LayerNorm, RMSNorm
from jaxllm.position import Learned, Rope
from jaxllm.wiring import GlmDeepNorm, Sandwich


def _shape(V: int, D: int, L: int, N: int, K: int, F: int, context: int, **more: Any) -> ModelConfig:
  """A decoder of these sizes (letters as in `jaxllm`), Llama's but for `more`."""
  sizes = dict(vocab_size=V, embed_dim=D, num_layers=L, num_heads=N, num_kv_heads=K, mlp_dim=F)
  return ModelConfig(**sizes | dict(head_dim=D // N, context_length=context, dtype="bfloat16") | more)


def _gpt3(D: int, L: int, N: int) -> ModelConfig:
  biases = ("q", "k", "v", "o", "up", "down")
  own = dict(norm=LayerNorm(), mlp=Mlp("gelu_tanh"), biases=biases, tie_embeddings=True)
  return _shape(50257, D, L, N, N, 4 * D, 2048, layers=(Layer(Learned(max_length=2048)),), **own)


SHAPES = {
  "gpt3-175b": _gpt3(12288, 96, 96),
  "llama-7b": _shape(32000, 4096, 32, 32, 32, 11008, 2048),
  "llama-13b": _shape(32000, 5120, 40, 40, 40, 13824, 2048),
  "llama-65b": _shape(32000, 8192, 80, 64, 64, 22016, 2048),
  "llama-3-8b": _shape(128256, 4096, 32, 32, 8, 14336, 8192),
  "llama-3-70b": _shape(128256, 8192, 80, 64, 8, 28672, 8192),
  "mistral-7b": _shape(32000, 4096, 32, 32, 8, 14336, 8192, layers=(Layer(Rope(), 4096),)),
  "mixtral-8x7b": _shape(32000, 4096, 32, 32, 8, 14336, 32768, mlp=Moe()),
  "gemma-2-9b": _shape(
    *(256000, 3584, 42, 16, 8, 14336, 8192),
    **dict(head_dim=256, layers=(Layer(Rope(), 4096), Layer()), tie_embeddings=True, wiring=Sandwich()),
    **dict(mlp=Glu("gelu_tanh"), norm=RMSNorm(scale="1+w"), attention_softcap=50.0, logit_softcap=30.0),
  ),
  "glm-130b": _shape(
    *(150528, 12288, 70, 96, 96, 32768, 2048),
    **dict(mlp=Glu("gelu"), norm=LayerNorm(), wiring=GlmDeepNorm(), tie_embeddings=True),
    biases=("q", "k", "v", "o", "gate", "up", "down"),
  ),
}
"""Configs by name.  Source: config.json of each, and the papers of GPT-3 and GLM-130B."""
