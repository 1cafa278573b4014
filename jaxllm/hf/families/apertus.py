"""Apertus: xIELU with learned slopes in a feed-forward layer of two matrices, queries and keys normalised, llama3 RoPE."""

from __future__ import annotations

import dataclasses

from jaxllm.activation import Mlp, Xielu
from jaxllm.config import Layer, ModelConfig
from jaxllm.hf import rope
from jaxllm.hf.families import relative
from jaxllm.hf.family import Family, Key
from jaxllm.hf.settings import Settings
from jaxllm.position import Rope

XIELU = "xielu"
KIND = relative.Relative(
  **dict(context=65536, base=1.2e7, eps=1e-5, attention_bias=True, qk_over="head"),
  **dict(activation=XIELU, activations=relative.ACTIVATIONS | {XIELU: XIELU}),
  mlp=lambda name: Xielu() if name == XIELU else Mlp(name),
)
ROPE = dict(rope_type="llama3", rope_theta=1.2e7, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
ROPE[rope.LENGTH] = 8192
"""rope_parameters where config.json has none."""
NORMS = {"attn_norm": "attention_layernorm", "mlp_norm": "feedforward_layernorm"}


def read(s: Settings) -> ModelConfig:
  """Every layer alike."""
  for name, value in (("post_norm", False), ("qk_norm", True)):
    s.settle(name, value, why="transformers has nothing else in this family")
  return relative.read(s, KIND, lambda num_layers, head: [Layer(read_rope(s, head))])


def read_rope(s: Settings, head: rope.Head) -> Rope:
  """llama3 of the first release where config.json has no object of RoPE, not even an empty one."""
  group = rope.group_of(s)
  if not group and not s.has("rope_parameters"):
    group = Settings(ROPE, s.source, "rope_parameters")
  return rope.read_group(s, group, head)


def write(cfg: ModelConfig) -> dict:
  """The inverse of `read`."""
  learned = isinstance(cfg.mlp, Xielu)
  plain = relative.write(dataclasses.replace(cfg, mlp=Mlp()) if learned else cfg, KIND)
  plain |= {"hidden_act": XIELU} if learned else {}
  return {"rope_scaling": {"rope_type": "default"}} | plain


def keys(cfg: ModelConfig) -> list[Key]:
  """With two slopes a layer."""
  names = cfg.mlp.params()
  slopes = [Key(f"model.layers.{{i}}.mlp.act_fn.{name}", (f"layers/{{i}}/mlp/{name}",)) for name in names]
  return relative.keys(cfg, NORMS) + slopes


def constants(cfg: ModelConfig) -> dict[str, float]:
  """What files hold of xIELU beside its slopes."""
  if not isinstance(cfg.mlp, Xielu):
    return {}
  return {f"model.layers.{{i}}.mlp.act_fn.{name}": getattr(cfg.mlp, name) for name in ("beta", "eps")}


APERTUS = Family("apertus", "ApertusForCausalLM", read, write, keys, eos=2, constants=constants)
