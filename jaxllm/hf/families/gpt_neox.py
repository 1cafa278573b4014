"""GPT-NeoX and Pythia: attention and feed-forward side by side, a quarter of a head turned, fused projections a head."""

from __future__ import annotations

from jaxllm.activation import Mlp
from jaxllm.config import Layer, ModelConfig
from jaxllm.hf import rope
from jaxllm.hf.families.relative import ACTIVATION, ACTIVATIONS, activation_name, rope_of
from jaxllm.hf.family import Family, Grouped, Key, linear, norm
from jaxllm.hf.settings import COUNT, DEPTH, FLAG, POSITIVE, Settings
from jaxllm.norm import LayerNorm
from jaxllm.wiring import ParallelTwoNorms, Pre

HEAD = dict(
  partial=0.25,
  bases=("rotary_emb_base", "rope_theta"),
  partials=("rotary_pct", "partial_rotary_factor"),
)


def read(s: Settings) -> ModelConfig:
  """use_parallel_residual: y = x + A(N1 x) + F(N2 x), else one after the other; attention_bias is true where it is missing."""
  D, N = s.take("hidden_size", COUNT), s.take("num_attention_heads", COUNT)
  if D % N:
    raise s.error("num_attention_heads", f"a divisor of hidden_size = {D}")
  s.settle("head_dim", D // N, why="transformers takes hidden_size / num_attention_heads in this family")
  context = s.take("max_position_embeddings", COUNT, 2048)
  act = ACTIVATIONS[s.take("hidden_act", ACTIVATION, "gelu")]
  attention_bias = s.take("attention_bias", FLAG, True)
  return ModelConfig(
    vocab_size=s.take("vocab_size", COUNT),
    embed_dim=D,
    num_layers=s.take("num_hidden_layers", DEPTH),
    num_heads=N,
    num_kv_heads=N,
    head_dim=D // N,
    mlp_dim=s.take("intermediate_size", COUNT),
    layers=(Layer(rope.read(s, rope.Head(D // N, context, **HEAD))),),
    norm=LayerNorm(float(s.take("layer_norm_eps", POSITIVE, 1e-5))),
    mlp=Mlp(act),
    wiring=ParallelTwoNorms() if s.take("use_parallel_residual", FLAG, True) else Pre(),
    biases=(*("qkvo" if attention_bias else ()), "up", "down"),
    context_length=context,
  )


def write(cfg: ModelConfig) -> dict:
  """The inverse of `read`."""
  context = rope.context_of(cfg.ropes, cfg.context_length)
  return {
    "vocab_size": cfg.vocab_size,
    "hidden_size": cfg.embed_dim,
    "intermediate_size": cfg.mlp_dim,
    "num_hidden_layers": cfg.num_layers,
    "num_attention_heads": cfg.num_heads,
    "hidden_act": activation_name(cfg.mlp),
    "max_position_embeddings": context,
    "layer_norm_eps": cfg.norm.eps,
    "attention_bias": "q" in cfg.biases,
    "use_parallel_residual": isinstance(cfg.wiring, ParallelTwoNorms),
    **rope.write(rope_of(cfg), rope.Head(cfg.head_dim, context, **HEAD)),
  }


def keys(cfg: ModelConfig) -> list[Key]:
  """The head's name is that of the files: transformers calls it lm_head in memory."""
  at, ours = "gpt_neox.layers.{i}.", "layers/{i}/"
  return [
    Key("gpt_neox.embed_in.weight", ("embed",)),
    *norm(cfg.norm, f"{at}input_layernorm", f"{ours}attn_norm"),
    *linear(
      cfg, f"{at}attention.query_key_value", *(f"{ours}attn/{name}" for name in "qkv"), layout=Grouped()
    ),
    *linear(cfg, f"{at}attention.dense", f"{ours}attn/o"),
    *norm(cfg.norm, f"{at}post_attention_layernorm", f"{ours}mlp_norm"),
    *linear(cfg, f"{at}mlp.dense_h_to_4h", f"{ours}mlp/up"),
    *linear(cfg, f"{at}mlp.dense_4h_to_h", f"{ours}mlp/down"),
    *norm(cfg.norm, "gpt_neox.final_layer_norm", "final_norm"),
    *([] if cfg.tie_embeddings else [Key("embed_out.weight", ("head",), "oi")]),
  ]


UNUSED = (r"(gpt_neox\.)?layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",)
GPT_NEOX = Family(
  "gpt_neox", "GPTNeoXForCausalLM", read, write, keys, eos=2, prefix="gpt_neox.", unused=UNUSED
)
