"""Qwen 3 with experts: queries and keys normalised, dense layers among those of experts."""

from __future__ import annotations

import dataclasses

from jaxllm.config import Layer, ModelConfig
from jaxllm.experts import SoftmaxRouter
from jaxllm.hf import rope
from jaxllm.hf.families import mixture, relative
from jaxllm.hf.family import Family, Key, linear
from jaxllm.hf.settings import COUNT, FLAG, Kind, Settings

KIND = relative.Relative(kv_heads=4, context=32768, attention_bias=True, qk_over="head")
COUNTS = ("num_experts", "num_local_experts")
NUMBERS = Kind(
  "a list of the numbers of at most 10,000 layers, from 0",
  lambda x: (
    isinstance(x, list) and len(x) <= 10_000 and all(type(one) is int and 0 <= one < 2**31 for one in x)
  ),
)


def read(s: Settings) -> ModelConfig:
  """A window on all layers, only if use_sliding_window; experts in each decoder_sparse_step-th layer, but mlp_only_layers."""
  size = s.take("sliding_window", COUNT, 4096, null=None)
  if not s.take("use_sliding_window", FLAG, False):
    size = None
  cfg = relative.read(s, KIND, lambda _, head: [Layer(rope.read(s, head), size)])
  router = SoftmaxRouter(s.take("norm_topk_prob", FLAG, False))
  width = s.take("moe_intermediate_size", COUNT, 768)
  dense, step = set(s.take("mlp_only_layers", NUMBERS, [])), s.take("decoder_sparse_step", COUNT, 1)
  layer = cfg.layers[0]
  layers = [
    dataclasses.replace(layer, mlp=cfg.mlp if i in dense or (i + 1) % step else None)
    for i in range(cfg.num_layers)
  ]
  cfg = dataclasses.replace(cfg, layers=relative.pattern(layers))
  return mixture.read(s, cfg, COUNTS, experts=128, top_k=8, router=router, mlp_dim=width)


def write(cfg: ModelConfig) -> dict:
  """The inverse of `read`."""
  moe, window = mixture.of(cfg), cfg.layers[0].window
  return mixture.write(cfg, KIND, COUNTS[0]) | {
    "moe_intermediate_size": moe.mlp_dim or cfg.mlp_dim,
    "norm_topk_prob": mixture.renormalizes(cfg),
    "mlp_only_layers": [i for i, layer in enumerate(relative.all_layers(cfg)) if layer.mlp is not None],
    "decoder_sparse_step": 1,
    "use_sliding_window": window is not None,
    "sliding_window": window,
  }


def keys(cfg: ModelConfig) -> list[Key]:
  """Of a layer either the dense tensors of Qwen 3, or a router and those of each expert."""
  out, names = mixture.rest(cfg), [f"{name}_proj" for name in relative.MLP]
  for i, layer in enumerate(relative.all_layers(cfg)):
    at, ours = f"model.layers.{i}.mlp", f"layers/{i}/mlp"
    if layer.mlp is None:
      out += mixture.separate(cfg, at, ours, names)
    else:
      for mine, name in zip(relative.MLP, names, strict=True):
        out += linear(cfg, f"{at}.{name}", f"{ours}/{mine}")
  return out


ROW = dict(unused=relative.ROTARY, ignored=("max_window_layers", *mixture.TRAINING))
QWEN3_MOE = Family("qwen3_moe", "Qwen3MoeForCausalLM", read, write, keys, **ROW)
