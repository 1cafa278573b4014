"""Mixtral: Mistral with a mixture of experts, two of eight a token."""

from __future__ import annotations

from jaxllm.config import ModelConfig
from jaxllm.hf import rope
from jaxllm.hf.families import mixture, relative
from jaxllm.hf.family import Family, Key
from jaxllm.hf.settings import Settings

KIND = relative.Relative(kv_heads=8, context=4096 * 32, base=1e6, eps=1e-5)
COUNTS = ("num_local_experts", "num_experts")


def read(s: Settings) -> ModelConfig:
  """One window on all layers or none; a token's weights add up to 1."""
  cfg = relative.read(s, KIND, relative.one_window(s, None, lambda head: rope.read(s, head)))
  return mixture.read(s, cfg, COUNTS, experts=8, top_k=2)


def write(cfg: ModelConfig) -> dict:
  """The inverse of `read`."""
  return mixture.write(cfg, KIND, COUNTS[0]) | {"sliding_window": cfg.layers[0].window}


def keys(cfg: ModelConfig) -> list[Key]:
  """w1 is the gate, w3 goes up and w2 down, of each expert."""
  at, ours = "model.layers.{i}.block_sparse_moe", "layers/{i}/mlp"
  return mixture.rest(cfg) + mixture.separate(cfg, at, ours, ("w1", "w3", "w2"))


ROW = dict(eos=2, unused=relative.ROTARY, ignored=mixture.TRAINING)
MIXTRAL = Family("mixtral", "MixtralForCausalLM", read, write, keys, **ROW)
