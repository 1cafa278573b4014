"""Gradients through products with quantized weights: those of the weight that is held, and no floats of it are kept."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import quant
from jaxllm.ops import quantized
from jaxllm.ops.einsum import einsum

W = np.random.default_rng(0).standard_normal((256, 512)).astype(np.float32)
ROWS = [1, 8, 40]


def held(name):
  scheme = quant.SCHEMES[name]()
  return quant.QTensor(jax.jit(scheme.quantize)(jnp.asarray(W)), scheme)


def case(rows, dtype="float32"):
  """(x, g, the sum of g x w as a function of x and w)."""
  x, g = (
    np.random.default_rng(i).standard_normal((rows, n)).astype(np.float32) for i, n in ((1, 256), (2, 512))
  )
  return jnp.asarray(x, dtype), g, lambda x, w: jnp.sum(einsum("CD,DF->CF", x, w) * g)


@pytest.mark.core
@pytest.mark.parametrize("rows", [1, pytest.param(8, marks=pytest.mark.slow), 40])
@pytest.mark.parametrize("name", quant.SCHEMES)
def test_the_gradient_of_rows_is_that_of_the_weight_that_is_held(name, rows):
  """g w^T; schemes that round rows have no other, whose derivative is 0 almost everywhere."""
  w, (x, g, loss) = held(name), case(rows)
  expected = g.astype(np.float64) @ np.asarray(quant.dequantize(w), np.float64).T
  found = jax.jit(jax.grad(loss))(x, w)
  assert np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max()


def test_the_gradient_has_the_type_of_the_rows():
  w, (x, g, loss) = held("int8"), case(3, "bfloat16")
  found = jax.grad(loss)(x, w)
  expected = g @ np.asarray(quant.dequantize(w)).T
  assert found.dtype == jnp.bfloat16 and np.abs(found - expected).max() <= 2**-8 * np.abs(expected).max()


@pytest.mark.parametrize("rows", ROWS)
def test_no_floats_of_a_weight_are_kept_for_the_backward_pass_or_made_in_it(monkeypatch, rows):
  monkeypatch.setattr(quantized, "TILE", 64)
  w, (x, _, loss) = held("int8"), case(rows)
  kept = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(lambda x: loss(x, w), x)[1], x))
  assert max(leaf.size for leaf in kept if leaf.dtype == jnp.float32) <= 40 * 512
  assert any(leaf.dtype == jnp.int8 for leaf in kept)

  def floats(w):
    """The arrays of floats of the weight's shape; what is inside of a fusion has no memory."""
    text = jax.jit(jax.grad(loss)).lower(x, w).compile().as_text()
    outside = [part for part in text.split("\n\n") if not part.startswith("%fused_computation")]
    return re.findall(r"(?:f32|bf16)\[(?:256,512|512,256)\]", "\n".join(outside))

  assert floats(w) == [] and floats(W)  # the search finds floats
