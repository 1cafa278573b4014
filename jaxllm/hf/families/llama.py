"""Llama 1, 2, 3, 3.1, 3.2 and everything that calls itself one."""

from __future__ import annotations

from jaxllm.config import ModelConfig
from jaxllm.hf.families import relative
from jaxllm.hf.family import Family
from jaxllm.hf.settings import Settings

KIND = relative.Relative(attention_bias=True, mlp_bias=True, divides=True)


def read(s: Settings) -> ModelConfig:
  """Every layer alike."""
  s.settle("rope_interleaved", False, why="transformers turns halves in this family")
  return relative.read(s, KIND)


def write(cfg: ModelConfig) -> dict:
  """The inverse of `read`."""
  return relative.write(cfg, KIND)


NOTES = ("max_sequence_length", "is_llama_config")
"""What some files say and transformers does not read."""
LLAMA = Family(
  "llama", "LlamaForCausalLM", read, write, relative.keys, eos=2, unused=relative.ROTARY, ignored=NOTES
)
