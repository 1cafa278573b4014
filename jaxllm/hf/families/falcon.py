"""Falcon: 7B (one key head), 40B and 11B (a key head a group) side by side, and RW (ALiBi, one after the other)."""

from __future__ import annotations

from typing import Any

from jaxllm.activation import Mlp
from jaxllm.config import Layer, ModelConfig
from jaxllm.hf import rope
from jaxllm.hf.families.relative import ACTIVATION, ACTIVATIONS, activation_name, rope_of
from jaxllm.hf.family import Family, Grouped, Key, linear, linears, lm_head, norm
from jaxllm.hf.settings import COUNT, DEPTH, FLAG, POSITIVE, Settings, one_of
from jaxllm.norm import LayerNorm
from jaxllm.position import Alibi, Position
from jaxllm.wiring import Parallel, ParallelTwoNorms, Pre, Wiring

ALIBI = Alibi(slope_dtype="bfloat16", placement="before")
"""transformers computes it in bfloat16.  (Its eager attention, of version 5.24, adds it twice; its others, once.)"""
BIASES = ("q", "k", "v", "o", "up", "down")
NORMS = {
  ParallelTwoNorms: {"attn_norm": "ln_attn", "mlp_norm": "ln_mlp"},
  Parallel: {"attn_norm": "input_layernorm"},
  Pre: {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
}
NAMES = {"attn/o": "self_attention.dense", "mlp/up": "mlp.dense_h_to_4h", "mlp/down": "mlp.dense_4h_to_h"}


def read(s: Settings) -> ModelConfig:
  """new_decoder_architecture: 40B's and 11B's."""
  D, N = s.take("hidden_size", COUNT, also=("n_embed",)), s.take("num_attention_heads", COUNT)
  if D % N:
    raise s.error("num_attention_heads", f"a divisor of hidden_size = {D}")
  s.settle(
    "apply_residual_connection_post_layernorm", False, why="transformers does not read it in this family"
  )
  new = s.take("new_decoder_architecture", FLAG, False)
  context = s.take("max_position_embeddings", COUNT, 2048)
  return ModelConfig(
    vocab_size=s.take("vocab_size", COUNT),
    embed_dim=D,
    num_layers=s.take("num_hidden_layers", DEPTH),
    num_heads=N,
    num_kv_heads=_kv_heads(s, N, new),
    head_dim=D // N,
    mlp_dim=s.take("ffn_hidden_size", COUNT, 4 * D),
    layers=(Layer(_position(s, rope.Head(D // N, context))),),
    norm=LayerNorm(float(s.take("layer_norm_epsilon", POSITIVE, 1e-5))),
    mlp=Mlp(ACTIVATIONS[s.take("activation", ACTIVATION, "gelu")]),
    wiring=_wiring(s, new),
    biases=BIASES if s.take("bias", FLAG, False) else (),
    context_length=context,
  )


def _kv_heads(s: Settings, heads: int, new: bool) -> int:
  """multi_query counts where the architecture is not the new one, and num_kv_heads where there is none."""
  several, given = s.take("multi_query", FLAG, True), s.take("num_kv_heads", COUNT, heads)
  if new and heads % given:
    raise s.error("num_kv_heads", f"a divisor of num_attention_heads = {heads}")
  if not new and not several and given != heads:
    raise s.error("num_kv_heads", f"num_attention_heads = {heads}, as multi_query is false")
  return 1 if several and not new else given


def _wiring(s: Settings, new: bool) -> Wiring:
  count = "num_ln_in_parallel_attn"
  if new:
    s.settle("parallel_attn", True, why="transformers' new_decoder_architecture has no other")
    return ParallelTwoNorms() if s.take(count, one_of((1, 2)), 2) == 2 else Parallel()
  if s.take("parallel_attn", FLAG, True):
    s.settle(count, 1, why="transformers has two with new_decoder_architecture only")
    return Parallel()
  s.ignore(count)  # of blocks whose parts are side by side
  return Pre()


def _position(s: Settings, head: rope.Head) -> Position:
  if not s.take("alibi", FLAG, False):
    return rope.read(s, head)
  s.ignore("rope_theta", "rope_scaling", "rope_parameters", rope.PART)  # of what is not there
  return ALIBI


def write(cfg: ModelConfig) -> dict:
  """The inverse of `read`; of two forms of one model, the older one."""
  new = type(cfg.wiring) is ParallelTwoNorms or cfg.num_kv_heads not in (1, cfg.num_heads)
  plain: dict[str, Any] = {
    "vocab_size": cfg.vocab_size,
    "hidden_size": cfg.embed_dim,
    "ffn_hidden_size": cfg.mlp_dim,
    "num_hidden_layers": cfg.num_layers,
    "num_attention_heads": cfg.num_heads,
    "num_kv_heads": cfg.num_kv_heads if new else cfg.num_heads,
    "multi_query": cfg.num_kv_heads == 1,
    "new_decoder_architecture": new,
    "parallel_attn": type(cfg.wiring) is not Pre,
    "num_ln_in_parallel_attn": 2 if type(cfg.wiring) is ParallelTwoNorms else 1,
    "activation": activation_name(cfg.mlp),
    "layer_norm_epsilon": cfg.norm.eps,
    "bias": "q" in cfg.biases,
    "alibi": isinstance(cfg.layers[0].position, Alibi),
    "max_position_embeddings": rope.context_of(cfg.ropes, cfg.context_length),
  }
  if plain["alibi"]:
    return plain
  return plain | rope.write(rope_of(cfg), rope.Head(cfg.head_dim, plain["max_position_embeddings"]))


def keys(cfg: ModelConfig) -> list[Key]:
  """The norms' names tell the forms apart."""
  at, ours = "transformer.h.{i}.", "layers/{i}/"
  qkv = (f"{ours}attn/{name}" for name in "qkv")
  return [
    Key("transformer.word_embeddings.weight", ("embed",)),
    *linear(cfg, f"{at}self_attention.query_key_value", *qkv, layout=Grouped()),
    *linears(cfg, at, NAMES),
    *(
      key
      for mine, theirs in NORMS.get(type(cfg.wiring), {}).items()
      for key in norm(cfg.norm, at + theirs, ours + mine)
    ),
    *norm(cfg.norm, "transformer.ln_f", "final_norm"),
    *lm_head(cfg),
  ]


FALCON = Family("falcon", "FalconForCausalLM", read, write, keys, tied=True, eos=11, prefix="transformer.")
