"""What quant.apply and the schemes refuse, by name; and weights of zeros, which each of them holds."""

import jax.numpy as jnp
import numpy as np
import pytest
from quantization_table import refused

from jaxllm import quant, tree
from jaxllm.errors import ConfigError, QuantError
from jaxllm.leaf import QTensor

PATH = "layers/0/mlp/up/w"
INT8 = quant.SCHEMES["int8"]()
FIELDS = [(name, {}) for name in quant.SCHEMES]
FIELDS += [("nf4", dict(double_quant=True)), ("llm_int8", dict(features=(3,)))]
each = pytest.mark.parametrize(("name", "fields"), FIELDS)


def weights(shape=(256, 16)):
  return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def raises(row, error, message, call):
  """`call` raises the error with the message, and both are in the table of `--quantization`."""
  with pytest.raises(error, match=message) as caught:
    call()
  refused(row, caught.value)


def applied(w, name="int8", **fields):
  return quant.apply(tree.unflatten({PATH: w}), quant.SCHEMES[name](**fields))["layers"]["0"]["mlp"]["up"][
    "w"
  ]


@each
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_refused_by_every_scheme(name, fields, bad):
  w = weights()
  w[200, 5] = bad
  message = f"{PATH}: found NaN or infinity, .* the checkpoint is damaged, or leave"
  raises(f"any scheme, a weight of {bad}", QuantError, message, lambda: applied(w, name, **fields))


@each
@pytest.mark.parametrize("rows", [slice(None), slice(128), slice(128, None)])
def test_zeros_are_held_as_zeros_by_every_scheme(name, fields, rows):
  """A whole weight, or the blocks of half of it, of whatever size; what is beside them is held as ever."""
  w = weights()
  w[rows] = 0
  found = np.asarray(quant.dequantize(applied(w, name, **fields)))
  assert not found[rows].any() and np.isfinite(found).all()
  assert np.linalg.norm(found - w) <= 0.3 * np.linalg.norm(w)  # 3 bits: 2.8 / 3 / sqrt(12) = 0.27


@each
def test_integers_and_nothing_are_refused_by_every_scheme(name, fields):
  message = f"{PATH}: found a weight of int8, expected floats; it is quantized already"
  integers, nothing = weights().astype(np.int8), weights((0, 16))
  raises("any scheme, integers", QuantError, message, lambda: applied(integers, name, **fields))
  message = rf"{PATH}: found \(0, 16\), expected a matrix"
  raises("any scheme, no rows", QuantError, message, lambda: applied(nothing, name, **fields))


GROUPS = r"found the shape \(320, 16\), whose 320 rows groups of 128 do not divide; take group=80, or leave"
BLOCKS = (
  r"found the shape \(96, 16\), expected a multiple of the block, 64, as its rows; take block=48, or leave"
)
SHAPES = [
  *((name, (320, 16), GROUPS) for name in ("int4", "int4_asym", "int3", "int3_asym", "zeroquant")),
  *((name, (96, 16), BLOCKS) for name in ("nf4", "fp4")),
  ("int4", (24, 40), "whose 24 rows groups of 128 do not divide; take group=24, or"),
  (
    "int4",
    (128, 41),
    r"found the shape \(128, 41\), expected a multiple of 2 columns, which share bytes of 4",
  ),
  ("int3_asym", (128, 42), "expected a multiple of 8 columns, which share bytes of 3 bits"),
  ("fp4", (33, 8), r"expected .* as its rows; leave it out by a rule"),
  ("glm_int4", (5, 8), r"found the shape \(5, 8\), expected an even number of rows"),
  ("w8a8", (133145, 1), "a sum of 133145 products, expected at most 133144"),
  ("llm_int8", (133145, 1), "a sum of 133145 products, expected at most 133144"),
]


@pytest.mark.parametrize(("name", "shape", "message"), SHAPES)
def test_shapes_that_do_not_fit_are_refused_by_path(name, shape, message):
  w = np.ones(shape, np.float32)
  raises(f"{name}, a weight {shape}", QuantError, f"{PATH}: .*{message}", lambda: applied(w, name))


@pytest.mark.parametrize(
  ("w", "name", "fields", "message"),
  [
    (np.full((4, 8), 7e4), "glm_int8", {}, "NaN or infinity, or a scale that is"),  # past half precision
    (np.full((4, 8), 7e4), "llm_int8", dict(features=(1,)), "NaN or infinity, or a scale that is"),
    (np.ones((133145, 1)), "zeroquant", dict(group=133145), "the shape .* a sum of 133145 products"),
    (
      np.ones((4, 8)),
      "llm_int8",
      dict(features=(4,)),
      r"the shape \(4, 8\), expected a row for each of features",
    ),
  ],
)
def test_weights_out_of_range_are_refused_by_path(w, name, fields, message):
  call = lambda: applied(w.astype(np.float32), name, **fields)
  raises(f"{name}, {fields}, a weight of {w[0, 0]:g}", QuantError, f"{PATH}: found {message}", call)


SETTINGS = [
  ("int8", dict(per="row"), "Int8.per: found 'row', expected one of column, tensor"),
  ("int8", dict(symmetric=1), "Int8.symmetric: found 1, expected one of True, False"),
  ("int4", dict(bits=5), "Groups.bits: found 5, expected one of 4, 3"),
  ("int4", dict(group=0), "Groups.group: found 0, expected an integer of at least 1"),
  ("int3", dict(group=128.0), "Groups.group: found 128.0, expected an integer"),
  ("int4", dict(symmetric=0), "Groups.symmetric: found 0, expected one of True, False"),
  ("zeroquant", dict(group=True), "ZeroQuant.group: found True, expected an integer of at least 1"),
  *(
    ("nf4", dict(block=n), f"Codebook.block: found {n}, expected an even integer of 2 or more")
    for n in (0, 3, 64.0, True)
  ),
  ("nf4", dict(levels="int4"), "Codebook.levels: found 'int4', expected one of nf4, fp4"),
  ("nf4", dict(double_quant=1), "Codebook.double_quant: found 1, expected one of True, False"),
  ("glm_int8", dict(bits=5), "GlmRows.bits: found 5, expected one of 8, 4"),
  ("llm_int8", dict(threshold=0), "LlmInt8.threshold: found 0, expected a number above 0"),
  ("llm_int8", dict(threshold=float("nan")), "LlmInt8.threshold: found nan"),
  ("llm_int8", dict(threshold="6"), "LlmInt8.threshold: found '6'"),
  ("llm_int8", dict(outliers=0), "LlmInt8.outliers: found 0, expected None or an integer of at least 1"),
  ("llm_int8", dict(outliers=True), "LlmInt8.outliers: found True"),
  *(
    ("llm_int8", dict(features=x), r"LlmInt8.features: found .*, expected a tuple of different integers")
    for x in ([3], (3, 3), (-1,), (1.0,), (True,), 3)
  ),
]


@pytest.mark.parametrize(("name", "fields", "message"), SETTINGS)
def test_settings_that_are_unknown_are_refused(name, fields, message):
  raises(f"{name}, {fields}", ConfigError, message, lambda: quant.SCHEMES[name](**fields))


CALLS = [
  (
    INT8,
    [("layers/9/.+", False)],
    ConfigError,
    r"rules: 'layers/9/.\+' matches no parameter; they are embed, head",
  ),
  (INT8, [("head", "int8")], ConfigError, "rules: found 'int8' for 'head', expected True, False or a scheme"),
  (INT8, [("head", 1)], ConfigError, "rules: found 1 for 'head', expected True, False or a scheme"),
  (INT8, [("head", type(INT8))], ConfigError, "rules: found <class .* for 'head', expected True, False or a"),
  (
    INT8,
    ["head"],
    ConfigError,
    "rules: found 'head', expected pairs of a regular expression and True, False or",
  ),
  (INT8, {"head": True}, ConfigError, "rules: found 'head', expected pairs"),
  (INT8, [(3, True)], ConfigError, r"rules: found \(3, True\), expected pairs"),
  (INT8, [("*", True)], ConfigError, r"rules: found '\*', expected a regular expression: nothing to repeat"),
  (INT8, [(".+", False)], ConfigError, "rules: no parameter is to be quantized"),
  (INT8, [("final_norm/scale", True)], QuantError, r"final_norm/scale: found \(16,\), expected a matrix"),
  ("int8", (), ConfigError, r"scheme: found 'int8', expected a value such as quant.SCHEMES\[name\]\(\)"),
  (type(INT8), (), ConfigError, "scheme: found <class .*, with the parentheses"),
  (None, (), ConfigError, "scheme: found None, expected a value"),
]


@pytest.mark.parametrize(("scheme", "rules", "error", "message"), CALLS)
def test_what_is_no_scheme_or_rule_is_refused(scheme, rules, error, message):
  flat = {
    "embed": weights((8, 16)),
    "head": weights((16, 8)),
    PATH: weights(),
    "final_norm/scale": np.ones(16),
  }
  call = lambda: quant.apply(tree.unflatten(flat), scheme, rules)
  raises(f"scheme={scheme!r}, rules={rules}", error, message, call)


def test_a_weight_that_is_held_already_is_refused():
  held = applied(jnp.asarray(weights()))
  assert isinstance(held, QTensor)
  message = rf"{PATH}: found a weight of Int8.* expected one that is not quantized yet"
  raises("a weight that is quantized", QuantError, message, lambda: applied(held))
