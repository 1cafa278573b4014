"""Products of weights: a single row, which a CPU multiplies twice, is that of many rows, in both layouts and in gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.leaf import Matrix
from jaxllm.ops.einsum import einsum

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
