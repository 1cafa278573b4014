"""Activations and feed-forward layers against float64, the constants of the field, and the edges of their types."""

import dataclasses
import functools

import components
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from jaxllm.activation import (
  ACTIVATIONS,
  MLPS,
  ClampedGlu,
  Glu,
  Mlp,
  Xielu,
  equal_parameters_width,
  gelu,
  gelu_sigmoid,
  gelu_tanh,
  glu_width,
  join_glu,
  silu,
  split_glu,
  swish,
)
from jaxllm.config import ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.nn.mlp import FeedForward
from jaxllm.tree import flatten

RNG = np.random.default_rng(0)
GATE, UP = (3 * RNG.standard_normal((2, 7, 64))).astype(np.float32)
GRID = np.concatenate([np.linspace(-12, 12, 4801), [-1e4, 1e4, -6e4, 6e4, -1e15, 1e15]]).astype(np.float32)

# An MLP value, and its hidden layer of gate and up as published, in NumPy
sigmoid = lambda x: 1 / (1 + np.exp(-x))
GLUS = {
  "GLU": (Glu("sigmoid"), lambda g, u: sigmoid(g) * u),
  "bilinear": (Glu("identity"), lambda g, u: g * u),
  "ReGLU": (Glu("relu"), lambda g, u: np.maximum(g, 0) * u),
  "GEGLU": (Glu("gelu"), lambda g, u: oracle.activation("gelu", g) * u),
  "SwiGLU": (Glu(), lambda g, u: g * sigmoid(g) * u),
  "SwiGLU, beta 3": (Glu("swish", 3.0), lambda g, u: g * sigmoid(3 * g) * u),
  "gpt-oss": (
    ClampedGlu(limit=2.0),
    lambda g, u: (np.clip(u, -2, 2) + 1) * np.minimum(g, 2) / (1 + np.exp(-1.702 * np.minimum(g, 2))),
  ),
}
VALUES = [*(value for value, _ in GLUS.values()), *map(Mlp, ACTIVATIONS), Mlp("swish", 0.5), Xielu()]


@functools.partial(jax.jit, static_argnums=0)
def apply(mlp, p, *inputs):
  return mlp(p, *inputs)


def start(mlp):
  return {name: init(jax.random.key(0), shape, jnp.float32) for name, (shape, init) in mlp.params().items()}


@functools.partial(jax.jit, static_argnums=0)
def value_and_slope(function, x):
  return jax.vmap(jax.value_and_grad(function))(x)


@pytest.mark.parametrize(
  "name", [pytest.param(name, marks=[pytest.mark.core] * (name == "gelu_tanh")) for name in ACTIVATIONS]
)
def test_values_and_gradients(name):
  """The gradient against central differences in float64, away from relu's corner."""
  out, gradient = map(np.asarray, value_and_slope(ACTIVATIONS[name], GRID))
  x = GRID.astype(np.float64)
  np.testing.assert_allclose(out, oracle.activation(name, x), rtol=1e-6, atol=5e-7)
  usual = np.abs(x) < 20
  expected = oracle.activation(name, x[usual])
  components.measured_close(name, "float64", out[usual], expected, rtol=1e-6, atol=5e-7)
  smooth = (np.abs(x) > 1e-4) & (np.abs(x) < 20)
  step = 1e-5
  slope = (oracle.activation(name, x + step) - oracle.activation(name, x - step)) / (2 * step)
  np.testing.assert_allclose(gradient[smooth], slope[smooth], rtol=2e-6, atol=2e-6)
  assert np.all(np.isfinite(gradient))


AT_ZERO = dict(relu=0, relu2=0, gelu=0.5, gelu_tanh=0.5, gelu_sigmoid=0.5, silu=0.5, swish=0.5)
AT_ZERO |= dict(sigmoid=0.25, identity=1)


def test_gradients_at_zero():
  found = {name: float(jax.jit(jax.grad(act))(0.0)) for name, act in ACTIVATIONS.items()}
  assert found == AT_ZERO


# x Phi(x) at 16 digits; the tanh form is off by 2e-4 and more at most of these
GELU = [
  (-3.0, -0.00404969409489031),
  (-1.0, -0.15865525393145707),
  (0.5, 0.34573123063700656),
  (2.0, 1.9544997361036416),
]


@pytest.mark.core
def test_gelu_is_by_erf():
  x, expected = np.array(GELU).T
  np.testing.assert_allclose(jax.jit(gelu)(x.astype(np.float32)), expected, rtol=0, atol=3e-7)
  assert np.all(np.abs(jax.jit(gelu_tanh)(x.astype(np.float32)) - expected)[[0, 2, 3]] > 1e-5)


@pytest.mark.parametrize(("act", "at", "lowest"), [(gelu, -0.7518, -0.16997), (silu, -1.2785, -0.27846)])
def test_the_lowest_value(act, at, lowest):
  x = np.linspace(-3, 0, 30001, dtype=np.float32)
  y = np.asarray(jax.jit(act)(x))
  np.testing.assert_allclose(y.min(), lowest, rtol=0, atol=1e-5)
  np.testing.assert_allclose(x[y.argmin()], at, rtol=0, atol=2e-3)  # flat there


@pytest.mark.parametrize(("act", "gap"), [(gelu_tanh, 4.73e-4), (gelu_sigmoid, 0.0203)])
def test_how_far_the_approximations_of_gelu_are_off(act, gap):
  x = np.linspace(-6, 6, 60001, dtype=np.float32)
  found = np.abs(np.asarray(jax.jit(act)(x) - jax.jit(gelu)(x))).max()
  np.testing.assert_allclose(found, gap, rtol=0.003)


def test_the_ends_of_swish():
  x = GRID[np.abs(GRID) < 20]
  np.testing.assert_allclose(swish(x, 0.0), x / 2, rtol=1e-6)
  np.testing.assert_allclose(swish(x, 1e4), np.maximum(x, 0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", GLUS)
def test_gated_layers(name):
  mlp, formula = GLUS[name]
  expected = formula(GATE.astype(np.float64), UP.astype(np.float64))
  components.measured_close(mlp, "float64", apply(mlp, {}, GATE, UP), expected, rtol=1e-6, atol=2e-6)
  assert mlp.inputs == ("gate", "up")
  if name != "bilinear":  # and the halves are not the same
    assert np.abs(apply(mlp, {}, UP, GATE) - expected).max() > 0.1


@pytest.mark.parametrize("mlp", [*map(Mlp, ACTIVATIONS), Mlp("swish", 0.5), Xielu(), Xielu(2.0, 1.5, 0.2)])
def test_layers_without_a_gate(mlp):
  p = start(mlp)
  expected = oracle.hidden(mlp, oracle.float64(p), GATE.astype(np.float64))
  components.measured_close(mlp, "float64", apply(mlp, p, GATE), expected, rtol=1e-6, atol=2e-6)
  assert mlp.inputs == ("up",)


def test_xielu_starts_from_its_fields():
  """At 2, 4 a_p + 2 beta; at -2, a_n (exp(-2) + 1) - 2 beta."""
  p = start(Xielu(alpha_p=0.7, alpha_n=0.9, beta=0.4))
  assert {name: x.shape for name, x in p.items()} == {"alpha_p": (1,), "alpha_n": (1,)}
  out = apply(Xielu(beta=0.4), p, np.float32([2, -2]))
  np.testing.assert_allclose(out, [4 * 0.7 + 0.8, 0.9 * (np.exp(-2) + 1) - 0.8], rtol=1e-6)


@pytest.mark.parametrize("mlp", VALUES, ids=str)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types_at_their_end(mlp, dtype):
  """At 6e4 and -6e4 nothing is NaN, in value or gradient; what is too large for float16 is infinite."""
  ends = jnp.asarray([6e4, -6e4, 6e4, -6e4], dtype), jnp.asarray([6e4, 6e4, -6e4, -6e4], dtype)
  inputs = ends[: len(mlp.inputs)]
  total = lambda inputs: jnp.sum(mlp(start(mlp), *inputs).astype(jnp.float32))
  out, gradients = apply(mlp, start(mlp), *inputs), jax.jit(jax.grad(total))(inputs)
  assert out.dtype == dtype
  for x in (out, *gradients):
    assert not np.any(np.isnan(np.asarray(x, np.float32)))
  if dtype == "bfloat16":
    assert np.all(np.isfinite(np.asarray(out, np.float32)))


def test_the_gradient_of_a_tanh_in_float16_is_not_a_number():
  """What the test above would find if the activation were computed in the type of its input."""
  assert np.isnan(jax.jit(jax.grad(lambda x: jax.nn.gelu(x, approximate=True)))(jnp.float16(6e4)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_half_types_are_rounded_once(name, dtype):
  x = jnp.asarray(np.linspace(-4, 4, 801), dtype)
  out = np.asarray(jax.jit(ACTIVATIONS[name])(x), np.float64)
  half_ulp = 2.0 ** -(8 if dtype == "bfloat16" else 11)
  expected = oracle.activation(name, np.asarray(x, np.float64))
  np.testing.assert_allclose(out, expected, rtol=1.01 * half_ulp, atol=1e-7)


def test_the_layer_binds_the_parameters_of_its_value():
  """And the recomputed backward pass gives the gradients of the plain formula, those of alpha_p and alpha_n among them."""
  size = dict(num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2, vocab_size=3)
  cfg = ModelConfig(embed_dim=6, mlp_dim=10, mlp=Xielu(), **size)
  layer, x = FeedForward(cfg), RNG.standard_normal((2, 3, 6)).astype(np.float32)
  params = layer.init(jax.random.key(0), x)["params"]
  assert flatten(params).keys() == {"up/w", "down/w", "alpha_p", "alpha_n"}
  loss = jax.jit(lambda p: jnp.sum(jnp.sin(layer.apply({"params": p}, x))))
  truth = lambda p: np.sum(np.sin(oracle.feed_forward(cfg, p, x.astype(np.float64))))
  np.testing.assert_allclose(loss(params), truth(oracle.float64(params)), rtol=1e-5)
  gradients = jax.grad(loss)(params)
  for name in ("alpha_p", "alpha_n"):
    above, below = (oracle.float64(params) | {name: np.float64(params[name]) + s} for s in (1e-5, -1e-5))
    np.testing.assert_allclose(gradients[name][0], (truth(above) - truth(below)) / 2e-5, rtol=1e-4)


def test_a_gated_layer_of_two_thirds_has_the_parameters_of_a_plain_one():
  size = dict(num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2, vocab_size=3)

  def count(mlp, mlp_dim):
    layer = FeedForward(ModelConfig(embed_dim=768, mlp_dim=mlp_dim, mlp=mlp, **size))
    shapes = jax.eval_shape(layer.init, jax.random.key(0), np.zeros((1, 1, 768), np.float32))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))

  assert equal_parameters_width(3072) == glu_width(768, multiple_of=1) == 2048
  assert count(Mlp(), 3072) == count(Glu(), 2048) == 2 * 768 * 3072


# The published intermediate sizes of Llama 1 (7B, 13B, 65B), Llama 2 70B, Llama 3 8B, 70B, Llama 3.2 1B
WIDTHS = [
  ((4096,), 11008),
  ((5120,), 13824),
  ((8192,), 22016),
  ((8192, 4096, 1.3), 28672),
  ((4096, 1024, 1.3), 14336),
  ((8192, 1024, 1.3), 28672),
  ((2048, 256, 1.5), 8192),
]


@pytest.mark.parametrize(("arguments", "width"), WIDTHS)
def test_the_width_of_llama(arguments, width):
  assert glu_width(*arguments) == width


def test_the_width_is_cut_before_it_is_multiplied():
  """Two thirds of 20 are 13.3, cut to 13, three times that 39; cut once it would be 40."""
  assert glu_width(5, 1, 3.0) == 39


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("activated", ["first", "second"])
def test_a_fused_weight_is_two_weights(activated, interleaved):
  x, gate, up = RNG.standard_normal((3, 6)), RNG.standard_normal((6, 4)), RNG.standard_normal((6, 4))
  fused = np.asarray(join_glu(gate, up, activated, interleaved))
  order = (gate, up) if activated == "first" else (up, gate)
  columns = [order[j % 2][:, j // 2] for j in range(8)] if interleaved else [*order[0].T, *order[1].T]
  np.testing.assert_array_equal(fused, np.float32(np.stack(columns, -1)))
  for found, expected in zip(split_glu(fused, activated, interleaved), (gate, up), strict=True):
    np.testing.assert_array_equal(found, np.float32(expected))  # of the weight
  for found, expected in zip(split_glu(x @ fused, activated, interleaved), (x @ gate, x @ up), strict=True):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)  # of the projection
  bias = join_glu(gate[0], up[0], activated, interleaved)
  np.testing.assert_array_equal(bias, fused[0])


def test_the_activated_half_matters():
  x = np.concatenate([GATE, UP], -1)
  first, second = (apply(Glu("gelu"), {}, *split_glu(x, activated)) for activated in ("first", "second"))
  np.testing.assert_allclose(second, oracle.activation("gelu", UP.astype(np.float64)) * GATE, atol=3e-6)
  assert np.abs(first - second).max() > 0.1


POSITIVE = ("a finite number above 0", 0.0, -1.0, float("nan"), float("inf"), "1", True)
NAMES = (f"one of {', '.join(ACTIVATIONS)}", "relu6", "", None, 1)
BAD = [
  (Glu, "activation", NAMES),
  (Mlp, "activation", NAMES),
  (ClampedGlu, "alpha", POSITIVE),
  (ClampedGlu, "limit", POSITIVE),
  (Xielu, "alpha_p", POSITIVE),
  (Xielu, "alpha_n", POSITIVE),
  (Xielu, "alpha_n", ("more than beta = 0.5", 0.5, 0.3)),
  (Xielu, "beta", POSITIVE),
  (Xielu, "eps", ("a finite number below 0", 0.0, 1e-6, float("nan"), -float("inf"), "-1", None)),
]


@pytest.mark.parametrize(("cls", "field", "case"), BAD)
def test_bad_fields_are_named(cls, field, case):
  wanted, *bads = case
  for bad in bads:
    with pytest.raises(ConfigError) as error:
      cls(**{field: bad})
    assert str(error.value) == f"{cls.__name__}.{field}: found {bad!r}, expected {wanted}"


@pytest.mark.parametrize("cls", [Glu, Mlp])
def test_only_swish_has_a_beta(cls):
  assert cls("swish") != cls("swish", 2.0)
  with pytest.raises(
    ConfigError, match=rf"{cls.__name__}.beta: found 2.0 with activation 'silu', expected None"
  ):
    cls("silu", 2.0)
  for bad in POSITIVE[1:]:
    with pytest.raises(ConfigError, match=rf"{cls.__name__}.beta: found {bad!r}, expected a finite number"):
      cls("swish", bad)


def test_every_kind_is_tested():
  assert {type(value) for value in VALUES} == set(MLPS.values())
  assert all(dataclasses.is_dataclass(kind) for kind in MLPS.values())


@pytest.mark.parametrize("function", [split_glu, lambda x, activated: join_glu(x, x, activated)])
def test_a_bad_half_is_named(function):
  with pytest.raises(ConfigError, match="activated: found 'last', expected one of first, second"):
    function(UP, "last")


def test_an_odd_width_is_named():
  with pytest.raises(ConfigError, match="fused gate and up: found 7 columns, expected an even number"):
    split_glu(np.zeros((3, 7)))
