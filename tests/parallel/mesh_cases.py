"""What is held on meshes: models that cover what the families of checkpoints have.

Two layers, and widths and heads that the meshes divide: small, as every program is compiled for each mesh.  Windows, caps and
clips are active within twelve tokens, and head_dim is not embed_dim / num_heads.
"""

import dataclasses
import functools
import zlib

import jax
import numpy as np

from jaxllm.activation import ClampedGlu, Glu, Mlp, Xielu
from jaxllm.config import Layer, ModelConfig
from jaxllm.experts import Moe, SoftmaxRouter
from jaxllm.leaf import Matrix
from jaxllm.nn import Transformer
from jaxllm.norm import LayerNorm, QkNorm, RMSNorm
from jaxllm.ops.blockwise import Blockwise
from jaxllm.position import POSITIONS, Rope
from jaxllm.tree import flatten, unflatten
from jaxllm.wiring import ParallelTwoNorms, Post, PostOnly, Pre, Sandwich

SHAPE = dict(vocab_size=64, embed_dim=32, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=16, mlp_dim=48)
FACTORS = dict(short_factor=(1.0, 1.1, 1.2, 1.3), long_factor=(1.0, 1.5, 2.0, 2.5))


def layer(name, window=None, **fields):
  return Layer(POSITIONS[name](**fields), window)


def model(*layers, **fields):
  return ModelConfig(**SHAPE | dict(layers=layers or (Layer(Rope(100.0)),)) | fields)


BIASES = ("q", "k", "v", "o", "up", "down")
CASES = {
  "llama": model(layer("llama3", base=100.0, factor=4.0, original_length=8)),
  "gemma2": model(
    layer("rope", 5, base=100.0),
    layer("rope", base=100.0),
    **dict(wiring=Sandwich(), norm=RMSNorm(scale="1+w"), mlp=Glu("gelu_tanh"), tie_embeddings=True),
    **dict(attention_softcap=2.0, logit_softcap=4.0, embed_scale=5.0, attention_scale=0.3),
  ),
  "olmo2": model(wiring=PostOnly(), qk_norm=QkNorm(RMSNorm(), "all"), num_kv_heads=8),
  "qwen3": model(qk_norm=QkNorm(), biases=("q", "k", "v"), attention=Blockwise(5, 4)),
  "gpt_neox": model(
    Layer(Rope(100.0, rotary_dim=4)),
    **dict(norm=LayerNorm(), wiring=ParallelTwoNorms(), mlp=Mlp(), biases=BIASES, num_kv_heads=8),
  ),
  "gpt2": model(
    layer("learned", max_length=12),
    **dict(norm=LayerNorm(), mlp=Mlp("gelu_tanh"), biases=BIASES, num_kv_heads=8, tie_embeddings=True),
  ),
  "opt": model(
    layer("learned", max_length=12, offset=2),
    **dict(norm=LayerNorm(), wiring=Post(), mlp=Mlp("relu"), biases=BIASES, num_kv_heads=8),
    **dict(embed_width=16, tie_embeddings=True),
  ),
  "bloom": model(
    layer("alibi"),
    **dict(norm=LayerNorm(), mlp=Mlp("gelu_tanh"), biases=BIASES, num_kv_heads=8, tie_embeddings=True),
    embed_norm=True,
  ),
  "mpt": model(
    layer("alibi", bias_max=4.0),
    **dict(norm=LayerNorm(bias=False), mlp=Mlp(), clip_qkv=1.0, num_kv_heads=8, tie_embeddings=True),
  ),
  "granite": model(wiring=Pre(0.7), attention_scale=0.2, logit_scale=0.5, embed_scale=3.0),
  "phi3": model(layer("longrope", base=100.0, factor=4.0, original_length=8, rotary_dim=8, **FACTORS)),
  "smollm3": model(layer("rope", base=100.0), layer("nope")),
  "every other parameter": model(
    layer("t5", num_buckets=10, max_distance=12),
    **dict(mlp=Xielu(), qk_norm=QkNorm(LayerNorm(), "each"), attention_sinks=True, biases=("head", "o")),
  ),
  "gpt_oss": model(
    layer("yarn", 5, base=100.0, factor=4.0, original_length=8),
    layer("yarn", base=100.0, factor=4.0, original_length=8),
    **dict(
      mlp=Moe(ClampedGlu(limit=1.0), 5, 2),
      attention_sinks=True,
      biases=(*"qkvo", "router", "gate", "up", "down"),
    ),
  ),
  "qwen3_moe": model(
    Layer(Rope(100.0), mlp=Glu()),
    Layer(Rope(100.0)),
    **dict(mlp=Moe(num_experts=6, top_k=3, router=SoftmaxRouter(False), mlp_dim=24), qk_norm=QkNorm()),
  ),
}
CASES |= {
  "odd llama": dataclasses.replace(CASES["llama"], vocab_size=61, num_kv_heads=2),
  "odd gemma2": dataclasses.replace(CASES["gemma2"], vocab_size=61, num_kv_heads=1),
  "odd groups": model(vocab_size=61, num_heads=12, num_kv_heads=3, biases=("head", "k"), norm_head=True),
}
"""The last three have key heads and a vocabulary that a tensor axis of four does not divide: k and v whole, padding."""
MATRIX = ("llama", "phi3", "opt", "gemma2", "odd llama", "qwen3_moe")
"""Whose matrices are held as [out, in], as those of a checkpoint are."""


@functools.cache
def abstract(cfg):
  """Shapes and types of the parameters."""
  init = lambda key: Transformer(cfg).init(key, np.zeros((1, 1), np.int32))["params"]
  return jax.eval_shape(init, jax.random.key(0))


def params(cfg, matrix=False):
  """Random float32 parameters, NumPy arrays; with `matrix` the head and those of two dimensions in layers as [out, in]."""

  def draw(path, shape):
    x = np.random.default_rng(zlib.crc32(path.encode())).standard_normal(shape).astype(np.float32)
    if path.endswith("norm/scale"):
      return np.float32(getattr(cfg.norm, "scale", "w") != "1+w") + np.float32(0.3) * x
    if path.endswith(("bias", "sinks", "alpha_p", "alpha_n")) or path == "embed":
      return np.float32(0.3) * x
    return x * np.float32(1.5 * shape[-2] ** -0.5)

  drawn = unflatten({path: draw(path, leaf.shape) for path, leaf in flatten(abstract(cfg)).items()})
  return as_loaded(drawn) if matrix else drawn


def as_loaded(params):
  """Parameters with the head and the matrices of layers held as [out, in]."""
  is_matrix = lambda path: path in ("head", "embed_in", "embed_out") or path.endswith("/w")
  stored = lambda path, x: Matrix(np.ascontiguousarray(x.swapaxes(-1, -2))) if is_matrix(path) else x
  return unflatten({path: stored(path, x) for path, x in flatten(params).items()})


@functools.cache
def source(name):
  """A function that makes the parameters of a case, always the same one."""
  return functools.partial(params, CASES[name], name in MATRIX)
