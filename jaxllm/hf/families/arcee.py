"""Arcee (AFM): Llama with a feed-forward layer of two matrices and squared ReLU."""

from __future__ import annotations

from jaxllm.activation import Mlp
from jaxllm.config import ModelConfig
from jaxllm.hf.families import relative
from jaxllm.hf.family import Family
from jaxllm.hf.settings import Settings

KIND = relative.Relative(
  **dict(context=4096, eps=1e-5, activation="relu2", mlp=Mlp),
  **dict(attention_bias=True, mlp_bias=True, divides=True),
)


def read(s: Settings) -> ModelConfig:
  """Every layer alike."""
  return relative.read(s, KIND)


def write(cfg: ModelConfig) -> dict:
  """The inverse of `read`."""
  return relative.write(cfg, KIND)


ARCEE = Family("arcee", "ArceeForCausalLM", read, write, relative.keys, eos=128001)
