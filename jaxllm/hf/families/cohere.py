"""Command R and R7B (Cohere 1 and 2): attention and feed-forward side by side after one LayerNorm, interleaved pairs."""

from __future__ import annotations

import dataclasses

from jaxllm.config import Layer, ModelConfig
from jaxllm.hf import rope
from jaxllm.hf.families import relative
from jaxllm.hf.family import Family, Key
from jaxllm.hf.settings import COUNT, FLAG, POSITIVE, Settings
from jaxllm.norm import LayerNorm, QkNorm
from jaxllm.wiring import Parallel

SHARED = dict(
  context=8192, eps=1e-5, eps_key="layer_norm_eps", norm=LayerNorm(bias=False), attention_bias=True
)
SHARED["head"] = dict(layout="interleaved")
KIND = relative.Relative(base=5e5, **SHARED)
KIND2 = relative.Relative(**SHARED)
ONLY = {  # of the second one's files: what transformers does not read, and what it does all the same
  **dict(use_parallel_block=True, use_gated_activation=True, use_embedding_sharing=True),
  **dict(position_embedding_type="rope_gptj", rotary_pct=1.0, order_of_interleaved_layers="local_attn_first"),
}


def read(s: Settings) -> ModelConfig:
  """use_qk_norm: queries and keys by a LayerNorm with weights of its own for each head."""
  normed = s.take("use_qk_norm", FLAG, False)
  cfg = _read(s, KIND)
  return dataclasses.replace(cfg, qk_norm=QkNorm(cfg.norm, "each")) if normed else cfg


def write(cfg: ModelConfig) -> dict:
  """The inverse of `read`."""
  return relative.write(cfg, KIND) | {"logit_scale": cfg.logit_scale, "use_qk_norm": cfg.qk_norm is not None}


def read2(s: Settings) -> ModelConfig:
  """RoPE on the layers with a window, three of four, and no positions on the others."""
  s.settle("use_qk_norm", False, why="transformers has no such norms in this family")
  for name, value in ONLY.items():
    s.settle(name, value, why="transformers has nothing else in this family")
  size = s.take("sliding_window", COUNT, 4096, null=None)
  every = s.take("sliding_window_pattern", COUNT, 4)
  s.settle("layer_switch", every, why="as sliding_window_pattern, which is what counts")

  def layers(num_layers: int, head: rope.Head) -> list[Layer]:
    windows = relative.layer_windows(s, num_layers, size, lambda i: (i + 1) % every != 0)
    return relative.rope_in_windows(s, head, windows)

  return _read(s, KIND2, layers)


def write2(cfg: ModelConfig) -> dict:
  """The inverse of `read2`."""
  plain = relative.write(cfg, KIND2) | relative.window_settings(cfg)
  return plain | {"logit_scale": cfg.logit_scale}


def _read(s: Settings, kind: relative.Relative, layers=None) -> ModelConfig:
  scale = float(s.take("logit_scale", POSITIVE, 0.0625))
  return relative.read(s, kind, layers, wiring=Parallel(), logit_scale=scale)


def keys(cfg: ModelConfig) -> list[Key]:
  """With one norm a block."""
  return relative.keys(cfg, {"attn_norm": "input_layernorm"})


NOTES = ("model_max_length", "use_parallel_embedding")
"""A tokenizer's limit, and how weights lay on the authors' machines."""
ROW = dict(tied=True, eos=255001, unused=relative.ROTARY, ignored=NOTES)
COHERE = Family("cohere", "CohereForCausalLM", read, write, keys, **ROW)
COHERE2 = Family("cohere2", "Cohere2ForCausalLM", read2, write2, keys, **ROW)
