"""MPT: ALiBi, no biases, clipped projections."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jaxllm.activation import Mlp
from jaxllm.config import Layer, ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.hf.families.relative import attention_scale
from jaxllm.hf.family import Blocks, Family, Key, linear, norm
from jaxllm.hf.settings import COUNT, DEPTH, IGNORED, NUMBER, POSITIVE, Kind, Settings
from jaxllm.norm import LayerNorm
from jaxllm.position import Alibi

CLIP = Kind("a finite number of at least 0, 0 for none", lambda x: NUMBER.fits(x) and x >= 0)
FEED_FORWARD = Kind(
  "the plain feed-forward layer, {} or {'ffn_type': 'mptmlp'}",
  lambda x: (
    isinstance(x, Mapping) and x.keys() <= {"ffn_type", "fc_type"} and x.get("ffn_type", "mptmlp") == "mptmlp"
  ),
)
NO_MODEL = ("learned_pos_emb", "init_device", "init_config", "verbose", "fc_type", "attn_impl", "attn_pdrop")
"""learned_pos_emb has no effect beside ALiBi; the others say how the authors' code makes or computes a model."""
OF_ANY_CONFIG = (
  "architectures",
  "dtype",
  "torch_dtype",
  "is_encoder_decoder",
  "add_cross_attention",
  "pruned_heads",
)
OF_ANY_CONFIG += ("tie_word_embeddings",)
"""transformers writes attn_config as a config of its own, with what all of them have."""
QKV = Blocks(lambda cfg: [cfg.embed_dim] * 3)


def read(s: Settings) -> ModelConfig:
  """transformers reads some only of the settings that the authors' code has; the others have to be as it takes them to be."""
  D, N = (
    s.take("d_model", COUNT, also=("hidden_size",)),
    s.take("n_heads", COUNT, also=("num_attention_heads",)),
  )
  if D % N:
    raise s.error("n_heads", f"a divisor of d_model = {D}")
  for name, value in (("expansion_ratio", 4), ("no_bias", True), ("embedding_fraction", 1.0)):
    s.settle(name, value, int(value), why="transformers' MPT has no other")
  s.settle("logit_scale", why="transformers' MPT does not apply it")
  s.settle("norm_type", "low_precision_layernorm", "layernorm", why="transformers' MPT has no other")
  s.take("ffn_config", FEED_FORWARD, {})
  attention = s.group("attn_config")
  only = {
    "alibi": True,
    "alibi_bias_max": 8,
    "prefix_lm": False,
    "qk_ln": False,
    "attn_type": "multihead_attention",
    "attn_uses_sequence_id": False,
  }
  for name, value in only.items():
    attention.settle(name, value, why="transformers' MPT has no other")
  scale, clip = attention.take("softmax_scale", POSITIVE, None), attention.take("clip_qkv", CLIP, None)
  attention.finish(IGNORED | {*NO_MODEL, *OF_ANY_CONFIG})
  cfg = ModelConfig(
    vocab_size=s.take("vocab_size", COUNT),
    embed_dim=D,
    num_layers=s.take("n_layers", DEPTH, also=("num_hidden_layers",)),
    num_heads=N,
    num_kv_heads=N,
    head_dim=D // N,
    mlp_dim=4 * D,
    layers=(Layer(Alibi()),),
    norm=LayerNorm(float(s.take("layer_norm_epsilon", POSITIVE, 1e-5)), bias=False),
    mlp=Mlp("gelu"),
    clip_qkv=float(clip) if clip else None,
    context_length=s.take("max_seq_len", COUNT, 2048),
  )
  return (
    cfg if scale is None else dataclasses.replace(cfg, attention_scale=attention_scale(scale, cfg.head_dim))
  )


def write(cfg: ModelConfig) -> dict:
  """The inverse of `read`."""
  if not isinstance(alibi := cfg.layers[0].position, Alibi):
    raise ConfigError(f"layers: found {type(alibi).__name__}, expected Alibi, which this family has")
  return {
    "vocab_size": cfg.vocab_size,
    "d_model": cfg.embed_dim,
    "n_layers": cfg.num_layers,
    "n_heads": cfg.num_heads,
    "max_seq_len": cfg.context_length or 2048,
    "layer_norm_epsilon": cfg.norm.eps,
    "attn_config": {
      "alibi": True,
      "alibi_bias_max": int(alibi.bias_max),
      "clip_qkv": cfg.clip_qkv,
      "softmax_scale": cfg.attention_scale,
    },
  }


def keys(cfg: ModelConfig) -> list[Key]:
  """Queries, keys and values one after the other."""
  at, ours = "transformer.blocks.{i}.", "layers/{i}/"
  return [
    Key("transformer.wte.weight", ("embed",)),
    *norm(cfg.norm, f"{at}norm_1", f"{ours}attn_norm"),
    *linear(cfg, f"{at}attn.Wqkv", *(f"{ours}attn/{name}" for name in "qkv"), layout=QKV),
    *linear(cfg, f"{at}attn.out_proj", f"{ours}attn/o"),
    *norm(cfg.norm, f"{at}norm_2", f"{ours}mlp_norm"),
    *linear(cfg, f"{at}ffn.up_proj", f"{ours}mlp/up"),
    *linear(cfg, f"{at}ffn.down_proj", f"{ours}mlp/down"),
    *norm(cfg.norm, "transformer.norm_f", "final_norm"),
    *([] if cfg.tie_embeddings else [Key("lm_head.weight", ("head",), "oi")]),
  ]


MPT = Family("mpt", "MptForCausalLM", read, write, keys, tied=True, prefix="transformer.", ignored=NO_MODEL)
