"""BLOOM: ALiBi, a norm over the embeddings, biases everywhere."""

from __future__ import annotations

from jaxllm.activation import Mlp
from jaxllm.config import Layer, ModelConfig
from jaxllm.hf.family import Family, Grouped, Key, linear, norm
from jaxllm.hf.settings import COUNT, DEPTH, FLAG, POSITIVE, Settings
from jaxllm.norm import LayerNorm
from jaxllm.position import Alibi
from jaxllm.wiring import GlmDeepNorm, Pre

IGNORED = (
  *(
    "slow_but_exact",
    "attention_softmax_in_fp32",
    "bias_dropout_fusion",
    "masked_softmax_fusion",
    "offset_alibi",
  ),
  *("skip_bias_add", "skip_bias_add_qkv", "unk_token_id"),
)
"""How the authors' code computes the same."""


def read(s: Settings) -> ModelConfig:
  """apply_residual_connection_post_layernorm: the residual is what comes out of the norm, GLM-130B's block with alpha = 1."""
  D, N = (
    s.take("hidden_size", COUNT, also=("n_embed",)),
    s.take("n_head", COUNT, also=("num_attention_heads",)),
  )
  if D % N:
    raise s.error("n_head", f"a divisor of hidden_size = {D}")
  s.settle("n_inner", 4 * D, why="transformers' BLOOM has no other width")
  after = s.take("apply_residual_connection_post_layernorm", FLAG, False)
  return ModelConfig(
    vocab_size=s.take("vocab_size", COUNT),
    embed_dim=D,
    num_layers=s.take("n_layer", DEPTH, also=("num_hidden_layers",)),
    num_heads=N,
    num_kv_heads=N,
    head_dim=D // N,
    mlp_dim=4 * D,
    layers=(Layer(Alibi()),),
    norm=LayerNorm(float(s.take("layer_norm_epsilon", POSITIVE, 1e-5))),
    mlp=Mlp("gelu_tanh"),
    wiring=GlmDeepNorm() if after else Pre(),
    biases=("q", "k", "v", "o", "up", "down"),
    embed_norm=True,
    context_length=s.take("seq_length", COUNT, None),
  )


def write(cfg: ModelConfig) -> dict:
  """The inverse of `read`."""
  return {
    "vocab_size": cfg.vocab_size,
    "hidden_size": cfg.embed_dim,
    "n_layer": cfg.num_layers,
    "n_head": cfg.num_heads,
    "layer_norm_epsilon": cfg.norm.eps,
    "apply_residual_connection_post_layernorm": isinstance(cfg.wiring, GlmDeepNorm),
  } | ({} if cfg.context_length is None else {"seq_length": cfg.context_length})


def keys(cfg: ModelConfig) -> list[Key]:
  """Queries, keys and values a head."""
  at, ours = "transformer.h.{i}.", "layers/{i}/"
  return [
    Key("transformer.word_embeddings.weight", ("embed",)),
    *norm(cfg.norm, "transformer.word_embeddings_layernorm", "embed_norm"),
    *norm(cfg.norm, f"{at}input_layernorm", f"{ours}attn_norm"),
    *linear(
      cfg, f"{at}self_attention.query_key_value", *(f"{ours}attn/{name}" for name in "qkv"), layout=Grouped()
    ),
    *linear(cfg, f"{at}self_attention.dense", f"{ours}attn/o"),
    *norm(cfg.norm, f"{at}post_attention_layernorm", f"{ours}mlp_norm"),
    *linear(cfg, f"{at}mlp.dense_h_to_4h", f"{ours}mlp/up"),
    *linear(cfg, f"{at}mlp.dense_4h_to_h", f"{ours}mlp/down"),
    *norm(cfg.norm, "transformer.ln_f", "final_norm"),
    *([] if cfg.tie_embeddings else [Key("lm_head.weight", ("head",), "oi")]),
  ]


BLOOM = Family(
  "bloom", "BloomForCausalLM", read, write, keys, tied=True, eos=2, prefix="transformer.", ignored=IGNORED
)
