"""Laws of norms, activations and gated layers for any values; one shape each."""

import functools

import jax
import numpy as np
import oracle
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from properties import examples, numbers

from jaxllm.activation import ACTIVATIONS, ClampedGlu, Glu
from jaxllm.norm import L2Norm, LayerNorm, RMSNorm

D = 16
TINY = 1e-30
"""An eps that is nothing beside the squares here, so that the laws hold without it."""
BARE = {
  "rms": RMSNorm(TINY, scale=None),
  "partial rms": RMSNorm(TINY, scale=None, fraction=0.5),
  "layer": LayerNorm(TINY, scale=None, bias=False),
  "l2": L2Norm(1e-12),
}
GLUS = [*(Glu(name) for name in ACTIVATIONS), Glu("swish", 3.0)]


@functools.partial(jax.jit, static_argnums=0)
def run(value, p, *inputs):
  return value(p, *inputs)


def apply(value, *inputs, **p):
  return np.asarray(run(value, p, *inputs))


@st.composite
def rows(draw):
  """[3, D] in steps of 1/64, so that sums with integers up to 2^16 are exact, and no row constant, nor its first half 0."""
  x = np.round(draw(numbers((3, D), 8.0)) * 64) / 64
  assume(np.all(x.std(-1) > 0.1) and np.all(np.abs(x[:, : D // 2]).max(-1) > 0.1))
  return x.astype(np.float32)


@pytest.mark.parametrize("name", BARE)
@given(rows(), st.integers(-20, 20))
@examples(40)
def test_norms_do_not_know_the_scale(name, x, power):
  found, scaled = apply(BARE[name], x), apply(BARE[name], np.float32(2.0**power) * x)
  np.testing.assert_allclose(scaled, found, rtol=1e-6, atol=1e-7)
  np.testing.assert_allclose(apply(BARE[name], -x), -found, rtol=0, atol=0)


@given(rows(), st.integers(-(2**16), 2**16))
@examples(40)
def test_a_layer_norm_does_not_know_the_mean_and_an_rms_norm_does(x, shift):
  layer, moved = (apply(LayerNorm(scale=None, bias=False), y) for y in (x, x + np.float32(shift)))
  np.testing.assert_allclose(moved, layer, rtol=0, atol=3e-6)
  if abs(shift) > 100:  # all coordinates are then nearly equal
    rms = apply(RMSNorm(scale=None), x + np.float32(shift))
    np.testing.assert_allclose(rms, np.sign(shift), rtol=0, atol=0.3)


@given(rows())
@examples(40)
def test_what_a_norm_leaves(x):
  """Mean 0 and variance 1; mean square 1; length 1."""
  sums = lambda name, power: np.mean(apply(BARE[name], x).astype(np.float64) ** power, axis=-1)
  np.testing.assert_allclose(sums("layer", 1), 0, rtol=0, atol=1e-6)
  np.testing.assert_allclose([sums("layer", 2), sums("rms", 2), D * sums("l2", 2)], 1, rtol=2e-6)


@given(rows(), numbers((D,), 4.0), numbers((D,), 4.0))
@examples(40)
def test_gain_and_bias_come_last(x, gain, bias):
  """norm(x) * g + b, one g and b for all rows; 1 + w is w from 0."""
  bare = {name: apply(BARE[name], x).astype(np.float64) for name in ("rms", "layer")}
  tolerance = dict(rtol=1e-6, atol=1e-6 * (1 + np.abs(gain).max()))
  np.testing.assert_allclose(apply(RMSNorm(TINY), x, scale=gain), bare["rms"] * gain, **tolerance)
  np.testing.assert_allclose(
    apply(RMSNorm(TINY, "1+w"), x, scale=gain), bare["rms"] * (1 + gain.astype(np.float64)), **tolerance
  )
  found = apply(LayerNorm(TINY), x, scale=gain, bias=bias)
  np.testing.assert_allclose(found, bare["layer"] * gain + bias, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("mlp", [*GLUS, ClampedGlu()], ids=str)
@given(numbers((D,), 30.0), numbers((D,), 30.0))
@examples(25)
def test_gated_layers(mlp, gate, up):
  """Against NumPy; a gate of 0 closes (a sigmoid's halves), and all but the clamped one are linear in what they gate."""
  found = apply(mlp, gate, up)
  expected = oracle.hidden(mlp, {}, gate.astype(np.float64), up.astype(np.float64))
  np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)
  closed = apply(mlp, np.zeros_like(gate), up)
  np.testing.assert_array_equal(closed, up / 2 if mlp == Glu("sigmoid") else 0 * up)
  if isinstance(mlp, Glu):
    np.testing.assert_allclose(apply(mlp, gate, -4 * up), -4 * found, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("name", ["relu", "gelu", "gelu_tanh", "gelu_sigmoid", "silu", "swish"])
@given(numbers((D,), 50.0))
@examples(40)
def test_what_gates_keep_of_x_and_of_minus_x_is_x(name, x):
  """act(x) - act(-x) = x where act(x) = x s(x) with s(x) + s(-x) = 1; and it is between min(0, x) and max(0, x)."""
  found, other = (apply(lambda_of(name), y) for y in (x, -x))
  np.testing.assert_allclose(found.astype(np.float64) - other, x, rtol=2e-6, atol=1e-30)
  assert np.all((found >= np.minimum(x, 0)) & (found <= np.maximum(x, 0)))


@functools.cache
def lambda_of(name):
  """The activation as a value of one input."""
  return lambda p, x: ACTIVATIONS[name](x)
