"""Nemotron and Minitron: LayerNorm by 1 + w, squared ReLU without a gate, half of a head turned."""

from __future__ import annotations

from jaxllm.activation import Mlp
from jaxllm.config import ModelConfig
from jaxllm.hf.families import relative
from jaxllm.hf.family import Family
from jaxllm.hf.settings import Settings
from jaxllm.norm import LayerNorm

KIND = relative.Relative(
  **dict(
    context=4096, eps=1e-5, eps_key="norm_eps", norm=LayerNorm(scale="1+w"), activation="relu2", mlp=Mlp
  ),
  **dict(attention_bias=True, mlp_bias=True, head=dict(partial=0.5)),
)


def read(s: Settings) -> ModelConfig:
  """Every layer alike."""
  return relative.read(s, KIND)


def write(cfg: ModelConfig) -> dict:
  """The inverse of `read`."""
  return relative.write(cfg, KIND)


NEMOTRON = Family(
  "nemotron", "NemotronForCausalLM", read, write, relative.keys, eos=3, unused=relative.ROTARY
)
