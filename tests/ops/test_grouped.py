"""Products by groups where a TPU's instruction computes them, NaN in other groups, and the memory of a mixture."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_checks import relative_error

from jaxllm import quant
from jaxllm.activation import Glu
from jaxllm.experts import Moe, SoftmaxRouter
from jaxllm.leaf import Matrix
from jaxllm.ops import call, grouped
from jaxllm.ops.experts import experts

D, F = 12, 20
SIZES = {
  "ragged": (70, 0, 3, 32, 1),  # more than a block, none, less than one, exactly one
  "all in one": (0, 0, 106, 0, 0),
  "one row": (0, 1, 0, 0, 0),
}


def draw(*shape, seed=0):
  return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


@functools.cache
def products(stored, native):
  """(product, gradients of x and w by a cotangent), compiled."""

  def product(x, w, sizes, g):
    held = Matrix(w) if stored == "oi" else w
    out = grouped.grouped_dot(x, held, sizes)
    return jnp.sum(out * g), out

  return jax.jit(jax.value_and_grad(product, (0, 1), has_aux=True))


@pytest.mark.core
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("stored", ["io", "oi"])
@pytest.mark.parametrize("native", [False, True])
def test_products_by_groups(monkeypatch, name, stored, native):
  """And their gradients; in loops, and as the instruction that TPUs have, which XLA expands here."""
  monkeypatch.setattr(grouped, "NATIVE", ("cpu",) if native else ())
  sizes = np.array(SIZES[name], np.int32)
  group = np.repeat(np.arange(len(sizes)), sizes)
  x, w, g = draw(len(group), D), draw(len(sizes), D, F), draw(len(group), F)
  x64, w64, g64 = (a.astype(np.float64) for a in (x, w, g))
  held = w.swapaxes(1, 2).copy() if stored == "oi" else w
  (_, out), (d_x, d_w) = products(stored, native)(x, held, sizes, g)
  d_w = np.swapaxes(d_w, 1, 2) if stored == "oi" else d_w
  assert relative_error(out, np.stack([x64[r] @ w64[e] for r, e in enumerate(group)])) <= 1e-6
  assert relative_error(d_x, np.stack([g64[r] @ w64[e].T for r, e in enumerate(group)])) <= 1e-6
  wanted = np.zeros(w.shape)
  for r, e in enumerate(group):
    wanted[e] += np.outer(x64[r], g64[r])
  assert relative_error(d_w, wanted) <= 1e-6


def test_platforms_with_a_kernel_are_told_by_name(monkeypatch):
  """XLA's instruction is in the program of a TPU, and loops are in that of all else."""
  text = lambda: str(
    jax.make_jaxpr(lambda x, w, s: grouped.grouped_dot(x, w, s))(draw(9, D), draw(2, D, F), np.array([4, 5]))
  )
  for platform, native in (("tpu", True), ("cpu", False), ("cuda", False)):
    monkeypatch.setattr(grouped, "current_device", lambda platform=platform: call.Device(platform))
    assert ("ragged_dot" in text(), "while" in text()) == (native, not native)


def test_a_row_of_another_group_that_is_nan_stays_there():
  """In values and in gradients, though a block reaches into the rows of the next group."""
  sizes, x, w, g = np.array([3, 2], np.int32), draw(5, D), draw(2, D, F), draw(5, F)
  spoiled = x.copy()
  spoiled[3:] = np.nan
  call = products("io", False)
  (_, clean), (d_x, d_w) = call(x, w, sizes, g)
  (_, out), (e_x, e_w) = call(spoiled, w, sizes, g)
  np.testing.assert_array_equal(out[:3], clean[:3])
  np.testing.assert_array_equal(e_x, d_x)  # it is of w and g alone
  np.testing.assert_array_equal(e_w[0], d_w[0])
  assert np.isnan(out[3:]).all() and np.isnan(e_w[1]).all()


def quantized(groups, name):
  scheme = quant.SCHEMES[name]()
  return quant.QTensor(jax.jit(scheme.quantize)(draw(groups, D, F)), scheme)


@pytest.mark.core
def test_the_rows_of_a_group_do_not_depend_on_those_of_another():
  """Of LLM.int8, whose outliers are features of all rows that are multiplied at once: within a group they are."""
  x, sizes, w = draw(4, D), np.array([1, 3], np.int32), quantized(2, "llm_int8")
  run = jax.jit(grouped.grouped_dot)
  clean, spoiled = run(x, w, sizes), x.copy()
  spoiled[1:, 5] = 50
  np.testing.assert_array_equal(run(spoiled, w, sizes)[0], clean[0])
  in_one = np.array([4, 0], np.int32)
  assert np.abs(run(spoiled, w, in_one) - run(x, w, in_one))[0].max() > 1e-3


def test_blocks_of_quantized_groups_are_as_large_as_two_even_shares_of_rows(monkeypatch):
  """On a CPU, and 32 at most: eight rows of 32 groups are so multiplied one by one.  Elsewhere they are 128, or all rows."""
  seen = []
  own = grouped.product
  monkeypatch.setattr(grouped, "product", lambda x, w: seen.append(len(x)) or own(x, w))
  for platform, blocks in (("cpu", [1, 4, 32]), ("cuda", [8, 64, 128])):
    monkeypatch.setattr(grouped, "current_device", lambda platform=platform: call.Device(platform))
    seen.clear()
    for rows, groups in ((8, 32), (64, 32), (4096, 4)):
      w, sizes = quantized(groups, "int8"), jax.ShapeDtypeStruct((groups,), jnp.int32)
      jax.eval_shape(lambda x, s, w=w: grouped.grouped_dot(x, w, s), draw(rows, D), sizes)
    assert list(dict.fromkeys(seen)) == blocks


def test_memory_does_not_grow_with_tokens_times_experts_times_width():
  """Of 8192 tokens to 2 of 64 experts: the forward and the backward pass take a few times what their rows take."""
  tokens, width, hidden, E = 8192, 64, 96, 64
  moe = Moe(Glu(), E, 2)
  route, shape = lambda logits: moe.router(logits, moe.top_k), lambda *n: jax.ShapeDtypeStruct(n, jnp.float32)
  p = {"router": {"w": shape(width, E)}, "down": {"w": shape(E, hidden, width)}}
  p |= {name: {"w": shape(E, width, hidden)} for name in ("gate", "up")}
  loss = lambda x, p: jnp.sum(experts(x, p, route, lambda *inputs: moe.expert({}, *inputs)) ** 2)
  compiled = jax.jit(jax.grad(loss, (0, 1))).lower(shape(tokens, width), p).compile()
  rows = 4 * tokens * moe.top_k * (width + hidden)
  gradients = sum(4 * leaf.size for leaf in jax.tree.leaves(p))
  assert compiled.memory_analysis().temp_size_in_bytes <= 8 * rows + 2 * gradients < 4 * tokens * E * width


def test_choices_are_those_of_torch():
  """Where logits differ, infinite ones among them."""
  torch = pytest.importorskip("torch")
  logits = draw(40, 16)
  logits[3, 5], logits[4, 2] = np.inf, -np.inf
  for k in (1, 4, 16):
    index = SoftmaxRouter()(jnp.asarray(logits), k)[1]
    np.testing.assert_array_equal(index, torch.topk(torch.tensor(logits), k).indices)
