"""GLM-4 and GLM-4-0414: interleaved pairs on half of a head, gate and up in one matrix; the latter with sandwich norms."""

from __future__ import annotations

import functools

from jaxllm.config import ModelConfig
from jaxllm.hf.families import relative
from jaxllm.hf.family import Family, Key
from jaxllm.hf.settings import Settings
from jaxllm.wiring import Pre, Sandwich, Wiring

KIND = relative.Relative(
  **dict(
    kv_heads=2, head_dim=128, context=131072, eps=1.5625e-7, head=dict(partial=0.5, layout="interleaved")
  ),
  **dict(attention_bias=True, attention_biases="qkv", attention_biased=True),
)
SANDWICH = {
  "attn_norm": "input_layernorm",
  "attn_post_norm": "post_self_attn_layernorm",
  "mlp_norm": "post_attention_layernorm",  # before the feed-forward layer, whatever its name says
  "mlp_post_norm": "post_mlp_layernorm",
}


def read(s: Settings, wiring: Wiring) -> ModelConfig:
  """attention_bias, which is true where it is missing, is of queries, keys and values."""
  return relative.read(s, KIND, wiring=wiring)


def write(cfg: ModelConfig) -> dict:
  """The inverse of `read`."""
  return relative.write(cfg, KIND)


def keys(cfg: ModelConfig, norms: dict[str, str]) -> list[Key]:
  """The activated half of gate_up_proj is the first."""
  return relative.keys(cfg, norms, gate_up="gate_up_proj")


def _family(model_type: str, architecture: str, wiring: Wiring, norms: dict[str, str]) -> Family:
  reader = functools.partial(read, wiring=wiring)
  eos = (151329, 151336, 151338)
  return Family(model_type, architecture, reader, write, functools.partial(keys, norms=norms), eos=eos)


GLM = _family("glm", "GlmForCausalLM", Pre(), relative.NORMS)
GLM4 = _family("glm4", "Glm4ForCausalLM", Sandwich(), SANDWICH)
