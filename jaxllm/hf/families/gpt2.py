"""GPT-2: learned positions, and weights [in, out]; GPT-BigCode (StarCoder): queries of all heads to one key, [out, in]."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

from jaxllm.activation import Mlp
from jaxllm.config import Layer, ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.hf.families.relative import ACTIVATION, ACTIVATIONS, activation_name, attention_scale
from jaxllm.hf.family import Blocks, Family, Grouped, Key, Whole, linear, lm_head, norm
from jaxllm.hf.settings import COUNT, DEPTH, FLAG, POSITIVE, Settings
from jaxllm.norm import LayerNorm
from jaxllm.position.absolute import Learned

IGNORED = (
  *("n_ctx", "reorder_and_upcast_attn", "predict_special_tokens", "summary_type", "summary_use_proj"),
  *("summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
)
"""n_ctx is n_positions; scores are float32 here whatever reorder_and_upcast_attn says; the summary is another head's."""
QKV = Blocks(lambda cfg: [cfg.embed_dim] * 3)


def sizes(s: Settings, context: int = 1024) -> dict[str, Any]:
  """The fields of a ModelConfig that GPT-2's names of settings say; context: n_positions where it is missing."""
  D, N = (
    s.take("n_embd", COUNT, also=("hidden_size",)),
    s.take("n_head", COUNT, also=("num_attention_heads",)),
  )
  if D % N:
    raise s.error("n_head", f"a divisor of n_embd = {D}")
  return {
    "vocab_size": s.take("vocab_size", COUNT),
    "embed_dim": D,
    "num_layers": s.take("n_layer", DEPTH, also=("num_hidden_layers",)),
    "num_heads": N,
    "num_kv_heads": N,
    "head_dim": D // N,
    "mlp_dim": s.take("n_inner", COUNT, 4 * D),
    "norm": LayerNorm(float(s.take("layer_norm_epsilon", POSITIVE, 1e-5))),
    "mlp": Mlp(ACTIVATIONS[s.take("activation_function", ACTIVATION, "gelu_new")]),
    "context_length": s.take("n_positions", COUNT, context, also=("max_position_embeddings",)),
  }


def write_sizes(cfg: ModelConfig) -> dict[str, Any]:
  """The inverse of `sizes`."""
  return {
    "vocab_size": cfg.vocab_size,
    "n_positions": cfg.context_length or 2048,
    "n_embd": cfg.embed_dim,
    "n_layer": cfg.num_layers,
    "n_head": cfg.num_heads,
    "n_inner": cfg.mlp_dim,
    "activation_function": activation_name(cfg.mlp),
    "layer_norm_epsilon": cfg.norm.eps,
  }


def read(s: Settings) -> ModelConfig:
  """scale_attn_weights: whether scores are divided by the root of the head's size."""
  s.settle(
    "scale_attn_by_inverse_layer_idx",
    False,
    why="scores divided by the number of their layer are not supported",
  )
  fields = sizes(s)
  scale = fields["head_dim"] if s.take("scale_attn_weights", FLAG, True) else 1
  return ModelConfig(
    layers=(Layer(Learned(fields["context_length"])),),
    biases=("q", "k", "v", "o", "up", "down"),
    attention_scale=attention_scale(scale**-0.5, fields["head_dim"]),
    **fields,
  )


def write(cfg: ModelConfig) -> dict:
  """The inverse of `read`."""
  if not isinstance(learned := cfg.layers[0].position, Learned):
    raise ConfigError(f"layers: found {type(learned).__name__}, expected Learned, which this family has")
  plain = {"n_positions": learned.max_length, "scale_attn_weights": cfg.attention_scale is None}
  return write_sizes(cfg) | plain


def read_bigcode(s: Settings) -> ModelConfig:
  """multi_query: one head of keys and values."""
  cfg = read(s)
  heads = 1 if s.take("multi_query", FLAG, True) else cfg.num_heads
  s.settle("num_key_value_heads", heads, why="as multi_query, which is what counts")
  return dataclasses.replace(cfg, num_kv_heads=heads)


def write_bigcode(cfg: ModelConfig) -> dict:
  """The inverse of `read_bigcode`."""
  return write(cfg) | {"multi_query": cfg.num_kv_heads == 1}


def keys(cfg: ModelConfig, stored: Literal["oi", "io"] = "io", layout: Whole = QKV) -> list[Key]:
  """GPT-2 has queries, keys and values one after the other, along the second axis of a matrix."""
  at, ours = "transformer.h.{i}.", "layers/{i}/"
  return [
    Key("transformer.wte.weight", ("embed",)),
    Key("transformer.wpe.weight", ("positions/0/table",)),
    *norm(cfg.norm, f"{at}ln_1", f"{ours}attn_norm"),
    *linear(cfg, f"{at}attn.c_attn", *(f"{ours}attn/{name}" for name in "qkv"), stored=stored, layout=layout),
    *linear(cfg, f"{at}attn.c_proj", f"{ours}attn/o", stored=stored),
    *norm(cfg.norm, f"{at}ln_2", f"{ours}mlp_norm"),
    *linear(cfg, f"{at}mlp.c_fc", f"{ours}mlp/up", stored=stored),
    *linear(cfg, f"{at}mlp.c_proj", f"{ours}mlp/down", stored=stored),
    *norm(cfg.norm, "transformer.ln_f", "final_norm"),
    *lm_head(cfg),
  ]


UNUSED = (r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",)
GPT2 = Family(
  *("gpt2", "GPT2LMHeadModel", read, write, keys),
  **dict(tied=True, eos=50256, prefix="transformer.", ignored=IGNORED, unused=UNUSED),
)
BIGCODE_IGNORED = (
  *("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "inference_runner"),
  *(
    "validate_runner_input",
    "pre_allocate_kv_cache",
    "max_sequence_length",
    "max_batch_size",
    "pad_key_length",
  ),
)
"""In which type scores are computed, which is float32 here, and how a server ran the model."""
GPT_BIGCODE = Family(
  *("gpt_bigcode", "GPTBigCodeForCausalLM", read_bigcode, write_bigcode),
  functools.partial(keys, stored="oi", layout=Grouped()),
  **dict(tied=True, eos=50256, prefix="transformer.", ignored=IGNORED + BIGCODE_IGNORED, unused=UNUSED),
)
