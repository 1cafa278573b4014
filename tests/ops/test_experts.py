"""Products by groups, routing, and mixtures of experts, beside float64 loops over tokens and experts."""

import functools

import components
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_checks import relative_error

from jaxllm.activation import ClampedGlu, Glu, Mlp
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
MIXTURES = {
  "renormalised": Moe(Glu(), 5, 2),
  "of all": Moe(Mlp("gelu"), 7, 3, SoftmaxRouter(False)),
  "clamped": Moe(ClampedGlu(limit=0.4), 4, 4),
  "one": Moe(Glu(), 3, 1, SoftmaxRouter(False)),
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


def parameters(moe, seed=0, biased=True):
  """{router, gate, up, down}: w and bias."""
  E = moe.num_experts
  shapes = {"router": (D, E)} | dict.fromkeys(moe.expert.inputs, (E, D, F)) | {"down": (E, F, D)}
  p = {name: {"w": draw(*shape, seed=seed) * shape[-2] ** -0.5} for name, shape in shapes.items()}
  if biased:
    for part in p.values():
      part["bias"] = 0.5 * draw(*part["w"].shape[:-2], part["w"].shape[-1], seed=seed + 1)
  return p


@functools.cache
def mixture(moe):
  """experts(x, p) of a value, compiled."""
  route = lambda logits: moe.router(logits, moe.top_k)
  return jax.jit(lambda x, p: experts(x, p, route, lambda *inputs: moe.expert({}, *inputs)))


def truth(moe, x, p):
  """The same by loops in float64."""
  p = oracle.float64(p)
  nested = {"router": p["router"], "experts": {name: part for name, part in p.items() if name != "router"}}
  return oracle.mixture(moe, nested, x.astype(np.float64))


@pytest.mark.core
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures(name, biased):
  moe, x = MIXTURES[name], draw(45, D)
  p = parameters(moe, biased=biased)
  error = relative_error(mixture(moe)(x, p), truth(moe, x, p))
  assert error <= 2e-6
  components.measured(moe, "float64", error)


@pytest.mark.parametrize("name", MIXTURES)
def test_gradients_of_mixtures(name):
  """Those of all parameters, the router's among them, along two directions, by differences of the float64 loops."""
  moe, x, c = MIXTURES[name], draw(45, D), draw(45, D, seed=3)
  p = parameters(moe)
  loss = lambda x, p: jnp.sum(c * mixture(moe)(x, p))
  d_x, d_p = jax.grad(loss, (0, 1))(x, p)
  assert np.abs(d_p["router"]["w"]).max() > (0.01 if moe.top_k > 1 or not moe.router.renormalize else -1)
  leaves, structure = jax.tree.flatten((x, p))
  step = 1e-5
  for seed in (5, 6):
    ways = [draw(*leaf.shape, seed=seed).astype(np.float64) for leaf in leaves]

    def at(side, ways=ways):
      moved = [leaf.astype(np.float64) + side * step * way for leaf, way in zip(leaves, ways, strict=True)]
      return np.sum(c * truth(moe, *jax.tree.unflatten(structure, moved)))

    found = sum(
      np.sum(np.asarray(g, np.float64) * way)
      for g, way in zip(jax.tree.leaves((d_x, d_p)), ways, strict=True)
    )
    np.testing.assert_allclose(found, (at(1) - at(-1)) / (2 * step), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", MIXTURES)
def test_the_order_of_experts_is_nothing(name):
  moe, x, p = MIXTURES[name], draw(45, D), parameters(MIXTURES[name])
  order = np.random.default_rng(2).permutation(moe.num_experts)
  router = {"w": p["router"]["w"][:, order], "bias": p["router"]["bias"][order]}
  turned = {"router": router} | {
    part: {kind: w[order] for kind, w in p[part].items()} for part in p if part != "router"
  }
  assert relative_error(mixture(moe)(x, turned), mixture(moe)(x, p)) <= 1e-6


def test_a_token_does_not_depend_on_the_others():
  """Bit for bit, wherever among the tokens of its expert it is, and whatever these are; NaN too."""
  moe = MIXTURES["renormalised"]
  x, p = draw(200, D), parameters(moe)
  alone = np.asarray(mixture(moe)(x, p))
  order = np.random.default_rng(4).permutation(200)
  np.testing.assert_array_equal(mixture(moe)(x[order], p), alone[order])
  others = x.copy()
  others[100:] = 50 * draw(100, D, seed=9)
  others[150] = np.nan
  np.testing.assert_array_equal(mixture(moe)(others, p)[:100], alone[:100])


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


@pytest.mark.parametrize("renormalize", [True, False])
@given(seed=st.integers(0, 10**6), experts=st.integers(1, 9), data=st.data())
@settings(max_examples=15, deadline=None)
def test_routing(renormalize, seed, experts, data):
  """The largest logits, in order; weights as of a softmax of all; counts that add up."""
  k = data.draw(st.integers(1, experts))
  logits = 3 * draw(17, experts, seed=seed)
  weights, index = SoftmaxRouter(renormalize)(jnp.asarray(logits), k)
  for row, found in enumerate(zip(np.asarray(index), np.asarray(weights), strict=True)):
    wanted = oracle.chosen(Moe(Glu(), experts, k, SoftmaxRouter(renormalize)), logits[row].astype(np.float64))
    np.testing.assert_array_equal(found[0], [e for e, _ in wanted])
    np.testing.assert_allclose(found[1], [w for _, w in wanted], rtol=2e-6)
  total = np.asarray(weights, np.float64).sum(-1)
  assert (np.abs(total - 1) <= 1e-6).all() if renormalize or k == experts else (total < 1).all()
  order, inverse, sizes = grouped.group(index.reshape(-1), experts)
  np.testing.assert_array_equal(sizes, np.bincount(np.ravel(index), minlength=experts))
  np.testing.assert_array_equal(np.ravel(index)[order], np.sort(np.ravel(index)))
  np.testing.assert_array_equal(np.asarray(order)[inverse], np.arange(17 * k))


def test_choices_are_those_of_torch():
  """Where logits differ, infinite ones among them."""
  torch = pytest.importorskip("torch")
  logits = draw(40, 16)
  logits[3, 5], logits[4, 2] = np.inf, -np.inf
  for k in (1, 4, 16):
    index = SoftmaxRouter()(jnp.asarray(logits), k)[1]
    np.testing.assert_array_equal(index, torch.topk(torch.tensor(logits), k).indices)


def test_of_equal_logits_the_first_come_first():
  np.testing.assert_array_equal(SoftmaxRouter()(jnp.zeros((1, 6)), 3)[1], [[0, 1, 2]])
