"""Norms, activations and feed-forward layers against float64, and at the edges of their types."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from jaxllm.activation import ACTIVATIONS, MLPS, Glu, Mlp, gelu, silu
from jaxllm.errors import ConfigError
from jaxllm.norm import NORMS, LayerNorm, RMSNorm

D = 64
RNG = np.random.default_rng(0)
P = {"scale": (1 + 0.3 * RNG.standard_normal(D)).astype(np.float32)}
PARAMS = {"rms": P, "layer": P | {"bias": RNG.standard_normal(D).astype(np.float32)}}
UNIT = RNG.standard_normal((5, 7, D)).astype(np.float32)

# name: input, absolute tolerance.  The output is of size 1: what float32 keeps of the input counts.
INPUTS = {
  "unit": (UNIT, 2e-6),
  "mean 1e4, std 1": (UNIT + np.float32(1e4), 3e-3),  # a mean of 64 numbers of 1e4 is held to 1e-3
  "small": (UNIT * np.float32(1e-3), 2e-6),
  "large": (UNIT * np.float32(1e15), 2e-6),
  "one row of 1e4": (np.where(np.arange(5)[:, None, None] == 2, np.float32(1e4), 1) * UNIT, 2e-6),
}
each_norm = pytest.mark.parametrize("name", NORMS)


def normed(kind, x):
  return jax.jit(kind)(PARAMS["layer" if isinstance(kind, LayerNorm) else "rms"], x)


@each_norm
@pytest.mark.parametrize(
  "case", [pytest.param(c, marks=[pytest.mark.core] * (c == "mean 1e4, std 1")) for c in INPUTS]
)
def test_norm(name, case):
  x, tolerance = INPUTS[case]
  kind = NORMS[name]()
  expected = oracle.norm(kind, oracle.float64(PARAMS[name]), x.astype(np.float64))
  np.testing.assert_allclose(normed(kind, x), expected, rtol=0, atol=tolerance)


@each_norm
def test_norm_of_zero(name):
  """A finite value and a finite gradient: eps is inside the root."""
  value = lambda x: jnp.sum(NORMS[name]()(PARAMS[name], x) ** 2)
  value, gradient = jax.jit(jax.value_and_grad(value))(jnp.zeros((2, D)))
  assert np.isfinite(value) and np.all(np.isfinite(gradient))


@each_norm
@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 1e15), ("float16", 6e4)])
def test_norm_of_half_types_is_computed_in_float32(name, dtype, size):
  """One rounding, of the result: squares and sums overflow in float16, and have two digits in bfloat16."""
  x = jnp.asarray(np.where(UNIT > 0, size, -size), dtype)
  out = np.asarray(normed(NORMS[name](), x), np.float64)
  expected = oracle.norm(NORMS[name](), oracle.float64(PARAMS[name]), np.asarray(x, np.float64))
  np.testing.assert_allclose(out, expected, rtol=2.0 ** -(8 if dtype == "bfloat16" else 11), atol=1e-6)


@each_norm
def test_norm_of_what_float32_cannot_square(name):
  """1e20 squared is infinite: the result is then 0, and finite."""
  assert np.all(
    np.isfinite(np.asarray(normed(NORMS[name](), jnp.full((2, D), 1e20, jnp.bfloat16)), np.float32))
  )


def test_eps_is_inside_the_root():
  x = np.full((1, D), 1e-4, np.float32)
  out = jax.jit(RMSNorm(eps=1e-5))({"scale": np.ones(D, np.float32)}, x)
  np.testing.assert_allclose(out, 1e-4 / np.sqrt(1e-8 + 1e-5), rtol=1e-6)  # 0.0316; outside it would be 0.909


@pytest.mark.parametrize(("kind", "shift", "same"), [(LayerNorm(), 3.0, True), (RMSNorm(), 3.0, False)])
def test_invariances(kind, shift, same):
  """Both norms ignore the size of a row, and the layer norm its mean: here without eps to speak of."""
  kind = type(kind)(eps=1e-12)
  np.testing.assert_allclose(normed(kind, UNIT * 8), normed(kind, UNIT), rtol=0, atol=1e-6)
  moved = np.abs(np.asarray(normed(kind, UNIT + np.float32(shift))) - normed(kind, UNIT)).max()
  assert moved <= 2e-5 if same else moved > 0.1


def test_a_layer_norm_of_rows_without_mean_is_an_rms_norm():
  x = UNIT - UNIT.mean(-1, keepdims=True)
  p = PARAMS["layer"] | {"bias": np.zeros(D, np.float32)}
  np.testing.assert_allclose(jax.jit(LayerNorm(1e-6))(p, x), jax.jit(RMSNorm(1e-6))(p, x), rtol=0, atol=2e-6)


GELU = [
  (-3.0, -0.00404969409489031),
  (-1.0, -0.15865525393145707),
  (0.5, 0.34573123063700656),
  (2.0, 1.9544997361036416),
]


@pytest.mark.core
def test_gelu_is_by_erf():
  """x Phi(x) at 16 digits; the tanh form is off by 2e-4 and more at each of these."""
  x, expected = np.array(GELU).T
  np.testing.assert_allclose(jax.jit(gelu)(x.astype(np.float32)), expected, rtol=0, atol=3e-7)
  assert np.all(
    np.abs(jax.nn.gelu(jnp.asarray(x, jnp.float32), approximate=True) - expected)[[0, 2, 3]] > 1e-5
  )


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
  x = np.concatenate([np.linspace(-12, 12, 4001), [-1e4, 1e4]]).astype(np.float32)
  out, gradient = jax.jit(jax.vmap(jax.value_and_grad(ACTIVATIONS[name])))(x)
  with np.errstate(over="ignore"):
    np.testing.assert_allclose(out, oracle.activation(name, x.astype(np.float64)), rtol=3e-7, atol=3e-7)
  assert np.all(np.isfinite(gradient))


def test_feed_forward_layers():
  gate, up = UNIT[0], UNIT[1]
  silu64 = oracle.activation("silu", gate.astype(np.float64))
  np.testing.assert_allclose(jax.jit(Glu())(gate, up), silu64 * up, rtol=0, atol=2e-6)
  np.testing.assert_array_equal(Glu("gelu")(np.zeros(3), np.ones(3)), 0)
  np.testing.assert_allclose(jax.jit(Mlp("silu"))(gate), silu(gate), rtol=0, atol=1e-6)
  assert Glu.inputs == ("gate", "up") and Mlp.inputs == ("up",)


@pytest.mark.parametrize("cls", [*NORMS.values(), *MLPS.values()])
def test_bad_fields_are_named(cls):
  field, bads, expected = (
    ("eps", (0.0, -1.0, float("nan"), float("inf"), "1e-5", True), "a finite number above 0")
    if cls in NORMS.values()
    else ("activation", ("relu6", "", None), "one of gelu, silu")
  )
  for bad in bads:
    with pytest.raises(ConfigError) as error:
      cls(**{field: bad})
    assert str(error.value) == f"{cls.__name__}.{field}: found {bad!r}, expected {expected}"
