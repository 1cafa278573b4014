"""A wrong family is far from the kept logits: each row of the table is a bug that some port of a family has had."""

import dataclasses

import family_bugs_gpt
import numpy as np
import pytest
from family_cases import GOLDEN, KEPT, T, built, tokens
from family_checks import context, program, tables
from model_checks import relative_error

from jaxllm.activation import ClampedGlu, Glu, Mlp, Xielu
from jaxllm.config import Layer
from jaxllm.experts import SoftmaxRouter
from jaxllm.norm import LayerNorm, QkNorm, RMSNorm
from jaxllm.position import Alibi, NoPE, NtkOldRope
from jaxllm.wiring import GlmDeepNorm, ParallelTwoNorms, Pre, deepnorm_coefficients


def error(row, cfg=None, params=None):
  """How far logits are from the kept ones of a row."""
  cfg = built(row).cfg if cfg is None else cfg
  params = built(row).params if params is None else params
  found = program("forward", cfg)(params, tokens(), tables(cfg, row), **context(row, T))
  with np.load(GOLDEN) as kept:
    return relative_error(np.asarray(found)[0, KEPT], kept[row])


def each_layer(change):
  return lambda cfg: dict(layers=tuple(dataclasses.replace(layer, **change(layer)) for layer in cfg.layers))


def each_rope(**fields):
  return each_layer(lambda layer: {"position": dataclasses.replace(layer.position, **fields)})


def window(by):
  return each_layer(lambda layer: {"window": layer.window and layer.window + by})


def moe(**fields):
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
  "a head that is not normed": ("baichuan, 13B form, normed head", lambda cfg: dict(norm_head=False)),
  "ALiBi for RoPE": ("baichuan", lambda cfg: dict(layers=(Layer(Alibi()),))),
  "pairs of halves in ChatGLM": ("chatglm", each_rope(layout="half")),
  "all of a head turned": ("chatglm", each_rope(rotary_dim=None)),
  "the base multiplied where positions are divided": (
    "chatglm, positions divided",
    each_layer(lambda layer: {"position": dataclasses.replace(built("chatglm").cfg.ropes[0], base=16e4)}),
  ),
  "the residual from before the norm": ("chatglm-6b", lambda cfg: dict(wiring=Pre())),
  "frequencies of the head, not of its half": ("chatglm-6b", each_rope(base=100.0)),
  "DeepNet's alpha": (
    "glm-130b",
    lambda cfg: dict(wiring=GlmDeepNorm(*deepnorm_coefficients(cfg.num_layers)["decoder"])),
  ),
  "another eps": ("gpt2", lambda cfg: dict(norm=LayerNorm(1e-2))),
  "pairs of halves": ("glm", each_rope(layout="half")),
  "the whole head turned in pairs": ("glm", each_rope(rotary_dim=None)),
  "norms after left out": ("glm4", lambda cfg: dict(wiring=Pre())),
  "no mean taken off": ("cohere", lambda cfg: dict(norm=RMSNorm(cfg.norm.eps))),
  "queries and keys not normed": ("cohere", lambda cfg: dict(qk_norm=None)),
  "logits not multiplied": ("cohere", lambda cfg: dict(logit_scale=1.0)),
  "RoPE without a window": (
    "cohere2",
    each_layer(lambda layer: {"position": built("cohere2").cfg.ropes[0]}),
  ),
  "RoPE where EXAONE has none": (
    "exaone4",
    each_layer(lambda layer: {"position": built("exaone4").cfg.ropes[0]}),
  ),
  "no positions without a window": (
    "exaone4, no window",
    each_layer(lambda layer: {"position": NoPE()}),
  ),
  "norms before": ("exaone4", lambda cfg: dict(wiring=Pre())),
  "queries, keys and values as they are": ("olmo", lambda cfg: dict(clip_qkv=None)),
  "a mean square without its mean": ("olmo", lambda cfg: dict(norm=RMSNorm(1e-5, scale=None))),
  "YaRN in windows": ("olmo3", each_layer(lambda layer: {"position": built("olmo3").cfg.ropes[1]})),
  "YaRN nowhere": ("olmo3", each_layer(lambda layer: {"position": built("olmo3").cfg.ropes[0]})),
  "no bias of the output": ("seed_oss", lambda cfg: dict(biases=tuple(set(cfg.biases) - {"o"}))),
  "relu not squared": ("arcee", lambda cfg: dict(mlp=Mlp("relu"))),
  "queries and keys normed before the rotation": (
    "hunyuan_v1_dense",
    lambda cfg: dict(qk_norm=QkNorm(cfg.norm, place="before")),
  ),
  "alpha not read": (
    "hunyuan_v1_dense",
    each_layer(lambda layer: {"position": dataclasses.replace(layer.position, factor=1.0)}),
  ),
  "a base times alpha": (
    "hunyuan_v1_dense",
    each_layer(lambda layer: {"position": NtkOldRope(layer.position.base, factor=layer.position.factor)}),
  ),
  "weights that do not sum to 1": ("mixtral", moe(router=SoftmaxRouter(renormalize=False))),
  "weights that sum to 1": ("qwen3_moe", moe(router=SoftmaxRouter())),
  "an expert too many": ("mixtral", moe(top_k=3)),
  "an expert too few": ("gpt_oss", moe(top_k=2)),
  "a gate that is not clamped": ("gpt_oss", moe(expert=ClampedGlu(1.3, 1e3))),
  "the usual gate": ("gpt_oss", moe(expert=Glu())),
  "xIELU without its line": ("apertus", lambda cfg: dict(mlp=Xielu(beta=0.01))),
}
CONFIGS |= family_bugs_gpt.CONFIGS
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


def slopes_exchanged(attn, mlp):
  mlp["alpha_p"], mlp["alpha_n"] = mlp["alpha_n"], mlp["alpha_p"]


def heads_in_turn(attn, mlp):
  """The weights of one head's norm for another."""
  attn["q_norm"] = {"scale": attn["q_norm"]["scale"][::-1]}


def heads_for_blocks(attn, mlp):
  """[3, N, H] rows read as [N, 3, H]."""
  fused = np.concatenate([attn[name]["w"] for name in "qkv"], 1).reshape(72, -1, 3, 12)
  for i, name in enumerate("qkv"):
    attn[name] = attn[name] | {"w": fused[:, :, i].reshape(72, -1)}


def keys_for_queries(attn, mlp):
  attn["q"], attn["k"] = attn["k"], attn["q"]


def halves_for_turns(attn, mlp):
  """Gate and up of an expert, which take turns, read as two halves."""
  parts = {one: mlp["experts"][one] for one in ("gate", "up")}
  fused = np.stack([part["w"] for part in parts.values()], -1)
  halves = np.split(fused.reshape(*fused.shape[:2], -1), 2, -1)
  mlp["experts"] = mlp["experts"] | {
    one: part | {"w": half} for (one, part), half in zip(parts.items(), halves, strict=True)
  }


def no_sinks(attn, mlp):
  attn["sinks"] = np.full_like(attn["sinks"], -1e9)


def experts_in_turn(attn, mlp):
  mlp["experts"] = mlp["experts"] | {"down": {"w": mlp["experts"]["down"]["w"][::-1]}}


# bug: row, change of the parameters of each layer
WEIGHTS = {
  "up is the activated half": ("phi3", gate_for_up),
  "fused heads read as blocks": ("bloom", blocks_for_heads),
  "keys before queries": ("mpt", keys_for_queries),
  "up is the activated half of GLM": ("glm", gate_for_up),
  "weights of another head's norm": ("cohere", heads_in_turn),
  "slopes exchanged": ("apertus", slopes_exchanged),
  "gate and up as halves": ("gpt_oss", halves_for_turns),
  "no sinks": ("gpt_oss", no_sinks),
  "the matrices of another expert": ("mixtral", experts_in_turn),
  "blocks read as fused heads": ("baichuan", heads_for_blocks),
  "ChatGLM's fused heads read as blocks": ("chatglm-6b", blocks_for_heads),
  "the first half is the activated one": ("glm-130b", gate_for_up),
}
WEIGHTS |= family_bugs_gpt.WEIGHTS


@each(WEIGHTS)
def test_wrong_layouts_show(bug):
  row, change = WEIGHTS[bug]
  assert error(row) <= 1e-5
  assert error(row, params=changed(row, change)) > 1e-2
