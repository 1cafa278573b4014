"""The config: every field matters or is said not to, JSON both ways, errors that name what is wrong."""

import dataclasses
import functools
import json

import jax
import numpy as np
import oracle
import pytest
from model_cases import (
  FIELDS,
  MODELS,
  OTHER,
  SHAPE,
  Layer,
  ModelConfig,
  model,
  params,
  position,
  tables,
  tokens,
)
from model_checks import full, positions, relative_error

from jaxllm.activation import MLPS, ClampedGlu, Glu, Mlp, Xielu
from jaxllm.errors import ConfigError
from jaxllm.experts import ROUTERS, Moe, SoftmaxRouter
from jaxllm.nn import Context, Transformer
from jaxllm.norm import NORMS, L2Norm, LayerNorm, QkNorm, RMSNorm
from jaxllm.ops.attention import Plain
from jaxllm.ops.blockwise import Blockwise
from jaxllm.position import POSITIONS, Llama4Scale, LogN, Rope
from jaxllm.tree import diff
from jaxllm.wiring import WIRINGS, DeepNorm, GlmDeepNorm, Post, Pre

ROPE = MODELS["rope"]
SHAPES = dict(vocab_size=31, embed_dim=20, num_layers=6, num_heads=8, num_kv_heads=4, head_dim=12, mlp_dim=28)


def one(field, value, base=ROPE):
  return dataclasses.replace(base, **{field: value})


def small(name, fields=None, **kwargs):
  """One layer, which compiles in a third of the time and shows a field as well."""
  return model(name, **dict(num_layers=1, layers=(Layer(position(name, **(fields or {}))),)) | kwargs)


ROPE_1, NOPE_1, TILES = small("rope"), small("nope", **OTHER), small("rope", attention=Blockwise(5, 7))
LOG_N, LLAMA_4 = (small("rope", query_scale=scale) for scale in (LogN(8), Llama4Scale(5, 0.5)))
L2_1, CLAMPED_1, XIELU_1, MOE_1 = (
  one(*value, ROPE_1)
  for value in (
    ("norm", L2Norm()),
    ("mlp", ClampedGlu(limit=1.0)),
    ("mlp", Xielu(eps=-0.5)),
    ("mlp", Moe(Glu(), 4, 2, mlp_dim=12)),
  )
)

QK_1, DEEP_1, GLM_1 = (
  one(*value, ROPE_1)
  for value in (("qk_norm", QkNorm()), ("wiring", DeepNorm(1.5, 0.5)), ("wiring", GlmDeepNorm(1.5, 0.5)))
)

# What a field is changed from and to.  All must move the logits, except those of SAME, which must not.
CHANGED = {
  "ModelConfig.layers": (ROPE, one("layers", (Layer(position("rope")),))),
  "ModelConfig.norm": (ROPE_1, one("norm", RMSNorm(0.1), ROPE_1)),
  "ModelConfig.mlp": (ROPE_1, one("mlp", Glu("gelu"), ROPE_1)),
  "ModelConfig.query_scale": (ROPE_1, one("query_scale", LogN(16, 1.0), ROPE_1)),
  "ModelConfig.rope_precision": (ROPE_1, one("rope_precision", "hf", ROPE_1)),
  "ModelConfig.tie_embeddings": (ROPE_1, one("tie_embeddings", True, ROPE_1)),
  "ModelConfig.embed_scale": (ROPE_1, one("embed_scale", 0.5, ROPE_1)),
  "ModelConfig.embed_width": (ROPE_1, one("embed_width", 10, ROPE_1)),
  "ModelConfig.embed_norm": (ROPE_1, one("embed_norm", True, ROPE_1)),
  "ModelConfig.attention": (ROPE_1, TILES),
  "ModelConfig.attention_scale": (ROPE_1, one("attention_scale", 0.4, ROPE_1)),
  "ModelConfig.wiring": (ROPE_1, one("wiring", Post(), ROPE_1)),
  "ModelConfig.biases": (ROPE_1, one("biases", ("q", "gate", "head"), ROPE_1)),
  "ModelConfig.embed_gradient": (ROPE_1, one("embed_gradient", 0.1, ROPE_1)),
  "ModelConfig.qk_norm": (ROPE_1, QK_1),
  "ModelConfig.clip_qkv": (ROPE_1, one("clip_qkv", 1.0, ROPE_1)),
  "ModelConfig.attention_softcap": (ROPE_1, one("attention_softcap", 2.0, ROPE_1)),
  "ModelConfig.logit_softcap": (ROPE_1, one("logit_softcap", 2.0, ROPE_1)),
  "ModelConfig.logit_scale": (ROPE_1, one("logit_scale", 0.3, ROPE_1)),
  "ModelConfig.norm_head": (ROPE_1, one("norm_head", True, ROPE_1)),
  "ModelConfig.context_length": (ROPE_1, one("context_length", 8, ROPE_1)),
  "ModelConfig.eos_ids": (ROPE_1, one("eos_ids", (3, 0), ROPE_1)),
  "ModelConfig.attention_sinks": (ROPE_1, one("attention_sinks", True, ROPE_1)),
  "ModelConfig.layer_scaling": (ROPE, one("layer_scaling", True)),
  "QkNorm.norm": (QK_1, one("qk_norm", QkNorm(L2Norm()), ROPE_1)),
  "QkNorm.over": (QK_1, one("qk_norm", QkNorm(RMSNorm(), "all"), ROPE_1)),
  "QkNorm.place": (QK_1, one("qk_norm", QkNorm(RMSNorm(), "head", "after"), ROPE_1)),
  "Pre.branch_scale": (ROPE_1, one("wiring", Pre(0.6), ROPE_1)),
  "DeepNorm.alpha": (DEEP_1, one("wiring", DeepNorm(2.5, 0.5), DEEP_1)),
  "DeepNorm.beta": (DEEP_1, one("wiring", DeepNorm(1.5, 0.1), DEEP_1)),
  "GlmDeepNorm.alpha": (GLM_1, one("wiring", GlmDeepNorm(2.5, 0.5), GLM_1)),
  "GlmDeepNorm.beta": (GLM_1, one("wiring", GlmDeepNorm(1.5, 0.1), GLM_1)),
  "Layer.position": (ROPE, one("layers", (*ROPE.layers[:2], Layer(position("nope"))))),
  "Layer.window": (ROPE, one("layers", (Layer(position("rope"), 3), *ROPE.layers[1:]))),
  "Layer.mlp": (
    ROPE,
    one("layers", (dataclasses.replace(ROPE.layers[0], mlp=Glu("relu")), *ROPE.layers[1:])),
  ),
  "LogN.train_length": (LOG_N, one("query_scale", LogN(16), LOG_N)),
  "LogN.floor": (LOG_N, one("query_scale", LogN(8, 0.9), LOG_N)),
  "Llama4Scale.original_length": (LLAMA_4, one("query_scale", Llama4Scale(7, 0.5), LLAMA_4)),
  "Llama4Scale.beta": (LLAMA_4, one("query_scale", Llama4Scale(5, 0.8), LLAMA_4)),
  "RMSNorm.eps": (ROPE_1, one("norm", RMSNorm(0.1), ROPE_1)),
  "RMSNorm.scale": (ROPE_1, one("norm", RMSNorm(scale="1+w"), ROPE_1)),
  "RMSNorm.multiply_in": (ROPE_1, one("norm", RMSNorm(multiply_in="input"), ROPE_1)),
  "RMSNorm.fraction": (ROPE_1, one("norm", RMSNorm(fraction=0.3), ROPE_1)),
  "LayerNorm.eps": (NOPE_1, one("norm", LayerNorm(0.1), NOPE_1)),
  "LayerNorm.scale": (NOPE_1, one("norm", LayerNorm(scale="1+w"), NOPE_1)),
  "LayerNorm.bias": (NOPE_1, one("norm", LayerNorm(bias=False), NOPE_1)),
  "L2Norm.eps": (L2_1, one("norm", L2Norm(100.0), L2_1)),  # above every length
  "Glu.activation": (ROPE_1, one("mlp", Glu("gelu"), ROPE_1)),
  "Glu.beta": (ROPE_1, one("mlp", Glu("swish", 3.0), ROPE_1)),
  "Mlp.activation": (NOPE_1, one("mlp", Mlp("relu2"), NOPE_1)),
  "Mlp.beta": (NOPE_1, one("mlp", Mlp("swish", 3.0), NOPE_1)),
  "ClampedGlu.alpha": (CLAMPED_1, one("mlp", ClampedGlu(3.0, 1.0), CLAMPED_1)),
  "ClampedGlu.limit": (CLAMPED_1, one("mlp", ClampedGlu(limit=0.5), CLAMPED_1)),
  "Moe.expert": (MOE_1, one("mlp", Moe(Glu("gelu"), 4, 2, mlp_dim=12), ROPE_1)),
  "Moe.num_experts": (MOE_1, one("mlp", Moe(Glu(), 3, 2, mlp_dim=12), ROPE_1)),
  "Moe.top_k": (MOE_1, one("mlp", Moe(Glu(), 4, 3, mlp_dim=12), ROPE_1)),
  "Moe.router": (MOE_1, one("mlp", Moe(Glu(), 4, 2, SoftmaxRouter(False), 12), ROPE_1)),
  "Moe.mlp_dim": (MOE_1, one("mlp", Moe(Glu(), 4, 2), ROPE_1)),
  "SoftmaxRouter.renormalize": (MOE_1, one("mlp", Moe(Glu(), 4, 2, SoftmaxRouter(False), 12), ROPE_1)),
  "Xielu.alpha_p": (XIELU_1, one("mlp", Xielu(alpha_p=2.0, eps=-0.5), XIELU_1)),
  "Xielu.alpha_n": (XIELU_1, one("mlp", Xielu(alpha_n=2.0, eps=-0.5), XIELU_1)),
  "Xielu.beta": (XIELU_1, one("mlp", Xielu(beta=0.2, eps=-0.5), XIELU_1)),
  "Xielu.eps": (XIELU_1, one("mlp", Xielu(), XIELU_1)),
  "Blockwise.q_block": (TILES, one("attention", Blockwise(32, 7), TILES)),
  "Blockwise.k_block": (TILES, one("attention", Blockwise(5, 24), TILES)),
}
SAME = {"ModelConfig.attention", "Blockwise.q_block", "Blockwise.k_block"}
SAME |= {"Xielu.alpha_p", "Xielu.alpha_n"}  # where training starts
SAME |= {"DeepNorm.beta", "GlmDeepNorm.beta", "ModelConfig.embed_gradient"}  # and how it goes on
SAME |= {"ModelConfig.layer_scaling"}  # in exact arithmetic
SAME |= {"RMSNorm.multiply_in"}  # in float32
SAME |= {"ModelConfig.context_length", "ModelConfig.eos_ids"}  # what is told of the model
SAME |= {
  "ModelConfig.rope_precision"
}  # at positions as low as these: test_float32.py has those where it does

# Fields of the position methods, each with a value unlike the table's; yarn starts with a ramp to move.
VALUES = dict(base=300.0, rotary_dim=8, layout="interleaved", factor=2.0, original_length=16)
VALUES |= dict(exponent=0.2, window=5, beta_fast=2.0, beta_slow=0.5, mscale=2.0, mscale_all_dim=2.0)
VALUES |= dict(attention_factor=0.5, truncate=False)
VALUES |= dict(beta_turns=(0.05, 0.15), gamma_turns=(0.2, 0.6), low_freq_factor=0.4, high_freq_factor=3.0)
VALUES |= dict(short_factor=(1.0, 2.0) * 4, long_factor=(4.0, 1.0) * 4, proportion=0.3)
VALUES |= dict(leak=2.0, group=3, sinks=1, scale_base=4.0, gamma=3.0)
VALUES |= dict(max_length=28, offset=2, num_buckets=6, max_distance=9)
VALUES |= dict(bias_max=4.0, slope_dtype="bfloat16", placement="before")
YARN = dict(original_length=64, beta_slow=1.0, mscale=1.0, mscale_all_dim=0.5)
STARTS = {"yarn": YARN, "alibi": dict(bias_max=1.3)}  # a bias_max whose slopes are far from bfloat16
SHAPED = ("max_length", "offset", "num_buckets")
LENGTH_MATTERS = ("dynamic_ntk", "yarn", "rerope", "ntk_by_parts", "longrope", "llama3", "leaky_rerope")
LENGTH_MATTERS += (
  "inv_leaky_rerope",
  "self_extend",
  "streaming",
)  # others know original_length, and do not use it
NARROWER = dict(short_factor=(1.0,) * 4, long_factor=(4.0,) * 4)  # a list has a number a pair of rotary_dim
for name, cls in POSITIONS.items():
  for field in dataclasses.fields(cls):
    start = STARTS.get(name, {})
    row = f"{cls.__name__}.{field.name}"
    if field.name in SHAPED:  # these change the shape of a table
      continue
    other = NARROWER if (name, field.name) == ("longrope", "rotary_dim") else {}
    CHANGED[row] = (small(name, start), small(name, start | {field.name: VALUES[field.name]} | other))
    if field.name == "original_length" and name not in LENGTH_MATTERS:
      SAME.add(row)


@pytest.mark.parametrize(
  "field",
  [pytest.param(f, marks=[pytest.mark.core] * (f in ("YarnRope.factor", "Layer.window"))) for f in CHANGED],
)
def test_a_changed_field_moves_the_logits(field):
  """And where it moves them to is right, by the float64 decoder."""
  before, after = CHANGED[field]
  weights = {cfg: untied(cfg) for cfg in (before, after)}
  if not diff(*weights.values()):  # the same parameters; some start at other values
    weights[after] = weights[before]
  old, new = start(before), eager(after, weights[after])
  moved = relative_error(new, old)
  assert moved <= 1e-5 if field in SAME else moved > 1e-3, f"{field}: moved by {moved:.1e}"
  assert relative_error(new, oracle.logits(after, weights[after], tokens())) <= 5e-6


def eager(cfg, weights):
  """Logits operation by operation, each compiled once for all fields; that jit is eager is for test_scan.py to say."""
  logits, _ = Transformer(cfg).apply(
    {"params": weights}, tokens(), Context(pos=positions()), rope=tables(cfg)
  )
  return np.asarray(logits)


@functools.cache
def start(cfg):
  """Logits before a change: many rows of the table change the same model."""
  return eager(cfg, untied(cfg))


def untied(cfg):
  """Weights that are the same at the same path, the head included."""
  return params(dataclasses.replace(cfg, tie_embeddings=False))


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 8), ("float16", 11)])
def test_the_compute_type_moves_the_logits_a_little(dtype, bits):
  moved = relative_error(full(one("dtype", dtype, ROPE_1), tokens()), full(ROPE_1, tokens()))
  assert 1e-4 < moved < 20 * 2.0**-bits


@pytest.mark.parametrize("field", SHAPES)
def test_a_shape_is_a_shape_of_the_parameters(field):
  assert diff(params(ROPE), params(one(field, SHAPES[field])))


@pytest.mark.parametrize(
  ("name", "field"), [("learned", "max_length"), ("learned", "offset"), ("t5", "num_buckets")]
)
def test_a_shape_of_a_table_is_one_of_the_parameters(name, field):
  after = small(name, {field: VALUES[field]})
  assert [line[:5] for line in diff(params(small(name)), params(after))] == ["shape"]
  assert relative_error(full(after, tokens()), oracle.logits(after, params(after), tokens())) <= 5e-6


def test_all_shapes_at_once():
  cfg = dataclasses.replace(MODELS["yarn"], **SHAPES | dict(num_layers=2, layers=MODELS["yarn"].layers[:2]))
  assert relative_error(full(cfg, tokens()), oracle.logits(cfg, params(cfg), tokens())) <= 5e-6


def test_every_field_is_in_the_table():
  classes = [ModelConfig, Layer, LogN, Llama4Scale, Plain, Blockwise]
  classes += [
    QkNorm,
    *NORMS.values(),
    *MLPS.values(),
    Moe,
    *ROUTERS.values(),
    *WIRINGS.values(),
    *POSITIONS.values(),
  ]
  fields = {f"{cls.__name__}.{field.name}" for cls in classes for field in dataclasses.fields(cls)}
  elsewhere = {f"ModelConfig.{name}" for name in (*SHAPES, "dtype")} | {
    "Learned.max_length",
    "Learned.offset",
    "T5Bias.num_buckets",
  }
  assert fields == CHANGED.keys() | elsewhere


CONFIGS = {f"{row} {i}": cfg for row, pair in CHANGED.items() for i, cfg in enumerate(pair)} | MODELS


def test_json_there_and_back():
  for name, cfg in CONFIGS.items():
    there = json.dumps(cfg.to_dict(), allow_nan=False)
    back = ModelConfig.from_dict(json.loads(there))
    assert back == cfg and hash(back) == hash(cfg), name
    assert json.dumps(back.to_dict()) == there, name
  assert len(set(MODELS.values())) == len(MODELS)


def test_a_saved_config_may_leave_out_what_is_default():
  assert ModelConfig.from_dict(SHAPE | {"layers": [{"position": {"name": "rope"}}]}) == ModelConfig(**SHAPE)


def build(**changes):
  return lambda: ModelConfig(**SHAPE | changes)


def load(**changes):
  return lambda: ModelConfig.from_dict(ROPE.to_dict() | changes)


ERRORS = [
  *(
    (build(**{field: bad}), rf"{field}: found {bad!r}, expected an integer of at least 1")
    for field in SHAPES
    for bad in (0, -1, 2.5, "8", True)
  ),
  (build(num_kv_heads=3), "num_kv_heads: found 3, expected a divisor of num_heads = 4"),
  (build(layers=()), "layers: a pattern of 0 does not divide num_layers = 3"),
  (build(layers=(Layer(),) * 2), "layers: a pattern of 2 does not divide num_layers = 3"),
  (build(dtype="float8"), "dtype: found 'float8', expected one of float32, bfloat16, float16"),
  (
    build(layers=(Layer(Rope(rotary_dim=18)),)),
    "rotary_dim: found 18, expected an even number of at most head_dim = 16",
  ),
  (build(head_dim=15), "rotary_dim: found 15, expected an even number of at most head_dim = 15"),
  *(
    (
      lambda bad=bad: Layer(window=bad),
      f"Layer.window: found {bad!r}, expected an integer of at least 1, or None",
    )
    for bad in (0, -3, 2.0, "8")
  ),
  (lambda: LogN(1), "LogN.train_length: found 1, expected an integer of at least 2"),
  (lambda: LogN(8, 1.5), "LogN.floor: found 1.5, expected a number from 0 to 1"),
  (lambda: Llama4Scale(0), "Llama4Scale.original_length: found 0, expected an integer of at least 1"),
  (lambda: Llama4Scale(8, 0.0), "Llama4Scale.beta: found 0.0, expected a finite number above 0"),
  (lambda: Pre(-1.0), "Pre.branch_scale: found -1.0, expected a finite number above 0"),
  (build(embed_width=0), "embed_width: found 0, expected an integer of at least 1"),
  (build(context_length=0), "context_length: found 0, expected an integer of at least 1"),
  *(
    (build(eos_ids=ids), f"eos_ids: found {bad!r}, expected integers from 0 to vocab_size - 1 = 28")
    for ids, bad in (((2, 29), 29), ([-1], -1), ((True,), True), (2.0, 2.0), (("2",), "2"))
  ),
  (build(rope_precision="float32"), "ModelConfig.rope_precision: found 'float32', expected one of exact, hf"),
  (build(embed_norm=1), "ModelConfig.embed_norm: found 1, expected one of True, False"),
  (build(norm_head=1), "ModelConfig.norm_head: found 1, expected one of True, False"),
  (
    build(attention_scale=0.1, layers=(Layer(position("alibi", placement="before")),)),
    r"attention_scale: found 0.1, expected None with .* \(Alibi\(placement='before'\)\)",
  ),
  (
    lambda: ROPE.with_position("ropes"),
    "position method: found 'ropes', expected one of nope, sinusoidal, learned, t5, alibi, rope, ",
  ),
  (
    lambda: ROPE.with_position("ntk", scale=2.0),
    "ntk: no field scale; it has base, factor, layout, original_length, ",
  ),
  (lambda: MODELS["alibi"].with_position("ntk"), "position method ntk: the model has no global RoPE layer"),
  (
    lambda: one("layers", (Layer(Rope(), 4),)).with_position("ntk"),
    "position method ntk: the model has no global",
  ),
  (lambda: MODELS["dynamic_ntk"].rope_tables(), "dynamic_ntk: .*give max_len, or seq_len to pin one"),
  (build(biases=("q", "gates")), "biases: found 'gates', expected some of q, k, v, o, gate, up, down, head"),
  (build(mlp=Mlp(), biases=("gate",)), "biases: found 'gate', expected some of q, k, v, o, up, down, head"),
  *(
    (build(**{field: bad}), rf"ModelConfig.{field}: found {bad!r}, expected a finite number above 0")
    for field in (
      "embed_gradient",
      "attention_scale",
      "clip_qkv",
      "attention_softcap",
      "logit_softcap",
      "logit_scale",
    )
    for bad in (0, -1.0, float("inf"), "2", True)
  ),
  (build(embed_gradient=1.5), "embed_gradient: found 1.5, expected a number above 0 and at most 1"),
  (
    build(layers=(Layer(position("rerope")),), qk_norm=QkNorm(place="after")),
    "qk_norm.place: found 'after', expected 'before' with ReRope, whose keys",
  ),
  (lambda: QkNorm(over="heads"), "QkNorm.over: found 'heads', expected one of head, each, all"),
  (lambda: QkNorm(place="between"), "QkNorm.place: found 'between', expected one of before, after"),
  (load(wiring={"name": "deep"}), "wiring.name: found 'deep', expected one of pre, post, "),
  (load(qk_norm={"name": "qk_norm", "norm": {"name": "l3"}}), "norm.name: found 'l3', expected one of rms"),
  (
    lambda: ModelConfig.from_dict({"mlp_dim": 8}),
    "model config: no vocab_size, embed_dim, .*head_dim; found: mlp_dim",
  ),
  (
    load(layers=[{"position": {"name": "rope"}, "windw": 4}]),
    "layers: found .*'windw'.*expected position, window",
  ),
  (load(layers=[{"window": 4}]), "layers: found {'window': 4}, expected position"),
  (load(layers=[{"position": None}]), "position: found None, expected its name"),
  (load(layers=["rope"]), "layers: found 'rope', expected position"),
  (load(norm=None), "norm: found None, expected its name"),
  (load(depth=3, heads=2), "model config has no field depth, heads; it has attention, "),
  (load(norm={"name": "batch"}), "norm.name: found 'batch', expected one of rms, layer, l2"),
  (load(norm={"eps": 1e-5}), "norm.name: found None, expected one of rms, layer, l2"),
  (
    build(mlp=Moe(Glu(), 2, 1), biases=("alpha",)),
    "biases: .*some of q, k, v, o, router, gate, up, down, head",
  ),
  (lambda: Moe(top_k=9), "Moe.top_k: found 9, expected at most num_experts = 8"),
  (lambda: Moe(num_experts=0), "Moe.num_experts: found 0, expected an integer of at least 1"),
  (lambda: Moe(top_k=True), "Moe.top_k: found True, expected an integer of at least 1"),
  (lambda: Moe(mlp_dim=0), "Moe.mlp_dim: found 0, expected an integer of at least 1"),
  (lambda: Moe(Xielu()), "Moe.expert: found Xielu.*expected one of Glu, Mlp, ClampedGlu"),
  (lambda: Moe(Moe()), "Moe.expert: found Moe.*expected one of Glu, Mlp, ClampedGlu"),
  (lambda: Moe(router="softmax"), "Moe.router: found 'softmax', expected one of SoftmaxRouter"),
  (lambda: SoftmaxRouter(1), "SoftmaxRouter.renormalize: found 1, expected one of True, False"),
  (
    load(mlp={"name": "moe", "router": {"name": "sigmoid"}}),
    "router.name: found 'sigmoid', expected one of softmax",
  ),
  (
    load(mlp={"name": "moe", "expert": {"name": "xielu"}}),
    "expert.name: found 'xielu', expected one of glu, mlp",
  ),
  (
    load(layers=[{"position": {"name": "rope"}, "mlp": {"name": "gru"}}]),
    "mlp.name: found 'gru', expected one of glu",
  ),
  (load(mlp={"name": "glu", "gate": 1}), "mlp: glu has no field gate; it has activation, beta"),
  (
    load(attention={"name": "flash"}),
    "attention.name: found 'flash', expected one of auto, plain, blockwise, cudnn, splash",
  ),
  (load(query_scale={"name": "sqrt"}), "query_scale.name: found 'sqrt', expected one of log_n, llama4"),
  (
    load(layers=[{"position": {"name": "yarn", "betas": 3}}]),
    "position: yarn has no field betas; it has ",
  ),
  (
    load(layers=[{"position": {"name": "yarn"}}]),
    "YarnRope.original_length: found None, expected the length",
  ),
]


@pytest.mark.parametrize(("broken", "message"), ERRORS, ids=[str(i) for i in range(len(ERRORS))])
def test_errors_name_the_field_what_was_found_and_what_is_expected(broken, message):
  with pytest.raises(ConfigError, match=message):
    broken()


def test_with_position_keeps_what_it_is_not_told():
  base = ModelConfig(
    **SHAPE, layers=(Layer(Rope(base=500.0, rotary_dim=8, layout="interleaved", original_length=8)),)
  )
  yarn = base.with_position("yarn", factor=4.0).layers[0].position
  assert yarn == POSITIONS["yarn"](500.0, 8, "interleaved", 8, factor=4.0)
  again = (
    base.with_position("yarn", factor=4.0).with_position("pi", factor=2.0, base=100.0).layers[0].position
  )
  assert again == POSITIONS["pi"](100.0, 8, "interleaved", 8, factor=2.0)
  assert base.with_position("nope").layers == (Layer(position("nope")),)


def test_with_position_leaves_local_layers_alone():
  """Windowed RoPE layers and layers without RoPE stay as they were trained."""
  cfg = one("layers", (Layer(Rope()), Layer(Rope(), 4), Layer(position("nope"))))
  changed = cfg.with_position("ntk", factor=4.0)
  assert changed.layers == (Layer(POSITIONS["ntk"](factor=4.0)), *cfg.layers[1:])
  assert [type(rope).__name__ for rope in changed.ropes] == ["NtkRope", "Rope"]


def test_tables_of_one_length():
  """seq_len pins one length for all queries; without it each length beyond the trained one has a row."""
  cfg = MODELS["dynamic_ntk"]
  assert [cfg.rope_tables(max_len=n).ropes[0].rows for n in (4, 8, 9, 24)] == [1, 1, 2, 17]
  pinned, rows = cfg.rope_tables(seq_len=20).ropes[0], cfg.rope_tables(max_len=24).ropes[0]
  assert pinned.rows == 1
  np.testing.assert_array_equal(pinned.hi[0], rows.hi[12])
  ids = tokens()
  found = relative_error(
    np.asarray(
      jax.jit(lambda p, t: Transformer(cfg).apply({"params": p}, t, rope=cfg.rope_tables(seq_len=20))[0])(
        params(cfg), ids
      )
    ),
    oracle.logits(cfg, params(cfg), ids, seq_len=20),
  )
  assert found <= 5e-6


def test_tables_that_do_not_fit_the_model():
  rows = MODELS["dynamic_ntk"].rope_tables(max_len=24)
  with pytest.raises(
    ConfigError, match=r"rope: a table of 17 rows needs unrotated keys, which Rope does not keep"
  ):
    Transformer(ROPE).apply({"params": params(ROPE)}, tokens(), rope=rows)
  with pytest.raises(ConfigError, match="rope: found tables of 0 RoPEs, expected 1"):
    Transformer(ROPE).apply({"params": params(ROPE)}, tokens(), rope=MODELS["nope"].rope_tables())


def test_fields_of_the_suite_are_fields():
  known = {field.name for cls in POSITIONS.values() for field in dataclasses.fields(cls)}
  assert FIELDS.keys() | VALUES.keys() <= known
