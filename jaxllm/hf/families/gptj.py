"""GPT-J and CodeGen: neighbours turned in pairs, side by side on one norm, a head with a bias."""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxllm.config import Layer, ModelConfig
from jaxllm.hf.families import gpt2
from jaxllm.hf.families.relative import rope_of
from jaxllm.hf.family import Family, Key, Whole, linear, linears, lm_head, norm
from jaxllm.hf.settings import COUNT, Kind, Settings
from jaxllm.position import Rope
from jaxllm.wiring import Parallel

BASE = 10000.0
"""There is no setting for it."""
IGNORED = (*gpt2.IGNORED, "gradient_checkpointing")
NAMES = {f"attn/{name}": f"attn.{name}_proj" for name in "qkv"}
OTHER_NAMES = {"attn/o": "attn.out_proj", "mlp/up": "mlp.fc_in", "mlp/down": "mlp.fc_out"}


@dataclasses.dataclass(frozen=True)
class Shards(Whole):
  """Queries, values and keys, in this order, of a quarter of the width at a time: [4, 3, D / 4] rows.

  CodeGen was trained on four devices, each with its own part of the heads.
  """

  count = 4

  def split(self, x, cfg, axis):
    """q, k and v."""
    parts = np.moveaxis(x, axis, 0).reshape(self.count, 3, -1, *np.moveaxis(x, axis, 0).shape[1:])
    return [np.moveaxis(parts[:, n].reshape(-1, *parts.shape[3:]), 0, axis) for n in (0, 2, 1)]

  def join(self, parts, cfg, axis):
    """The inverse of `split`."""
    q, k, v = (np.moveaxis(part, axis, 0) for part in parts)
    rest = q.shape[1:]
    shards = [part.reshape(self.count, -1, *rest) for part in (q, v, k)]
    return np.moveaxis(np.stack(shards, axis=1).reshape(-1, *rest), 0, axis)


def read(s: Settings) -> ModelConfig:
  """rotary_dim: how many coordinates of a head are turned."""
  for name in ("rotary", "scale_attn_weights"):
    s.settle(name, True, why="transformers has no other in this family")
  fields = gpt2.sizes(s, context=2048)
  H = fields["head_dim"]
  turned = Kind(f"an even number up to {H}, a head's size", lambda x: COUNT.fits(x) and x % 2 == 0 and x <= H)
  if not turned.fits(rotary_dim := s.take("rotary_dim", turned, 64)):
    raise s.error("rotary_dim", f"{turned.expected}; without it, 64 are turned")
  method = Rope(BASE, rotary_dim, "interleaved", original_length=fields["context_length"])
  return ModelConfig(layers=(Layer(method),), wiring=Parallel(), biases=("up", "down", "head"), **fields)


def write(cfg: ModelConfig) -> dict:
  """The inverse of `read`."""
  return gpt2.write_sizes(cfg) | {"rotary_dim": cfg.rotary_dim(rope_of(cfg))}


def keys(cfg: ModelConfig) -> list[Key]:
  """Of GPT-J."""
  return _keys(cfg, linears(cfg, "transformer.h.{i}.", NAMES))


def read_codegen(s: Settings) -> ModelConfig:
  """As GPT-J."""
  cfg = read(s)
  if cfg.embed_dim % Shards.count:
    raise s.error("n_embd", f"a multiple of {Shards.count}, the parts in which qkv_proj was trained")
  return cfg


def keys_codegen(cfg: ModelConfig) -> list[Key]:
  """With fused queries, values and keys."""
  ours = (f"layers/{{i}}/attn/{name}" for name in "qkv")
  return _keys(cfg, linear(cfg, "transformer.h.{i}.attn.qkv_proj", *ours, layout=Shards()))


def _keys(cfg: ModelConfig, qkv: list[Key]) -> list[Key]:
  at = "transformer.h.{i}."
  return [
    Key("transformer.wte.weight", ("embed",)),
    *norm(cfg.norm, f"{at}ln_1", "layers/{i}/attn_norm"),
    *qkv,
    *linears(cfg, at, OTHER_NAMES),
    *norm(cfg.norm, "transformer.ln_f", "final_norm"),
    *lm_head(cfg),
  ]


UNUSED = (r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias|causal_mask)",)
OF_BOTH = dict(eos=50256, prefix="transformer.", ignored=IGNORED, unused=UNUSED)
GPTJ = Family("gptj", "GPTJForCausalLM", read, write, keys, **OF_BOTH)
CODEGEN = Family("codegen", "CodeGenForCausalLM", read_codegen, write, keys_codegen, **OF_BOTH)
