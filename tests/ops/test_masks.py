"""Masks and the masked softmax: exact counts, exact zeros, gradients that are finite and right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxllm.ops.attention import Side, allowed, masked_softmax, zero_unused

T = 12
INDEX = np.arange(T, dtype=np.int32)[None]


def random_mask(rng, rows=64, keys=9):
  """Masks of every density, the first row empty and the second full."""
  mask = rng.random((rows, keys)) < rng.random((rows, 1))
  mask[0], mask[1] = False, True
  return mask


def softmax64(scores, mask):
  scores = np.where(mask, scores, -np.inf)
  exp = np.exp(scores - np.max(scores, axis=-1, keepdims=True, initial=-1e6))
  total = exp.sum(-1, keepdims=True)
  return np.divide(exp, total, out=np.zeros_like(exp), where=total > 0)


@pytest.mark.core
def test_masked_softmax_and_its_gradient():
  rng = np.random.default_rng(0)
  mask = random_mask(rng)
  scores, cotangent = 30 * rng.standard_normal((2, *mask.shape))
  probs = softmax64(scores, mask)
  found, vjp = jax.vjp(lambda s: masked_softmax(s, jnp.asarray(mask)), jnp.asarray(scores, jnp.float32))
  np.testing.assert_allclose(found, probs, rtol=0, atol=1e-5)  # scores of 100 are held to 4e-6 in float32
  assert not np.any(np.asarray(found)[~mask])
  gradient = probs * (cotangent - np.sum(probs * cotangent, -1, keepdims=True))
  (found,) = vjp(jnp.asarray(cotangent, jnp.float32))
  np.testing.assert_allclose(found, gradient, rtol=0, atol=2e-5)
  assert not np.any(np.asarray(found)[~mask])


def test_masked_softmax_has_right_derivatives_of_two_orders():
  rng = np.random.default_rng(1)
  mask = jnp.asarray(random_mask(rng, rows=6, keys=5))
  scores = jnp.asarray(rng.standard_normal(mask.shape), jnp.float32)
  check_grads(
    jax.jit(lambda s: masked_softmax(s, mask)), (scores,), order=2, modes=("fwd", "rev"), atol=2e-3, rtol=2e-3
  )


def test_what_is_masked_does_not_matter():
  """NaN and infinity behind the mask reach neither the result nor its gradient."""
  rng = np.random.default_rng(2)
  mask = random_mask(rng)
  scores = rng.standard_normal(mask.shape).astype(np.float32)
  with_gradient = jax.jit(jax.value_and_grad(lambda s: jnp.sum(masked_softmax(s, jnp.asarray(mask)) ** 2)))
  clean = with_gradient(scores)
  for bad in (np.nan, np.inf, -np.inf, 3e38):
    for found, expected in zip(
      with_gradient(np.where(mask, scores, bad).astype(np.float32)), clean, strict=True
    ):
      np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("window", [1, 2, 5, T, T + 1, None])
def test_a_window_allows_exactly_its_width(window):
  mask = np.asarray(allowed(Side(INDEX, INDEX), Side(INDEX, INDEX), window))[0]
  distance = INDEX[0][:, None] - INDEX[0]
  np.testing.assert_array_equal(mask, (distance >= 0) & (distance < (window or T)))
  np.testing.assert_array_equal(mask.sum(-1), np.minimum(window or T, INDEX[0] + 1))


def test_masks_see_order_and_not_position():
  other = Side(INDEX, np.zeros_like(INDEX))
  np.testing.assert_array_equal(allowed(other, other, 3), allowed(Side(INDEX, INDEX), Side(INDEX, INDEX), 3))


@pytest.mark.core
def test_the_mask_of_the_published_prompt():
  """ChatGLM-6B's of [5, 74874, 130001 (gmask), 130004 (bos)]: the context sees itself, only the last row the last column."""
  order = np.arange(4, dtype=np.int32)[None]
  side = Side(order, order, prefix=np.full((1, 4), 3, np.int32))
  blocked = ~np.asarray(allowed(side, side, None))[0]
  np.testing.assert_array_equal(blocked, [[0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]])


def test_segments_and_unused_slots():
  segment = np.array([[0] * 5 + [1] * 7], np.int32)
  valid = np.arange(T)[None] != 6
  side = Side(INDEX, INDEX, segment, valid)
  mask = np.asarray(allowed(side, side, None))[0]
  same = segment[0][:, None] == segment[0]
  np.testing.assert_array_equal(mask, np.tri(T, dtype=bool) & same & valid)


def test_zero_unused_keeps_what_is_used():
  x = np.random.default_rng(0).standard_normal((2, T, 1, 3)).astype(np.float32)
  valid = np.arange(T)[None] < np.array([[5], [0]])
  out = np.asarray(zero_unused(jnp.asarray(np.where(valid[:, :, None, None], x, np.nan)), jnp.asarray(valid)))
  np.testing.assert_array_equal(out, np.where(valid[:, :, None, None], x, 0))
