"""Phi-3, 3.5 and 4: fused projections, LongRoPE, partial rotation."""

from __future__ import annotations

from jaxllm.config import ModelConfig
from jaxllm.hf import rope
from jaxllm.hf.families import relative
from jaxllm.hf.family import Family, Key, linear
from jaxllm.hf.settings import Settings

# the trained length is a setting of its own, and decides even where the RoPE's object has one
KIND = relative.Relative(
  context=4096,
  eps=1e-5,
  head=dict(partial=1.0, original=4096, types=("default", "longrope"), aliases={"yarn": "longrope"}),
)
NAMES_OF_NOTHING = ("full_attn_mod", "interpolate_factor")


def read(s: Settings) -> ModelConfig:
  """A window on all layers or none."""
  s.settle("lm_head_bias", False, why="transformers has no bias there in this family")
  for name in NAMES_OF_NOTHING:
    s.settle(name, 1, why="transformers does not read it")
  return relative.read(s, KIND, relative.one_window(s, None, lambda head: rope.read(s, head)))


def write(cfg: ModelConfig) -> dict:
  """The inverse of `read`."""
  plain = relative.write(cfg, KIND) | {"sliding_window": cfg.layers[0].window}
  length = plain.get("rope_scaling", {}).get(rope.LENGTH) or relative.rope_of(cfg).original_length
  return plain | ({rope.LENGTH: length} if length else {})


def keys(cfg: ModelConfig) -> list[Key]:
  """Two fused matrices a layer."""
  at, ours = "model.layers.{i}.", "layers/{i}/"
  return [
    Key("model.embed_tokens.weight", ("embed",)),
    *linear(cfg, f"{at}self_attn.qkv_proj", *(f"{ours}attn/{name}" for name in "qkv"), layout=relative.QKV),
    *linear(cfg, f"{at}self_attn.o_proj", f"{ours}attn/o"),
    *relative.feed_forward(cfg, at, "gate_up_proj"),
    *relative.ends(cfg, at, relative.NORMS),
  ]


PHI3 = Family("phi3", "Phi3ForCausalLM", read, write, keys, eos=32000, unused=relative.ROTARY)
