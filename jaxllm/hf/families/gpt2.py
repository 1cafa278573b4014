"""GPT-2: learned positions, and weights [in, out]."""

from __future__ import annotations

import dataclasses

from jaxllm.activation import Mlp
from jaxllm.config import Layer, ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.hf.families.relative import ACTIVATION, ACTIVATIONS, activation_name, attention_scale
from jaxllm.hf.family import Blocks, Family, Key, linear, norm
from jaxllm.hf.settings import COUNT, DEPTH, FLAG, POSITIVE, Settings
from jaxllm.norm import LayerNorm
from jaxllm.position.absolute import Learned

IGNORED = (
  *("n_ctx", "reorder_and_upcast_attn", "predict_special_tokens", "summary_type", "summary_use_proj"),
  *("summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
)
"""n_ctx is n_positions; scores are float32 here whatever reorder_and_upcast_attn says; the summary is another head's."""
QKV = Blocks(lambda cfg: [cfg.embed_dim] * 3)


def read(s: Settings) -> ModelConfig:
  """scale_attn_weights: whether scores are divided by the root of the head's size."""
  D, N = (
    s.take("n_embd", COUNT, also=("hidden_size",)),
    s.take("n_head", COUNT, also=("num_attention_heads",)),
  )
  if D % N:
    raise s.error("n_head", f"a divisor of n_embd = {D}")
  s.settle(
    "scale_attn_by_inverse_layer_idx",
    False,
    why="scores divided by the number of their layer are not supported",
  )
  act = ACTIVATIONS[s.take("activation_function", ACTIVATION, "gelu_new")]
  length = s.take("n_positions", COUNT, 1024, also=("max_position_embeddings",))
  scale = D // N if s.take("scale_attn_weights", FLAG, True) else 1
  cfg = ModelConfig(
    vocab_size=s.take("vocab_size", COUNT),
    embed_dim=D,
    num_layers=s.take("n_layer", DEPTH, also=("num_hidden_layers",)),
    num_heads=N,
    num_kv_heads=N,
    head_dim=D // N,
    mlp_dim=s.take("n_inner", COUNT, 4 * D),
    layers=(Layer(Learned(length)),),
    norm=LayerNorm(float(s.take("layer_norm_epsilon", POSITIVE, 1e-5))),
    mlp=Mlp(act),
    biases=("q", "k", "v", "o", "up", "down"),
    context_length=length,
  )
  return dataclasses.replace(cfg, attention_scale=attention_scale(scale**-0.5, cfg.head_dim))


def write(cfg: ModelConfig) -> dict:
  """The inverse of `read`."""
  if not isinstance(learned := cfg.layers[0].position, Learned):
    raise ConfigError(f"layers: found {type(learned).__name__}, expected Learned, which this family has")
  return {
    "vocab_size": cfg.vocab_size,
    "n_positions": learned.max_length,
    "n_embd": cfg.embed_dim,
    "n_layer": cfg.num_layers,
    "n_head": cfg.num_heads,
    "n_inner": cfg.mlp_dim,
    "activation_function": activation_name(cfg.mlp),
    "layer_norm_epsilon": cfg.norm.eps,
    "scale_attn_weights": cfg.attention_scale is None,
  }


def keys(cfg: ModelConfig) -> list[Key]:
  """Queries, keys and values one after the other, along the second axis of a matrix."""
  at, ours = "transformer.h.{i}.", "layers/{i}/"
  return [
    Key("transformer.wte.weight", ("embed",)),
    Key("transformer.wpe.weight", ("positions/0/table",)),
    *norm(cfg.norm, f"{at}ln_1", f"{ours}attn_norm"),
    *linear(cfg, f"{at}attn.c_attn", *(f"{ours}attn/{name}" for name in "qkv"), stored="io", layout=QKV),
    *linear(cfg, f"{at}attn.c_proj", f"{ours}attn/o", stored="io"),
    *norm(cfg.norm, f"{at}ln_2", f"{ours}mlp_norm"),
    *linear(cfg, f"{at}mlp.c_fc", f"{ours}mlp/up", stored="io"),
    *linear(cfg, f"{at}mlp.c_proj", f"{ours}mlp/down", stored="io"),
    *norm(cfg.norm, "transformer.ln_f", "final_norm"),
    *([] if cfg.tie_embeddings else [Key("lm_head.weight", ("head",), "oi")]),
  ]


UNUSED = (r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",)
GPT2 = Family(
  *("gpt2", "GPT2LMHeadModel", read, write, keys),
  **dict(tied=True, eos=50256, prefix="transformer.", ignored=IGNORED, unused=UNUSED),
)
