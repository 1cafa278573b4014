"""The models that every property is held against: each entry of POSITIONS, and one unlike them in all else.

Three layers, so that what is wrong in one shows in the next, the middle one with a window; four query heads on two
key heads, head_dim not D / N, trained length 8 and 24 tokens, so that each length rule is crossed; base 100, so
that each frequency turns visibly within them; weights so large that attention is sharp.  Methods that differ in
frequencies, scale or log-n only share a compiled program.
"""

import dataclasses
import functools
import zlib

import jax
import numpy as np
import pytest

from jaxllm.activation import Glu, Mlp
from jaxllm.config import Layer, ModelConfig
from jaxllm.experts import Moe, SoftmaxRouter
from jaxllm.nn import Transformer
from jaxllm.norm import LayerNorm, QkNorm, RMSNorm
from jaxllm.ops.attention import Plain
from jaxllm.position import POSITIONS, Llama4Scale, LogN, ReRope, Rope
from jaxllm.position.query_scale import query_scale_table
from jaxllm.position.rope import DynamicNtkRope
from jaxllm.position.tables import PositionTables, make_table
from jaxllm.tree import flatten, unflatten
from jaxllm.wiring import DeepNorm, GlmDeepNorm, Parallel, ParallelTwoNorms, Post, PostOnly, Pre, Sandwich

B, T, TRAINED = 3, 24, 8
SHAPE = dict(vocab_size=29, embed_dim=24, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=40)
WINDOW = 7
FIELDS = dict(base=100.0, factor=4.0, original_length=TRAINED, beta_slow=0.2, sinks=2, scale_base=16.0)
FIELDS |= dict(
  short_factor=(1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7), long_factor=(1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5)
)
FIELDS |= dict(
  beta_turns=(0.1, 0.3), gamma_turns=(0.5, 1.0), low_freq_factor=0.2, high_freq_factor=1.5, proportion=0.6
)

FIELDS |= dict(max_length=T + 8, num_buckets=10, max_distance=18)  # all buckets within the sequence


def position(name, **kwargs):
  """The method `name` with those of FIELDS and kwargs that it has, kwargs first."""
  known = {field.name for field in dataclasses.fields(POSITIONS[name])}
  return POSITIONS[name](**{key: value for key, value in (FIELDS | kwargs).items() if key in known})


def model(name, fields=None, **kwargs):
  """A config with method `name` on all layers, the middle one with a window."""
  method = position(name, **(fields or {}))
  return ModelConfig(**SHAPE | dict(layers=(Layer(method), Layer(method, WINDOW), Layer(method))) | kwargs)


OTHER = dict(norm=LayerNorm(), mlp=Mlp(), embed_scale=1.5, num_kv_heads=1, query_scale=LogN(2 * TRAINED, 0.0))
MODELS = {name: model(name) for name in POSITIONS} | {
  "yarn, and the rest otherwise": model("yarn", dict(layout="interleaved", rotary_dim=12), **OTHER),
  "ntk_mixed, log-n": model("ntk_mixed", query_scale=LogN(2 * TRAINED, 0.0)),
  "rerope, log-n at test time": model("rerope", query_scale=LogN(2 * TRAINED, 1.0)),
  "dynamic_ntk, log-n at test time": model("dynamic_ntk", query_scale=LogN(2 * TRAINED, 1.0)),
  "alibi, log-n": model("alibi", query_scale=LogN(2 * TRAINED, 0.0)),
  "yarn, llama4": model("yarn", query_scale=Llama4Scale(5, 0.25)),
  "rope, hf": model("rope", rope_precision="hf"),
  "learned, after two rows": model("learned", dict(offset=2)),
  "alibi of Falcon": model("alibi", dict(bias_max=6.0, slope_dtype="bfloat16", placement="before")),
}
# A wiring or a feature of blocks and attention a row, on a method that needs no cached keys unrotated, with a rule of lengths.
BLOCKS = {
  "post": dict(wiring=Post()),
  "post_only": dict(wiring=PostOnly(), norm=LayerNorm()),
  "sandwich": dict(wiring=Sandwich(), norm=RMSNorm(scale="1+w")),
  "parallel": dict(wiring=Parallel(), mlp=Mlp("gelu_tanh")),
  "parallel_two_norms": dict(wiring=ParallelTwoNorms(), biases=("q", "k", "v")),
  "deepnorm": dict(wiring=DeepNorm(1.6, 0.5), norm=LayerNorm(), biases=("o", "down", "head"), norm_head=True),
  "deepnorm_glm": dict(
    wiring=GlmDeepNorm(1.6, 0.5), norm=LayerNorm(), layer_scaling=True, biases=("gate", "up")
  ),
  "qk_norm": dict(qk_norm=QkNorm()),
  "qk_norm over all": dict(qk_norm=QkNorm(RMSNorm(), "all")),
  "qk_norm of each": dict(qk_norm=QkNorm(LayerNorm(), "each")),
  "qk_norm after": dict(qk_norm=QkNorm(RMSNorm(), "head", "after")),
  "embedding of another width": dict(embed_width=10, biases=("head",)),
  "soft caps": dict(attention_softcap=2.0, logit_softcap=4.0),
  "sinks": dict(attention_sinks=True, clip_qkv=1.5),
  "experts": dict(
    mlp=Moe(Glu(), 5, 2, SoftmaxRouter(False), mlp_dim=20),
    layers=(Layer(position("yarn")), Layer(position("yarn"), WINDOW, Glu()), Layer(position("yarn"))),
    biases=("router", "up", "down"),
  ),
  "multipliers": dict(
    attention_scale=0.4, logit_scale=0.3, wiring=Pre(0.6), embed_scale=2.0, logit_softcap=4.0, embed_norm=True
  ),
}
MODELS["streaming, soft cap"] = model("streaming", attention_softcap=2.0)
MODELS |= {name: model("yarn", **fields) for name, fields in BLOCKS.items()}
STRUCTURES = [
  "nope",
  "learned",
  "t5",
  "alibi",
  "rope",
  "dynamic_ntk",
  "rerope",
  "yarn, and the rest otherwise",
]
CORE = "yarn"


def table_of_models(names, core=CORE, slow=()):
  """A parametrize mark over models by name; `core` goes to the other lanes as well, and `slow` waits for the full counts."""
  marks = lambda name: [pytest.mark.core] * (name == core) + [pytest.mark.slow] * (name in slow)
  return pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in names])


each_model = table_of_models(MODELS)
# A cache holds keys and values, whatever blocks do before and after: three of BLOCKS change what it holds, or how it is read.
# What is capped, rounded or read of a table of three rows is so in other rows too.
SLOW = BLOCKS.keys() - {"qk_norm after", "sinks", "deepnorm_glm"}
SLOW |= {"learned, after two rows", "rope, hf", "streaming, soft cap", "alibi of Falcon", "inv_leaky_rerope"}
each_cached = table_of_models(MODELS, slow=SLOW)
each_structure = table_of_models(STRUCTURES, core="rope")


def is_relative(cfg):
  """Whether nothing but differences of positions matters."""
  absolute = ("DynamicNtkRope", "LongRope", "SelfExtendRope", "StreamingRope")  # lengths, groups, and sinks
  absolute += ("Sinusoidal", "Learned")
  if cfg.qk_norm is not None and cfg.qk_norm.place == "after":  # its weights are of turned coordinates
    return False
  if any(getattr(p, "slope_dtype", None) for p in cfg.positions):  # whose products are rounded
    return False
  if cfg.rope_precision == "hf" or cfg.query_scale is not None:
    return False
  return not any(type(p).__name__ in absolute for p in cfg.positions)


def structure(cfg):
  """The config whose compiled program serves cfg, given rope=: frequencies and query scale are data."""

  def plain(layer):
    method = layer.position
    if isinstance(method, ReRope):
      return dataclasses.replace(
        layer, position=ReRope(100.0, method.rotary_dim, method.layout, window=method.clip)
      )
    if isinstance(method, DynamicNtkRope):
      method = dataclasses.replace(method, base=100.0, factor=1.0, original_length=1)
    elif isinstance(method, Rope) and method.program is None and not method.needs_raw_keys:
      method = Rope(100.0, method.rotary_dim, method.layout)
    return dataclasses.replace(layer, position=method)

  return dataclasses.replace(cfg, layers=tuple(map(plain, cfg.layers)), query_scale=None)


def tables(cfg, offset=0):
  """cfg.rope_tables of T tokens from position `offset` on; where rows depend on the length, T rows."""
  if offset < TRAINED or not any(rope.needs_original_length and rope.needs_raw_keys for rope in cfg.ropes):
    return cfg.rope_tables(max_len=TRAINED + T - 1)
  rows = lambda rope: [rope.frequencies(cfg.rotary_dim(rope), offset + 1 + j) for j in range(T)]
  return PositionTables(
    tuple(make_table(rows(rope), offset + 1) for rope in cfg.ropes), query_scale_table(cfg.query_scale)
  )


def params(cfg):
  """Random weights, the same in all models that have one of that path and shape; no norm weight is 1."""
  layers = tuple(Layer(position("nope"), mlp=layer.mlp) for layer in cfg.layers)
  plain = dict(layers=layers, query_scale=None, embed_scale=1.0, attention=Plain(), dtype="float32")
  learned = {str(i): _table(i, method, cfg) for i, method in enumerate(cfg.learned_positions)}
  shared = _params(dataclasses.replace(cfg, **plain))
  return shared | {"positions": learned} if learned else shared


def _table(seed, method, cfg):
  """Parameters of a position method, so large that they matter."""
  rng = np.random.default_rng([seed, 7])
  draw = lambda shape: rng.standard_normal(shape).astype(np.float32)
  return {name: draw(shape) for name, (shape, _) in method.params(cfg).items()}


@functools.cache
def _params(cfg):
  init = lambda key: Transformer(cfg).init(key, np.zeros((1, 1), np.int32))["params"]
  shapes = flatten(jax.eval_shape(init, jax.random.key(0)))

  def draw(path, shape):
    x = np.random.default_rng(zlib.crc32(path.encode())).standard_normal(shape)
    if path.endswith("norm/scale"):
      return (getattr(cfg.norm, "scale", "w") != "1+w") + 0.3 * x
    if path.endswith("bias"):
      return 0.3 * x
    if path.endswith("sinks"):
      return 1.5 + x
    if path == "embed":
      return x
    return x * (1.0 if "/attn/" in path else 1.5) * shape[-2 if len(shape) > 1 else 0] ** -0.5

  return unflatten({path: draw(path, leaf.shape).astype(np.float32) for path, leaf in sorted(shapes.items())})


def tokens(seed=0, shape=(B, T)):
  """Random token ids."""
  return np.random.default_rng(seed).integers(0, SHAPE["vocab_size"], shape, np.int32)
