"""Products of weights: a single row, which a CPU multiplies twice, is that of many rows, in both layouts and in gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.leaf import Matrix
from jaxllm.ops import einsum as einsums
from jaxllm.ops.einsum import einsum, turned

RNG = np.random.default_rng(0)
X, W = RNG.standard_normal((3, 24)), RNG.standard_normal((24, 10))


def weights(stored, dtype):
  w = jnp.asarray(W, dtype)
  return {"array": w, "io": Matrix(w, "io"), "oi": Matrix(w.T, "oi")}[stored]


@pytest.mark.parametrize("dtype", [pytest.param("bfloat16", marks=pytest.mark.core), "float16", "float32"])
@pytest.mark.parametrize("stored", ["array", "io", "oi"])
def test_a_row_alone_is_that_row_among_others(dtype, stored):
  x, w = jnp.asarray(X, dtype), weights(stored, dtype)
  truth = np.asarray(x, np.float64) @ np.asarray(jnp.asarray(W, dtype), np.float64)
  for equation, rows in (("CD,DF->CF", x), ("...D,DV->...V", x[:, None])):
    for one in range(len(X)):
      found = jax.jit(lambda x, w, e=equation: einsum(e, x, w))(rows[one : one + 1], w)
      assert found.dtype == jnp.float32 and found.shape == (*rows[:1].shape[:-1], 10)
      np.testing.assert_allclose(np.ravel(found), truth[one], rtol=0, atol=1e-5)
  assert einsum("CD,DF->CF", x[:1], w, out_dtype=jnp.dtype(dtype)).dtype == dtype


def test_gradients_of_a_row_alone():
  x, w = jnp.asarray(X[:1], "bfloat16"), jnp.asarray(W, "bfloat16")
  by_x, by_w = jax.grad(lambda x, w: jnp.sum(einsum("CD,DF->CF", x, w)), argnums=(0, 1))(x, w)
  np.testing.assert_allclose(np.asarray(by_x, "f")[0], np.asarray(w, "f").sum(1), rtol=2e-2, atol=2e-2)
  np.testing.assert_allclose(np.asarray(by_w, "f"), np.repeat(np.asarray(x, "f").T, 10, 1), rtol=2e-2)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other devices multiply a row once")
def test_a_cpu_multiplies_two_rows_of_sixteen_bits_and_one_of_thirty_two():
  for dtype, rows in (("bfloat16", 2), ("float32", 1)):
    text = (
      jax.jit(lambda x, w: einsum("CD,DF->CF", x, w))
      .lower(jnp.asarray(X[:1], dtype), jnp.asarray(W, dtype))
      .as_text()
    )
    (product,) = [line for line in text.splitlines() if "dot_general" in line]
    assert f"tensor<{rows}x24x" in product


def test_a_matrix_of_one_row_as_the_first_operand():
  one = Matrix(jnp.asarray(W[:1], "bfloat16"), "io")
  found = einsum("DF,FV->DV", one, jnp.ones((10, 4), "bfloat16"))
  np.testing.assert_allclose(found, np.asarray(one.value, "f").sum() * np.ones((1, 4)), rtol=1e-2)


@pytest.mark.parametrize("stored", [pytest.param("array", marks=pytest.mark.core), "io", "oi"])
@pytest.mark.parametrize("equation", ["CD,DF->CF", "...D,DF->...F"])
def test_gradients_of_bfloat16_rows_are_those_of_their_numbers(stored, equation):
  """Products of 16-bit numbers summed in float32; what comes to them is rounded first, and they are at the end."""
  rng = np.random.default_rng(1)
  rows = (40, 24) if equation[0] == "C" else (5, 8, 24)
  x, w = jnp.asarray(rng.standard_normal(rows), "bfloat16"), weights(stored, "bfloat16")
  g = jnp.asarray(rng.standard_normal((*rows[:-1], 10)), "float32")
  run = jax.jit(lambda x, w, g: jax.vjp(lambda x, w: einsum(equation, x, w), x, w)[1](g))
  by_x, by_w = run(x, w, g)
  value = by_w.value if isinstance(by_w, Matrix) else by_w
  assert by_x.dtype == value.dtype == jnp.bfloat16
  x, g = (np.asarray(y.astype("bfloat16"), np.float64).reshape(-1, y.shape[-1]) for y in (x, g))
  true = x.T @ g
  np.testing.assert_allclose(
    np.asarray(value, np.float64), true.T if stored == "oi" else true, rtol=2**-8, atol=1e-5
  )
  matrix = np.asarray(jnp.asarray(W, "bfloat16"), np.float64)
  np.testing.assert_allclose(
    np.asarray(by_x, np.float64).reshape(len(x), -1), g @ matrix.T, rtol=2**-8, atol=1e-5
  )


def test_no_product_of_a_bfloat16_gradient_is_wider():
  """Where what comes to it is float32, too, as it does from logits."""
  x, w = jnp.asarray(X, "bfloat16"), jnp.asarray(W, "bfloat16")
  gradient = jax.grad(lambda x, w: jnp.sum(jnp.square(einsum("CD,DF->CF", x, w))), argnums=(0, 1))
  products = [line for line in jax.jit(gradient).lower(x, w).as_text().splitlines() if "dot_general" in line]
  assert len(products) == 3 and all(line.count("bf16>") == 2 for line in products)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_turned_matrix_is_its_transpose(dtype):
  x = jnp.asarray(X, dtype)
  run = jax.jit(lambda x: (turned(x), jnp.dot(turned(x), x, preferred_element_type=jnp.float32)))
  found, product = run(x)
  np.testing.assert_array_equal(found, x.T)
  np.testing.assert_allclose(product, np.asarray(x, "f").T @ np.asarray(x, "f"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stored", ["array", "oi"])
def test_gradients_of_a_large_matrix_in_float32(stored, monkeypatch):
  """On a CPU rows are transposed first for the matrix's; elsewhere, and for small ones, it is JAX's rule."""
  rng = np.random.default_rng(2)
  x, value = (jnp.asarray(rng.standard_normal(shape), "float32") for shape in ((40, 24), (24, 10)))
  g = jnp.asarray(rng.standard_normal((40, 10)), "float32")
  w = value if stored == "array" else Matrix(value.T, "oi")

  def gradients():
    return jax.jit(lambda x, w, g: jax.vjp(lambda x, w: einsum("CD,DF->CF", x, w), x, w)[1](g))(x, w, g)

  expected = gradients()
  monkeypatch.setattr(einsums, "LARGE", 240)
  for found, true in zip(jax.tree.leaves(gradients()), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(found, true, rtol=1e-5, atol=1e-5)
