"""OLMo 2: only what is added to the residual is normalised, and queries and keys over all heads at once."""

from __future__ import annotations

from jaxllm.config import ModelConfig
from jaxllm.hf.families import relative
from jaxllm.hf.family import Family, Key
from jaxllm.hf.settings import Settings
from jaxllm.norm import RMSNorm
from jaxllm.wiring import PostOnly

KIND = relative.Relative(eps=1e-5, attention_bias=True, norm=RMSNorm(), qk_over="all")
NORMS = {"attn_norm": "post_attention_layernorm", "mlp_norm": "post_feedforward_layernorm"}


def read(s: Settings) -> ModelConfig:
  """Every layer alike."""
  return relative.read(s, KIND, wiring=PostOnly())


def write(cfg: ModelConfig) -> dict:
  """The inverse of `read`."""
  return relative.write(cfg, KIND)


def keys(cfg: ModelConfig) -> list[Key]:
  """With the names of the norms after."""
  return relative.keys(cfg, NORMS)


OLMO2 = Family("olmo2", "Olmo2ForCausalLM", read, write, keys, eos=50279)
