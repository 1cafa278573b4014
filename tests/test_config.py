"""The config: every field matters or is said not to, JSON both ways, errors that name what is wrong."""

import dataclasses
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
  tokens,
)
from model_checks import full, relative_error

from jaxllm.activation import Glu, Mlp
from jaxllm.errors import ConfigError
from jaxllm.nn import Transformer
from jaxllm.norm import LayerNorm, RMSNorm
from jaxllm.ops.attention import Plain
from jaxllm.ops.blockwise import Blockwise
from jaxllm.position import POSITIONS, LogN, Rope
from jaxllm.tree import diff

ROPE = MODELS["rope"]
SHAPES = dict(vocab_size=31, embed_dim=20, num_layers=6, num_heads=8, num_kv_heads=4, head_dim=12, mlp_dim=28)


def one(field, value, base=ROPE):
  return dataclasses.replace(base, **{field: value})


def small(name, fields=None, **kwargs):
  """One layer, which compiles in a third of the time and shows a field as well."""
  return model(name, **dict(num_layers=1, layers=(Layer(position(name, **(fields or {}))),)) | kwargs)


ROPE_1, NOPE_1, TILES = small("rope"), small("nope", **OTHER), small("rope", attention=Blockwise(5, 7))
LOG_N = small("rope", query_scale=LogN(8))

# What a field is changed from and to.  All must move the logits, except those of SAME, which must not.
CHANGED = {
  "ModelConfig.layers": (ROPE, one("layers", (Layer(position("rope")),))),
  "ModelConfig.norm": (ROPE_1, one("norm", RMSNorm(0.1), ROPE_1)),
  "ModelConfig.mlp": (ROPE_1, one("mlp", Glu("gelu"), ROPE_1)),
  "ModelConfig.query_scale": (ROPE_1, one("query_scale", LogN(16, 1.0), ROPE_1)),
  "ModelConfig.tie_embeddings": (ROPE_1, one("tie_embeddings", True, ROPE_1)),
  "ModelConfig.embed_scale": (ROPE_1, one("embed_scale", 0.5, ROPE_1)),
  "ModelConfig.attention": (ROPE_1, TILES),
  "Layer.position": (ROPE, one("layers", (*ROPE.layers[:2], Layer(position("nope"))))),
  "Layer.window": (ROPE, one("layers", (Layer(position("rope"), 3), *ROPE.layers[1:]))),
  "LogN.train_length": (LOG_N, one("query_scale", LogN(16), LOG_N)),
  "LogN.floor": (LOG_N, one("query_scale", LogN(8, 0.9), LOG_N)),
  "RMSNorm.eps": (ROPE_1, one("norm", RMSNorm(0.1), ROPE_1)),
  "LayerNorm.eps": (NOPE_1, one("norm", LayerNorm(0.1), NOPE_1)),
  "Glu.activation": (ROPE_1, one("mlp", Glu("gelu"), ROPE_1)),
  "Mlp.activation": (NOPE_1, one("mlp", Mlp("silu"), NOPE_1)),
  "Blockwise.q_block": (TILES, one("attention", Blockwise(32, 7), TILES)),
  "Blockwise.k_block": (TILES, one("attention", Blockwise(5, 24), TILES)),
}
SAME = {"ModelConfig.attention", "Blockwise.q_block", "Blockwise.k_block"}

# Fields of the position methods, each with a value unlike the table's; yarn starts with a ramp to move.
VALUES = dict(base=300.0, rotary_dim=8, layout="interleaved", factor=2.0, original_length=16)
VALUES |= dict(exponent=0.2, window=6, beta_fast=2.0, beta_slow=0.5, mscale=2.0, mscale_all_dim=2.0)
VALUES |= dict(attention_factor=0.5, truncate=False)
YARN = dict(original_length=64, beta_slow=1.0, mscale=1.0, mscale_all_dim=0.5)
LENGTH_MATTERS = ("dynamic_ntk", "yarn", "rerope")  # the others are told original_length, and do not use it
for name, cls in POSITIONS.items():
  for field in dataclasses.fields(cls):
    start = YARN if name == "yarn" else {}
    row = f"{cls.__name__}.{field.name}"
    CHANGED[row] = (small(name, start), small(name, start | {field.name: VALUES[field.name]}))
    if field.name == "original_length" and name not in LENGTH_MATTERS:
      SAME.add(row)


@pytest.mark.parametrize(
  "field",
  [pytest.param(f, marks=[pytest.mark.core] * (f in ("YarnRope.factor", "Layer.window"))) for f in CHANGED],
)
def test_a_changed_field_moves_the_logits(field):
  """And where it moves them to is right, by the float64 decoder."""
  before, after = CHANGED[field]
  weights = params(dataclasses.replace(before, tie_embeddings=False))
  old, new = full(before, tokens(), weights=weights), full(after, tokens(), weights=weights)
  moved = relative_error(new, old)
  assert moved <= 1e-5 if field in SAME else moved > 1e-3, f"{field}: moved by {moved:.1e}"
  assert relative_error(new, oracle.logits(after, weights, tokens())) <= 5e-6


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 8), ("float16", 11)])
def test_the_compute_type_moves_the_logits_a_little(dtype, bits):
  moved = relative_error(full(one("dtype", dtype, ROPE_1), tokens()), full(ROPE_1, tokens()))
  assert 1e-4 < moved < 20 * 2.0**-bits


@pytest.mark.parametrize("field", SHAPES)
def test_a_shape_is_a_shape_of_the_parameters(field):
  assert diff(params(ROPE), params(one(field, SHAPES[field])))


def test_all_shapes_at_once():
  cfg = dataclasses.replace(MODELS["yarn"], **SHAPES | dict(num_layers=2, layers=MODELS["yarn"].layers[:2]))
  assert relative_error(full(cfg, tokens()), oracle.logits(cfg, params(cfg), tokens())) <= 5e-6


def test_every_field_is_in_the_table():
  classes = [ModelConfig, Layer, LogN, RMSNorm, LayerNorm, Glu, Mlp, Plain, Blockwise, *POSITIONS.values()]
  fields = {f"{cls.__name__}.{field.name}" for cls in classes for field in dataclasses.fields(cls)}
  elsewhere = {f"ModelConfig.{name}" for name in (*SHAPES, "dtype")}
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
  (
    lambda: ROPE.with_position("ropes"),
    "position method: found 'ropes', expected one of nope, alibi, rope, ",
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
  (load(depth=3, heads=2), "model config: unknown key depth, heads; known: attention, "),
  (
    lambda: ModelConfig.from_dict({"mlp_dim": 8}),
    "model config: no vocab_size, embed_dim, .*head_dim; found: mlp_dim",
  ),
  (
    load(layers=[{"position": {"name": "rope"}, "windw": 4}]),
    "layers: found .*'windw'.*expected position, window",
  ),
  (load(layers=[{"window": 4}]), "layers: found {'window': 4}, expected position"),
  (load(layers=[{"position": None}]), "layers.position: found None, expected its name"),
  (load(layers=["rope"]), "layers: found 'rope', expected position"),
  (load(norm=None), "norm: found None, expected its name"),
  (load(norm={"name": "batch"}), "norm.name: found 'batch', expected one of rms, layer"),
  (load(norm={"eps": 1e-5}), "norm.name: found None, expected one of rms, layer"),
  (load(mlp={"name": "glu", "gate": 1}), "mlp: glu has no field gate; it has activation"),
  (load(attention={"name": "flash"}), "attention.name: found 'flash', expected one of plain, blockwise"),
  (load(query_scale={"name": "sqrt"}), "query_scale.name: found 'sqrt', expected one of log_n"),
  (
    load(layers=[{"position": {"name": "yarn", "betas": 3}}]),
    "layers.position: yarn has no field betas; it has ",
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
