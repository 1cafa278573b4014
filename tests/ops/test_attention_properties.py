"""Laws of masks, the masked softmax and attention for any mask and value; one shape, and programs a core."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from properties import LAST, examples, numbers

from jaxllm.ops.attention import Plain, Side, allowed, masked_softmax
from jaxllm.ops.blockwise import Blockwise
from jaxllm.position.base import inner_products

B, T, N, H = 2, 7, 4, 4
CORES = {"plain": Plain(), "blockwise": Blockwise(3, 2)}
each_core = pytest.mark.parametrize("core", CORES)
INDEX = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
booleans = hnp.arrays(np.bool_, (B, T))
integers = lambda last: hnp.arrays(np.int32, (B, T), elements=st.integers(0, last))


@st.composite
def masks(draw):
  """(queries, keys, window): any segments on either side, any unused keys, any prefix, any window."""
  prefix = np.broadcast_to(draw(integers(T))[:, :1], (B, T))
  queries = Side(INDEX, INDEX, draw(integers(2)), None, None, prefix)
  return queries, Side(INDEX, INDEX, draw(integers(2)), draw(booleans)), np.int32(draw(st.integers(1, T + 1)))


@functools.partial(jax.jit, static_argnums=0)
def attend(core, q, k, v, queries, keys, window):
  """(output, gradients of q, k and v of the sum of its squares)."""

  def run(qkv):
    out = CORES[core](*qkv, queries, keys, window, lambda q, k, *_: inner_products(q, k))
    return jnp.sum(out**2), out

  gradients, out = jax.grad(run, has_aux=True)((q, k, v))
  return out, gradients


def seen(queries, keys, window):
  """The mask written out, an entry at a time."""
  mask = np.zeros((B, T, T), bool)
  for b, t, s in np.ndindex(mask.shape):
    mask[b, t, s] = (
      (s <= t or s < queries.prefix[b, t])
      and t - s < window
      and queries.segment[b, t] == keys.segment[b, s]
      and keys.valid[b, s]
    )
  return mask


def attention64(q, k, v, mask):
  """Softmax attention in float64, a head at a time; 0 for a query without a key."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  k, v = (np.repeat(x, N // x.shape[2], axis=2) for x in (k, v))
  scores = np.where(mask[:, None], np.einsum("btnh,bsnh->bnts", q, k), -np.inf)
  exp = np.exp(scores - np.max(scores, axis=-1, keepdims=True, initial=-1e6))
  total = exp.sum(-1, keepdims=True)
  return np.einsum("bnts,bsnh->btnh", exp / np.where(total > 0, total, 1), v)


qkv = st.tuples(numbers((B, T, N, H), 8.0), numbers((B, T, 2, H), 8.0), numbers((B, T, 2, H), 8.0))


@each_core
@given(qkv, masks())
@examples(40)
def test_any_mask(core, qkv, mask):
  """What it says is seen and nothing else; a query without a key gives exactly 0, and all gradients are finite."""
  out, gradients = map(jax.device_get, attend(core, *qkv, *mask))
  expected = seen(*mask)
  np.testing.assert_array_equal(np.broadcast_to(allowed(*mask), expected.shape), expected)
  # scores of up to 4 * 64 are held to 256 * 6e-8 * a few terms
  np.testing.assert_allclose(out, attention64(*qkv, expected), rtol=0, atol=1e-3)
  empty = ~expected.any(-1)
  assert not out[empty].any() and not gradients[0][empty].any()
  assert all(np.isfinite(g).all() for g in gradients)
  unseen = ~expected.any(1)
  assert not gradients[1][unseen].any() and not gradients[2][unseen].any()


@each_core
@given(masks(), st.integers(0, 2**32 - 1), st.sampled_from([1, 2]))
@examples(40)
def test_grouped_heads_are_repeated_heads(core, mask, seed, kv_heads):
  rng = np.random.default_rng(seed)
  q, k, v = (rng.standard_normal((B, T, n, H)).astype(np.float32) for n in (N, kv_heads, kv_heads))
  out, _ = attend(core, q, k, v, *mask)
  repeated, _ = attend(core, q, *(np.repeat(x, N // kv_heads, axis=2) for x in (k, v)), *mask)
  np.testing.assert_allclose(out, repeated, rtol=0, atol=1e-6)


@each_core
@given(masks(), st.integers(0, 2**32 - 1), numbers((H,), 8.0))
@examples(30)
def test_weights_sum_to_one(core, mask, seed, value):
  """Equal values come back as they are wherever a key is seen."""
  rng = np.random.default_rng(seed)
  q, k = (3 * rng.standard_normal((B, T, n, H)).astype(np.float32) for n in (N, 2))
  out = np.asarray(attend(core, q, k, np.broadcast_to(value, (B, T, 2, H)), *mask)[0])
  expected = np.where(seen(*mask).any(-1)[..., None, None], value, 0)
  np.testing.assert_allclose(out, np.broadcast_to(expected, out.shape), rtol=2e-6, atol=1e-30)


softmax = jax.jit(masked_softmax)
slope = jax.jit(lambda scores, mask, g: jax.vjp(lambda s: masked_softmax(s, mask), scores)[1](g)[0])


@given(
  hnp.arrays(np.float32, (4, 9), elements=st.floats(width=32)),
  hnp.arrays(np.bool_, (4, 9)),
  numbers((4, 9), 8.0),
)
@examples(100)
def test_rows_of_the_masked_softmax_sum_to_one_or_are_zero(scores, mask, cotangent):
  """Whatever stands behind the mask, NaN and infinity included; the gradient of a row sums to 0."""
  scores = np.where(mask, np.clip(np.nan_to_num(scores), -1e4, 1e4), scores)
  probs, gradient = np.asarray(softmax(scores, mask)), np.asarray(slope(scores, mask, cotangent))
  np.testing.assert_allclose(probs.sum(-1, dtype=np.float64), mask.any(-1), rtol=1e-6)
  assert not probs[~mask].any() and not gradient[~mask].any() and np.all(probs >= 0)
  assert np.isfinite(gradient).all()
  np.testing.assert_allclose(gradient.sum(-1, dtype=np.float64), 0, rtol=0, atol=8e-6)


@given(numbers((4, 9), 50.0), hnp.arrays(np.bool_, (4, 9)), st.integers(-(2**14), 2**14))
@examples(40)
def test_a_constant_added_to_a_row_changes_nothing(scores, mask, constant):
  scores = np.round(scores * 64).astype(np.float32) / 64  # sums of these are exact
  np.testing.assert_array_equal(softmax(scores + np.float32(constant), mask), softmax(scores, mask))


window_of = jax.jit(lambda index, window: allowed(Side(index, index), Side(index, index), window))


@given(st.integers(0, LAST - 16), st.integers(1, LAST))
@examples(100)
def test_a_window_sees_exactly_its_width(first, width):
  """min(width, t + 1) keys of a text that begins at `first`, the nearest ones."""
  index = np.arange(first, first + 16, dtype=np.int64).astype(np.int32)[None]
  found = np.asarray(window_of(index, np.int32(width)))[0]
  for t, row in enumerate(found):
    keys = np.flatnonzero(row)
    assert len(keys) == min(width, t + 1)
    np.testing.assert_array_equal(keys, np.arange(t + 1 - len(keys), t + 1))
