"""What families of experts share: the settings that say how many of which size, and Llama's tensors without its dense layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxllm.config import ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.experts import Moe, SoftmaxRouter
from jaxllm.hf.families import relative
from jaxllm.hf.family import Key
from jaxllm.hf.settings import COUNT, Settings

TRAINING = ("output_router_logits", "router_aux_loss_coef", "router_jitter_noise")
"""Settings of the loss that balances experts, and of noise in training: no logit depends on them."""
TOP_K = "num_experts_per_tok"


def read(
  s: Settings, cfg: ModelConfig, names: Sequence[str], experts: int, top_k: int, **fields: Any
) -> ModelConfig:
  """The config with a mixture of its feed-forward layer.

  names: of the setting that says how many experts there are; experts, top_k: the numbers where they are missing.
  """
  count = s.take(names[0], COUNT, experts, also=names[1:])
  chosen = s.take(TOP_K, COUNT, top_k)
  if chosen > count:
    raise s.error(TOP_K, f"at most {names[0]} = {count}")
  return dataclasses.replace(cfg, mlp=Moe(cfg.mlp, count, chosen, **fields))


def of(cfg: ModelConfig) -> Moe:
  """The mixture of a config; raises ConfigError where it has none."""
  if not isinstance(cfg.mlp, Moe):
    raise ConfigError(f"mlp: found {cfg.mlp}, expected a Moe, as the layers of this family have experts")
  return cfg.mlp


def write(cfg: ModelConfig, kind: relative.Relative, name: str) -> dict[str, Any]:
  """What `relative.write` writes of the config, with one expert for its feed-forward layer, and the numbers of experts."""
  moe = of(cfg)
  biases = tuple(one for one in cfg.biases if one != "router")
  plain = relative.write(dataclasses.replace(cfg, mlp=moe.expert, biases=biases), kind)
  return plain | {name: moe.num_experts, TOP_K: moe.top_k}


def renormalizes(cfg: ModelConfig) -> bool:
  """Whether the weights of the experts of a token add up to 1; raises ConfigError for a router of another kind."""
  router = of(cfg).router
  if not isinstance(router, SoftmaxRouter):
    raise ConfigError(f"mlp.router: found {router}, expected a SoftmaxRouter, which this family has")
  return router.renormalize


def rest(cfg: ModelConfig) -> list[Key]:
  """Llama's tensors of all but the feed-forward layers."""
  return [key for key in relative.keys(cfg) if "/mlp/" not in key.ours[0]]


def separate(cfg: ModelConfig, theirs: str, ours: str, names: Sequence[str]) -> list[Key]:
  """The router, and each expert's gate, up and down, which `names` are theirs of, as tensors of their own."""
  count = of(cfg).num_experts
  keys = [Key(f"{theirs}.gate.weight", (f"{ours}/router/w",), "oi")]
  for mine, name in zip(relative.MLP, names, strict=True):
    keys.append(
      Key(f"{theirs}.experts.{{j}}.{name}.weight", (f"{ours}/experts/{mine}/w",), "oi", stack=count)
    )
  return keys
