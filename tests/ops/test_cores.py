"""Blockwise attention against the plain core, forward and gradient, under every mask."""

import functools

import components
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import TRAINED, position
from model_checks import relative_error

from jaxllm.config import ModelConfig
from jaxllm.ops.attention import Plain, Side, allowed
from jaxllm.ops.blockwise import Blockwise
from jaxllm.ops.choose import Auto
from jaxllm.position.base import add_bias, inner_products
from jaxllm.position.tables import make_table

B, T, N, K, H = 2, 20, 4, 2, 16
# keys turned before, a bias, and scores of their own; streaming masks by score, xpos counts from each tile
METHODS = ["rope", "alibi", "dynamic_ntk", "rerope", "streaming", "xpos"]


@functools.cache
def program(name, core):
  """jit of (output, its gradient) of a core under a method; the window and all masks are data."""
  method = position(name)

  def run(qkv, cotangent, q_side, k_side, window, table):
    q, k, v = qkv
    score = lambda q, k, q_pos, k_pos: method.scores(q, k, q_pos, k_pos, table, {})
    if not method.needs_raw_keys:
      q, k = method.rotate_q(q, q_side.pos, table), method.rotate_k(k, k_side.pos, table)
      score = lambda q, k, q_pos, k_pos: add_bias(
        inner_products(q, k), method.bias({}, q_pos, k_pos, N, q.shape[-1])
      )
    out = core(q, k, v, q_side, k_side, window, score)
    return jnp.sum(out * cotangent), out

  return jax.jit(jax.value_and_grad(run, has_aux=True))


def table(name):
  method = position(name)
  if method.frequencies(H) is None:
    return None
  start, rows = method.rows(H, TRAINED + T)
  return make_table(rows, start)


@functools.cache
def arrays():
  """(q, k, v), and a direction to differentiate the output in."""
  rng = np.random.default_rng(0)
  draw = lambda n: rng.standard_normal((B, T, n, H)).astype(np.float32)
  return (draw(N), draw(K), draw(K)), draw(N)


INDEX = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
ONE = np.zeros((B, T), np.int32)
PACKED = np.broadcast_to(np.repeat(np.arange(3, dtype=np.int32), [6, 9, 5]), (B, T))
ALL = np.ones((B, T), bool)
PADDED = np.array([[T], [13]]) > INDEX
NONE_IN_ROW_1 = np.array([[T - 2], [0]]) > INDEX
ALONE = np.where(INDEX >= 17, 7, 0).astype(np.int32)  # queries of a segment that no key is in


def masks():
  """(id, queries, keys, window) of every mask; all have the same structure, so they share a program."""
  side = lambda segment, valid: Side(INDEX, INDEX, segment, valid)
  for window in (T, 5):
    yield f"causal-{window}", side(ONE, ALL), side(ONE, ALL), window
    yield f"packed-{window}", side(PACKED, ALL), side(PACKED, ALL), window
    yield f"padded-{window}", side(ONE, PADDED), side(ONE, PADDED), window
    yield f"packed and padded-{window}", side(PACKED, PADDED), side(PACKED, PADDED), window
    yield f"no key at all-{window}", side(ONE, NONE_IN_ROW_1), side(ONE, NONE_IN_ROW_1), window
    yield f"queries alone-{window}", side(ALONE, ALL), side(ONE, ALL), window


def attend(name, core, queries, keys, window):
  """(output, gradients of q, k and v)"""
  qkv, cotangent = arrays()
  (_, out), gradients = program(name, core)(qkv, cotangent, queries, keys, np.int32(window), table(name))
  return np.asarray(out), [np.asarray(g) for g in gradients]


CASES = [*((name, (6, 7)) for name in METHODS), ("alibi", (4, 5))]  # tiles that do not divide, and that do


@pytest.mark.parametrize(
  ("name", "tiles"), [pytest.param(*case, marks=[pytest.mark.core] * (case[0] == "rope")) for case in CASES]
)
def test_blockwise_is_plain(name, tiles):
  for mask, queries, keys, window in masks():
    out, gradients = attend(name, Blockwise(*tiles), queries, keys, window)
    true_out, true_gradients = attend(name, Plain(), queries, keys, window)
    assert relative_error(out, true_out) <= 1e-5, mask
    for found, expected in zip(gradients, true_gradients, strict=True):
      assert relative_error(found, expected) <= 1e-5, mask


@pytest.mark.parametrize("core", [Plain(), Blockwise(6, 7)], ids=["plain", "blockwise"])
@pytest.mark.parametrize("name", METHODS)
def test_queries_without_a_key(name, core):
  """Their output is exactly 0, and so is the gradient of them; all other gradients are finite."""
  seen = 0
  for mask, queries, keys, window in masks():
    out, gradients = attend(name, core, queries, keys, window)
    empty = ~np.asarray(allowed(queries, keys, window)).any(-1)
    seen += empty.sum()
    assert not out[empty].any() and not gradients[0][empty].any(), mask
    assert out[~empty].any(-1).all(), mask
    assert all(np.isfinite(g).all() for g in gradients), mask
  assert (
    seen == 2 * T + 2 * 6 + 3 + 2 * 5
  )  # row 1; queries alone; past the last key of a row by its window or segment


@pytest.mark.parametrize("core", [Plain(), Blockwise(6, 7)], ids=["plain", "blockwise"])
def test_weights_of_a_window(core):
  """With keys as values 1, 2, 4, ... the output of uniform attention spells which keys were seen."""
  side = Side(INDEX[:1], INDEX[:1])
  v = np.eye(T, dtype=np.float32)[None, :, None]
  q = np.zeros((1, T, 1, T), np.float32)
  score = lambda q, k, *_: inner_products(q, k)
  run = jax.jit(lambda window: core(q, q, v, side, side, window, score)[0, :, 0])
  for window in (1, 4, T):
    weights, count = np.asarray(run(window)), np.minimum(window, np.arange(T) + 1)
    np.testing.assert_array_equal((weights > 0).sum(-1), count)
    np.testing.assert_allclose(weights.max(-1), 1 / count, rtol=1e-6)


def test_the_core_does_not_change_the_model_in_bfloat16():
  """bfloat16 operands, float32 sums: both cores round the same way but for the weights (2^-9 each)."""
  (q, k, v), _ = arrays()
  side = Side(INDEX, INDEX)
  low = [jnp.asarray(x, jnp.bfloat16) for x in (q / 4, k, v)]
  score = lambda q, k, *_: inner_products(q, k)
  run = lambda core: jax.jit(lambda q, k, v: core(q, k, v, side, side, None, score))(*low)
  plain, blockwise = run(Plain()), run(Blockwise(6, 7))
  assert plain.dtype == blockwise.dtype == jnp.bfloat16
  assert relative_error(blockwise.astype(np.float32), plain.astype(np.float32)) <= 2**-7


@pytest.mark.parametrize("tiles", [(4, 512), (512, 4)])
def test_gradients_of_bfloat16_are_added_up_over_tiles_in_float32(tiles):
  """Over 128 tiles: in bfloat16 those of keys, or of queries, are 0.008 off."""
  rng, length = np.random.default_rng(0), 512
  draw = lambda heads: jnp.asarray(rng.standard_normal((1, length, heads, 8)), jnp.bfloat16)
  args = (draw(N) / 3, draw(K), draw(K) + 0.3, jnp.zeros(N, jnp.bfloat16))
  cotangent, at = draw(N) + 0.3, jnp.arange(length, dtype=jnp.int32)[None]
  score, side = lambda q, k, *_: inner_products(q, k), Side(at, at, in_order=True)

  def gradient(core, dtype):
    cast = [x.astype(dtype) for x in args]
    run = lambda q, k, v, sinks: core(q, k, v, side, side, None, score, sinks)
    return jax.jit(lambda *x: jax.vjp(run, *x)[1](cotangent.astype(dtype)))(*cast)

  found, expected = gradient(Blockwise(*tiles), jnp.bfloat16), gradient(Plain(), jnp.float32)
  for x, truth in zip(found, expected, strict=True):
    error = np.linalg.norm(x.astype(jnp.float32) - truth) / np.linalg.norm(truth)
    assert x.dtype == jnp.bfloat16 and error <= 0.004, (error, x.shape)


@pytest.mark.parametrize("name", ["alibi", "rerope"])
def test_with_64_bit_types_on(name):
  """JAX_ENABLE_X64 changes what jnp makes by default, and nothing of the result."""
  qkv, cotangent = arrays()
  side = Side(INDEX, INDEX + TRAINED)
  run = lambda: program.__wrapped__(name, Blockwise(6, 7))(qkv, cotangent, side, side, None, table(name))[0][
    1
  ]
  expected = run()
  jax.config.update("jax_enable_x64", True)
  try:
    found = run()
  finally:
    jax.config.update("jax_enable_x64", False)
  assert found.dtype == expected.dtype == jnp.float32
  assert relative_error(found, expected) <= 1e-6


def test_config_values():
  for field in ("q_block", "k_block"):
    for bad in (0, -1, 2.5, "8"):
      with pytest.raises(
        ValueError, match=f"Blockwise.{field}: found {bad!r}, expected an integer of at least 1"
      ):
        Blockwise(**{field: bad})
  assert ModelConfig.__dataclass_fields__["attention"].default == Auto()


CORES = {"plain": Plain(), "blockwise": Blockwise(8, 6), "auto": Auto()}


@pytest.mark.parametrize("name", CORES)
def test_sinks_and_a_prefix_are_what_numpy_says(name):
  """A sink is a key that all queries see and whose value is 0; a prefix is seen by all queries."""
  (q, k, v), cotangent = arrays()
  sinks, prefix = np.array([-1.0, 0.0, 2.0, 30.0], np.float32), np.array([[6], [0]])
  queries = Side(INDEX, INDEX, prefix=np.broadcast_to(prefix, (B, T)))
  score = lambda q, k, *_: inner_products(q, k)

  def run(qkv, sinks):
    out = CORES[name](*qkv, queries, Side(INDEX, INDEX), 9, score, sinks)
    return jnp.sum(out * cotangent), out

  (_, out), (gradient, _) = jax.jit(jax.value_and_grad(run, argnums=(1, 0), has_aux=True))((q, k, v), sinks)
  seen = (INDEX[:, :, None] >= INDEX[:, None]) | (INDEX[:, None] < prefix[..., None])
  seen &= INDEX[:, :, None] - INDEX[:, None] < 9
  truth, slope = np.zeros((B, T, N, H)), np.zeros(N)
  for b in range(B):
    for n in range(N):
      s = q[b, :, n].astype(np.float64) @ k[b, :, n // (N // K)].T
      weights = np.where(seen[b], np.exp(s), 0)
      total = weights.sum(-1) + np.exp(np.float64(sinks[n]))
      truth[b, :, n] = weights / total[:, None] @ v[b, :, n // (N // K)]
      # d out / d sink = -out * e^sink / total
      slope[n] -= np.sum(
        truth[b, :, n] * cotangent[b, :, n] * (np.exp(np.float64(sinks[n])) / total)[:, None]
      )
  error = relative_error(out, truth)
  assert error <= 2e-6
  components.measured([name, "attention_sinks"], "float64", error)
  assert relative_error(gradient, slope) <= 1e-5
