"""Bugs that ports of the families of family_rows_gpt.py have had, for test_family_sabotage.py."""

import dataclasses

import numpy as np
from family_cases import built

from jaxllm.activation import Mlp
from jaxllm.config import Layer
from jaxllm.norm import LayerNorm, QkNorm
from jaxllm.position import Alibi
from jaxllm.position.absolute import Learned


def rope(**fields):
  """One RoPE of all layers with other fields."""
  return lambda cfg: dict(layers=(Layer(dataclasses.replace(cfg.ropes[0], **fields), cfg.layers[0].window),))


# bug: row, changed fields of its config
CONFIGS = {
  "GELU by erf": ("starcoder2", lambda cfg: dict(mlp=Mlp("gelu"))),
  "no window on any layer": ("starcoder2", lambda cfg: dict(layers=(Layer(cfg.ropes[0]),))),
  "the head's bias forgotten": ("phi", lambda cfg: dict(biases=tuple({*cfg.biases} - {"head"}))),
  "a quarter of the head turned": ("phi", rope(rotary_dim=4)),
  "queries and keys not normed": ("phi, normed queries", lambda cfg: dict(qk_norm=None)),
  "halves turned for neighbours": ("gptj", rope(layout="half")),
  "frequencies of the whole head": ("codegen", rope(base=10000.0 ** (8 / 18))),
  "slopes and products in float32": (
    "falcon, RW form",
    lambda cfg: dict(layers=(Layer(Alibi(placement="before")),)),
  ),
  "a bias that is not divided": (
    "falcon, RW form",
    lambda cfg: dict(layers=(Layer(Alibi(slope_dtype="bfloat16")),)),
  ),
  "positions from the table's first row": ("opt", lambda cfg: dict(layers=(Layer(Learned(642)),))),
  "GELU for ReLU": ("opt, 350m form", lambda cfg: dict(mlp=Mlp("gelu"))),
  "scores divided all the same": ("gpt_bigcode, a key a query", lambda cfg: dict(attention_scale=None)),
  "a LayerNorm by w": ("nemotron", lambda cfg: dict(norm=LayerNorm(cfg.norm.eps))),
  "ReLU not squared": ("nemotron", lambda cfg: dict(mlp=Mlp("relu"))),
  "normed heads after the rotation": (
    "persimmon",
    lambda cfg: dict(qk_norm=QkNorm(cfg.qk_norm.norm, place="after")),
  ),
  "the biases of queries, keys and values forgotten": ("stablelm", lambda cfg: dict(biases=())),
}


def keys_for_values(attn, mlp):
  """CodeGen has values before keys."""
  attn["k"], attn["v"] = attn["v"], attn["k"]


def in_order(names, sizes, layout):
  """The fused matrix of a row's q, k and v read as one after the other, of so many columns each."""

  def change(attn, mlp):
    fused = layout([attn[name]["w"] for name in names])
    for name, part in zip(names, np.split(fused, np.cumsum(sizes)[:-1], axis=1), strict=True):
      attn[name] = attn[name] | {"w": part}

  return change


def fused(row):
  """What makes the fused matrix of a row, [in, out]."""
  model = built(row)
  (layout,) = {key.layout for key in model.family.keys(model.cfg) if len(key.ours) == 3 and key.stored}
  return lambda parts: layout.join(parts, model.cfg, 1)


def norm_of_the_first_head(attn, mlp):
  """StableLM has a norm for each head."""
  weights = attn["q_norm"]["scale"]
  attn["q_norm"] = {"scale": np.broadcast_to(weights[:1], weights.shape)}


# bug: row, change of the parameters of each layer
WEIGHTS = {
  "values for keys": ("codegen", keys_for_values),
  "shards read as blocks": ("codegen", in_order("qvk", (72,) * 3, fused("codegen"))),
  "groups read as blocks": ("falcon, 40B form", in_order("qkv", (96, 32, 32), fused("falcon, 40B form"))),
  "a key a query read as blocks": (
    "gpt_bigcode, a key a query",
    in_order("qkv", (72,) * 3, fused("gpt_bigcode, a key a query")),
  ),
  "one norm for all heads": ("stablelm", norm_of_the_first_head),
}
