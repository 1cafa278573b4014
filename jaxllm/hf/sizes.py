"""Sizes that a config.json claims, held against its files before a model of such sizes is traced."""

from __future__ import annotations

from typing import Any

from jaxllm.config import ModelConfig
from jaxllm.experts import Moe

SLACK = 16
"""A claim that is wrong by less is told tensor by tensor (`match`); beyond, nothing of that size is worth tracing."""
MOST = 10**14
"""Parameters; beyond, no model is."""


def at_least(cfg: ModelConfig) -> int:
  """About how many parameters a model of these settings has: V D + D (2 N H + F) a layer, with F once an expert.

  To be compared with SLACK: what families have beside it, or do without (narrower embeddings, factored matrices), is less.
  """
  widths = [2 * cfg.num_heads * cfg.head_dim + _mlp_width(cfg, layer.mlp or cfg.mlp) for layer in cfg.layers]
  repeats = cfg.num_layers // len(cfg.layers)
  return cfg.embed_dim * (cfg.vocab_size + repeats * sum(widths))


def _mlp_width(cfg: ModelConfig, mlp: Any) -> int:
  return mlp.num_experts * (mlp.mlp_dim or cfg.mlp_dim) if isinstance(mlp, Moe) else cfg.mlp_dim


def problem(cfg: ModelConfig, values: int | None) -> str | None:
  """What is wrong with the sizes of a model whose files hold so many values (None: not known), in words; None: nothing."""
  count = at_least(cfg)
  allowed = MOST if values is None else min(SLACK * values, MOST)
  if count <= allowed:
    return None
  bits = count.bit_length()
  size = f"{count:,}" if bits < 60 else f"2^{bits - 1}"
  held = "beyond any model" if values is None else f"and the files hold {values:,}"
  return (
    f"asks for some {size} parameters (a vocabulary of {cfg.vocab_size:,}, width {cfg.embed_dim:,}, {cfg.num_layers:,} layers, "
    f"{cfg.num_heads:,} heads of {cfg.head_dim:,}, MLP {cfg.mlp_dim:,}), {held}"
  )
