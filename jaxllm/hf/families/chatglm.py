"""ChatGLM2, ChatGLM3 and GLM-4-9B with the authors' code: fused projections, half of each head turned in neighbouring pairs.

transformers has no such family (its `glm` is the last one with other files).  From the authors' published code, as remembered,
and from vLLM's reading of it in the table of families that this project keeps:
- RoPE turns the first kv_channels / 2 coordinates, its base is 10,000 rope_ratio, and its pairs are neighbours; with
  original_rope false they are those of two halves.  ChatGLM2-6B-32k divides positions by rope_ratio instead, and its settings
  differ from those of ChatGLM3 in `_name_or_path` alone.
- query_key_value is [q; k; v] with multi_query_group_num key heads, and without multi_query_attention [N, 3, H].
- dense_h_to_4h is [gate; up].  add_qkv_bias has biases on queries, keys and values, add_bias_linear on all but the head.
- apply_residual_connection_post_layernorm: the residual is what comes out of the norm, GLM-130B's block with alpha 1.
- apply_query_key_layer_scaling, the precisions of softmax and residual, and fused dropout change rounding and nothing else.
"""

from __future__ import annotations

import math

from jaxllm.activation import Glu
from jaxllm.config import Layer, ModelConfig
from jaxllm.hf.families.relative import GATE_UP, QKV
from jaxllm.hf.family import Family, Grouped, Key, Whole, linear, norm
from jaxllm.hf.settings import COUNT, DEPTH, FLAG, POSITIVE, Settings
from jaxllm.norm import LayerNorm, RMSNorm
from jaxllm.position import PiRope, Rope
from jaxllm.wiring import GlmDeepNorm, Pre

BASE, DIVIDES, STRETCHES = 10000.0, "chatglm2", "chatglm3"
SHARED_VOCABULARY = 65024
"""ChatGLM2's and ChatGLM3's."""
IGNORED = (
  *("apply_query_key_layer_scaling", "attention_softmax_in_fp32", "fp32_residual_connection"),
  *("bias_dropout_fusion", "prefix_projection", "multi_query_group_num"),
)
"""How the authors' code computes the same; groups, where there is no multi_query_attention."""
LINEAR, ATTENTION = ("q", "k", "v", "o", "gate", "up", "down"), ("q", "k", "v")


def read(s: Settings) -> ModelConfig:
  """Layer norms or RMS norms, key heads in groups or none, biases on three or on all matrices."""
  D, N = s.take("hidden_size", COUNT), s.take("num_attention_heads", COUNT)
  s.settle("post_layer_norm", True, why="a model without a norm after its last layer is not supported")
  s.settle("tie_word_embeddings", False, why="the authors' code has a head of its own")
  refuse_quantized(s)
  V = s.take("padded_vocab_size", COUNT, also=("vocab_size",))
  grouped = s.take("multi_query_attention", FLAG, False)
  K = s.take("multi_query_group_num", COUNT, 1) if grouped else N
  if N % K or (grouped and K == N > 1):  # whose matrix would be that of no groups, in another order
    raise s.error("multi_query_group_num", f"a divisor of num_attention_heads = {N}, and less")
  every, some = s.take("add_bias_linear", FLAG, False), s.take("add_qkv_bias", FLAG, False)
  after = s.take("apply_residual_connection_post_layernorm", FLAG, False)
  kind = RMSNorm if s.take("rmsnorm", FLAG, True) else LayerNorm
  H, length = s.take("kv_channels", COUNT, 128), s.take("seq_length", COUNT, 2048)
  if H % 4:
    raise s.error("kv_channels", "a multiple of 4, as half of a head turns in pairs")
  return ModelConfig(
    vocab_size=V,
    embed_dim=D,
    num_layers=s.take("num_layers", DEPTH),
    num_heads=N,
    num_kv_heads=K,
    head_dim=H,
    mlp_dim=s.take("ffn_hidden_size", COUNT),
    layers=(Layer(_rope(s, V, H // 2, length)),),
    norm=kind(float(s.take("layernorm_epsilon", POSITIVE, 1e-5))),
    mlp=Glu("silu"),
    wiring=GlmDeepNorm() if after else Pre(),
    biases=LINEAR if every else ATTENTION if some else (),
    context_length=length,
  )


def refuse_quantized(s: Settings) -> None:
  """The settings of what is not read: files of integers, and prefixes of keys and values that a tuning learned."""
  s.settle("quantization_bit", 0, why="quantized checkpoints are not read")
  s.settle("pre_seq_len", why="prefixes of keys and values are not supported")


def _rope(s: Settings, vocab_size: int, rotary_dim: int, length: int) -> Rope:
  """rope_ratio multiplies the base, and in ChatGLM2, which is known by its name only, divides positions."""
  ratio = float(s.take("rope_ratio", POSITIVE, 1.0))
  layout = "interleaved" if s.take("original_rope", FLAG, True) else "half"
  fields = dict(rotary_dim=rotary_dim, layout=layout, original_length=length)
  name = (
    str(s.plain.get("_name_or_path")).lower().rstrip("/").rpartition("/")[2]
  )  # not of a folder that it is in
  divides, stretches = DIVIDES in name, STRETCHES in name
  if ratio != 1 and divides and not stretches:
    return PiRope(BASE, factor=ratio, **fields)
  if ratio != 1 and divides == stretches and (divides or vocab_size == SHARED_VOCABULARY):
    which = f"one with {DIVIDES}, which divides positions by rope_ratio, or {STRETCHES}, where it multiplies the base"
    raise s.error("_name_or_path", f"{which}: rope_ratio is {ratio:g}")
  if BASE * ratio <= 1:
    raise s.error("rope_ratio", f"a number above {1 / BASE}, as the base is {BASE:g} times it")
  return Rope(BASE * ratio, **fields)


def write(cfg: ModelConfig) -> dict:
  """The inverse of `read`."""
  rope, biases = cfg.layers[0].position, set(cfg.biases)
  return {
    "padded_vocab_size": cfg.vocab_size,
    "hidden_size": cfg.embed_dim,
    "num_layers": cfg.num_layers,
    "num_attention_heads": cfg.num_heads,
    "kv_channels": cfg.head_dim,
    "ffn_hidden_size": cfg.mlp_dim,
    "seq_length": cfg.context_length or 2048,
    "layernorm_epsilon": cfg.norm.eps,
    "rmsnorm": isinstance(cfg.norm, RMSNorm),
    "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": isinstance(cfg.wiring, GlmDeepNorm),
    "add_bias_linear": "o" in biases,
    "add_qkv_bias": "q" in biases,
    "multi_query_attention": cfg.num_kv_heads != cfg.num_heads,
    "multi_query_group_num": cfg.num_kv_heads if cfg.num_kv_heads != cfg.num_heads else 1,
    "original_rope": getattr(rope, "layout", "") == "interleaved",
    **_stretch(rope, cfg.vocab_size),
  }


def _stretch(rope: Rope, vocab_size: int) -> dict:
  if type(rope) is PiRope:
    return {"_name_or_path": DIVIDES, "rope_ratio": rope.factor}
  base = getattr(rope, "base", BASE)
  ratio = base / BASE
  nearby = (
    ratio,
    math.nextafter(ratio, 0),
    math.nextafter(ratio, math.inf),
  )  # whose product is the base, to the bit
  named = {"_name_or_path": STRETCHES} if vocab_size == SHARED_VOCABULARY else {}
  return named | {"rope_ratio": next((x for x in nearby if BASE * x == base), ratio)}


def keys(cfg: ModelConfig) -> list[Key]:
  """Two fused matrices a layer."""
  at, ours = "transformer.encoder.layers.{i}.", "layers/{i}/"
  fused: Whole = QKV if cfg.num_kv_heads != cfg.num_heads else Grouped()
  return [
    Key("transformer.embedding.word_embeddings.weight", ("embed",)),
    *norm(cfg.norm, f"{at}input_layernorm", f"{ours}attn_norm"),
    *linear(
      cfg, f"{at}self_attention.query_key_value", *(f"{ours}attn/{name}" for name in "qkv"), layout=fused
    ),
    *linear(cfg, f"{at}self_attention.dense", f"{ours}attn/o"),
    *norm(cfg.norm, f"{at}post_attention_layernorm", f"{ours}mlp_norm"),
    *linear(cfg, f"{at}mlp.dense_h_to_4h", f"{ours}mlp/gate", f"{ours}mlp/up", layout=GATE_UP),
    *linear(cfg, f"{at}mlp.dense_4h_to_h", f"{ours}mlp/down"),
    *norm(cfg.norm, "transformer.encoder.final_layernorm", "final_norm"),
    Key("transformer.output_layer.weight", ("head",), "oi"),
  ]


CHATGLM = Family(
  "chatglm",
  "ChatGLMModel",
  read,
  write,
  keys,
  eos=2,
  prefix="transformer.",
  ignored=IGNORED,
  unused=(r"(transformer\.)?rotary_pos_emb\.inv_freq",),
  remote=True,
  also=("ChatGLMForConditionalGeneration",),
)
