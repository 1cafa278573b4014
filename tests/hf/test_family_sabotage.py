"""A wrong family is far from the kept logits: each row of the table is a bug that some port of a family has had."""

import dataclasses

import numpy as np
import pytest
from family_cases import GOLDEN, KEPT, built, tokens
from family_checks import program, tables
from model_checks import relative_error

from jaxllm.activation import ClampedGlu, Glu, Mlp
from jaxllm.config import Layer
from jaxllm.experts import SoftmaxRouter
from jaxllm.norm import LayerNorm, QkNorm, RMSNorm
from jaxllm.position import Alibi, NoPE
from jaxllm.wiring import ParallelTwoNorms, Pre


def error(row, cfg=None, params=None):
  """How far logits are from the kept ones of a row."""
  cfg = built(row).cfg if cfg is None else cfg
  found = program("forward", cfg)(built(row).params if params is None else params, tokens(), tables(cfg, row))
  with np.load(GOLDEN) as kept:
    return relative_error(np.asarray(found)[0, KEPT], kept[row])


def each_layer(change):
  return lambda cfg: dict(layers=tuple(dataclasses.replace(layer, **change(layer)) for layer in cfg.layers))


def each_rope(**fields):
  return each_layer(lambda layer: {"position": dataclasses.replace(layer.position, **fields)})


def window(by):
  return each_layer(lambda layer: {"window": layer.window and layer.window + by})


def experts(**fields):
  return lambda cfg: dict(mlp=dataclasses.replace(cfg.mlp, **fields))


# bug: row, changed fields of its config
CONFIGS = {
  "a window of one more": ("mistral", window(1)),
  "a window of one less": ("gemma2", window(-1)),
  "windows on the other layers": ("qwen2", lambda cfg: dict(layers=cfg.layers[::-1])),
  "llama3 as plain RoPE": (
    "llama, llama3 RoPE, biases",
    each_layer(lambda layer: {"position": type(built("llama").cfg.ropes[0])(500.0)}),
  ),
  "no mscale": ("llama, tied", each_rope(attention_factor=1.0)),
  "pairs interleaved": ("llama", each_rope(layout="interleaved")),
  "the whole head turned": ("gpt_neox", each_rope(rotary_dim=None)),
  "queries not scaled by position": ("ministral3", lambda cfg: dict(query_scale=None)),
  "gelu by erf": ("gemma", lambda cfg: dict(mlp=Glu("gelu"))),
  "gelu by tanh": ("mpt", lambda cfg: dict(mlp=Mlp("gelu_tanh"))),
  "a norm by w": ("gemma", lambda cfg: dict(norm=RMSNorm(cfg.norm.eps))),
  "embeddings not scaled": ("gemma", lambda cfg: dict(embed_scale=1.0)),
  "scores divided by the root of the head": ("gemma2", lambda cfg: dict(attention_scale=None)),
  "no cap of scores": ("gemma2", lambda cfg: dict(attention_softcap=None)),
  "one RoPE for both types of layer": (
    "gemma3_text",
    each_layer(lambda layer: {"position": built("gemma3_text").cfg.ropes[1]}),
  ),
  "queries and keys normed after the rotation": (
    "qwen3",
    lambda cfg: dict(qk_norm=QkNorm(cfg.norm, place="after")),
  ),
  "RoPE on all layers": (
    "smollm3",
    each_layer(lambda layer: {"position": built("smollm3").cfg.ropes[0]}),
  ),
  "branches not scaled": ("granite", lambda cfg: dict(wiring=Pre())),
  "logits not divided": ("granite", lambda cfg: dict(logit_scale=1.0)),
  "one after the other": ("gpt_neox", lambda cfg: dict(wiring=Pre())),
  "side by side": ("gpt_neox, serial", lambda cfg: dict(wiring=ParallelTwoNorms())),
  "the residual before the norm": ("bloom, residual after the norm", lambda cfg: dict(wiring=Pre())),
  "another slope": ("bloom", lambda cfg: dict(layers=(Layer(Alibi(8.5)),))),
  "no positions": ("bloom", lambda cfg: dict(layers=(Layer(NoPE()),))),
  "projections not clipped": ("mpt", lambda cfg: dict(clip_qkv=None)),
  "weights of experts that add up to one": (
    "qwen3_moe",
    experts(router=SoftmaxRouter(True)),
  ),
  "weights of a softmax of all experts": (
    "mixtral",
    experts(router=SoftmaxRouter(False)),
  ),
  "an expert too many": ("mixtral", experts(top_k=3)),
  "an expert too few": ("gpt_oss", experts(top_k=2)),
  "gates and ups not clamped": ("gpt_oss", experts(expert=ClampedGlu(1.3, 100.0))),
  "a plain SwiGLU": ("gpt_oss", experts(expert=Glu())),
  "sinks left out": ("gpt_oss", lambda cfg: dict(attention_sinks=False)),
  "a truncated ramp of YaRN": ("gpt_oss", each_rope(truncate=True)),
  "another eps": ("gpt2", lambda cfg: dict(norm=LayerNorm(1e-2))),
}
BY_DEFAULT = ("a window of one more", "fused heads read as blocks")


def each(bugs):
  """A parametrize mark; what is not BY_DEFAULT waits for the full counts."""
  slow = lambda bug: bug if bug in BY_DEFAULT else pytest.param(bug, marks=pytest.mark.slow)
  return pytest.mark.parametrize("bug", list(map(slow, bugs)))


@each(CONFIGS)
def test_wrong_settings_show(bug):
  """By ten times the tolerance of parity at least."""
  row, change = CONFIGS[bug]
  cfg = built(row).cfg
  assert error(row, dataclasses.replace(cfg, **change(cfg))) > 1e-4


def changed(row, change):
  """The parameters of a row with `change(attn, mlp)` made to each layer."""
  params = built(row).params
  layers = {}
  for i, layer in params["layers"].items():
    attn, mlp = dict(layer["attn"]), dict(layer["mlp"])
    change(attn, mlp)
    layers[i] = layer | {"attn": attn, "mlp": mlp}
  return params | {"layers": layers}


def gate_for_up(attn, mlp):
  mlp["gate"], mlp["up"] = mlp["up"], mlp["gate"]


def blocks_for_heads(attn, mlp):
  """[N, 3, H] rows read as [3, N, H]."""
  fused = np.stack([attn[name]["w"].reshape(72, -1, 12) for name in "qkv"], 2).reshape(72, -1)
  for name, part in zip("qkv", np.split(fused, 3, 1), strict=True):
    attn[name] = attn[name] | {"w": part}


def keys_for_queries(attn, mlp):
  attn["q"], attn["k"] = attn["k"], attn["q"]


def gates_for_ups(attn, mlp):
  experts = mlp["experts"]
  mlp["experts"] = experts | {"gate": experts["up"], "up": experts["gate"]}


def halves_for_turns(attn, mlp):
  """The columns of gate and up, which are in turn, read as [gate, up]."""
  gate, up = (mlp["experts"][name]["w"] for name in ("gate", "up"))
  fused = np.stack([gate, up], -1).reshape(*gate.shape[:-1], -1)
  halves = dict(zip(("gate", "up"), np.split(fused, 2, -1), strict=True))
  mlp["experts"] = mlp["experts"] | {name: mlp["experts"][name] | {"w": w} for name, w in halves.items()}


def other_experts(attn, mlp):
  if "experts" in mlp:
    mlp["experts"] = {name: {"w": part["w"][::-1]} for name, part in mlp["experts"].items()}


# bug: row, change of the parameters of each layer
WEIGHTS = {
  "up is the activated half": ("phi3", gate_for_up),
  "fused heads read as blocks": ("bloom", blocks_for_heads),
  "keys before queries": ("mpt", keys_for_queries),
  "w3 is the gate": ("mixtral", gates_for_ups),
  "gate and up of experts as halves": ("gpt_oss", halves_for_turns),
  "experts in another order than the router's": ("qwen3_moe", other_experts),
}


@each(WEIGHTS)
def test_wrong_layouts_show(bug):
  row, change = WEIGHTS[bug]
  assert error(row) <= 1e-5
  assert error(row, params=changed(row, change)) > 1e-2
