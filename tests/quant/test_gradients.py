"""Gradients through products with quantized weights: those of the weight that is held, and no floats of it are kept."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import MODELS
from model_cases import params as params_of

from jaxllm import quant, tree
from jaxllm.nn import Transformer
from jaxllm.ops import quantized
from jaxllm.ops.einsum import einsum
from jaxllm.ops.grouped import grouped_dot
from jaxllm.train import lora

W = np.random.default_rng(0).standard_normal((256, 1544)).astype(np.float32)
ROWS = [1, 8, 40]


def held(name, columns=512):
  scheme = quant.SCHEMES[name]()
  return quant.QTensor(jax.jit(scheme.quantize)(jnp.asarray(W[:, :columns])), scheme)


def case(rows, dtype="float32", columns=512):
  """(x, g, the sum of g x w as a function of x and w)."""
  x, g = (
    np.random.default_rng(i).standard_normal((rows, n)).astype(np.float32)
    for i, n in ((1, 256), (2, columns))
  )
  return jnp.asarray(x, dtype), g, lambda x, w: jnp.sum(einsum("CD,DF->CF", x, w) * g)


on_a_cpu = pytest.mark.skipif(
  jax.default_backend() != "cpu", reason="products are in pieces on a CPU, elsewhere XLA decides"
)


@pytest.mark.core
@pytest.mark.parametrize("rows", [1, pytest.param(8, marks=pytest.mark.slow), 40])
@pytest.mark.parametrize("name", quant.SCHEMES)
def test_the_gradient_of_rows_is_that_of_the_weight_that_is_held(name, rows):
  """g w^T; schemes that round rows have no other, whose derivative is 0 almost everywhere.  A width that leaves a rest."""
  columns = 1544 if name.startswith(("int4", "int3")) else 1543
  w, (x, g, loss) = held(name, columns), case(rows, columns=columns)
  expected = g.astype(np.float64) @ np.asarray(quant.dequantize(w), np.float64).T
  found = jax.jit(jax.grad(loss))(x, w)
  assert np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max()


def test_the_gradient_has_the_type_of_the_rows():
  w, (x, g, loss) = held("int8"), case(3, "bfloat16")
  found = jax.grad(loss)(x, w)
  expected = g @ np.asarray(quant.dequantize(w)).T
  assert found.dtype == jnp.bfloat16 and np.abs(found - expected).max() <= 2**-8 * np.abs(expected).max()


@on_a_cpu
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

  assert floats(w) == [] and floats(W[:, :512])  # the search finds floats


@on_a_cpu
@pytest.mark.core
@pytest.mark.parametrize("in_one", [False, True])
def test_a_loop_of_gradients_makes_no_floats_of_the_weight_before_it(monkeypatch, in_one):
  """Neither of a rest of 507 columns nor, in one piece, of them all: the largest floats outside of the loop are its rows."""
  D, F, rows = 256, 1531, 8
  monkeypatch.setattr(quantized, "_in_one", lambda: in_one)
  q, x = held("int8", F), np.ones((rows, D), np.float32)

  def largest():
    loss = lambda x, w: jnp.sum(jnp.square(einsum("CD,DF->CF", x, w)))
    step = lambda x, w: x - 1e-3 * jax.grad(loss)(x, w)
    run = jax.jit(lambda x, w: jax.lax.fori_loop(0, 3, lambda _, x: step(x, w), x))
    text = run.lower(x, q).compile().as_text()
    assert "\nENTRY" in text and " while(" in text.split("\nENTRY")[1]
    shapes = re.findall(r"f32\[([\d,]+)\]", text.split("\nENTRY")[1])
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)

  assert largest() == rows * D
  monkeypatch.setattr(jax.lax, "optimization_barrier", lambda x: x)
  assert largest() >= D * 507


@pytest.mark.parametrize(
  ("name", "options"), [("int8", {}), ("w8a8", {}), ("int4", dict(group=32)), ("nf4", {})]
)
def test_the_gradient_of_rows_in_groups_is_that_of_the_weight_of_each(name, options):
  """Groups of any size, one of none; rows of 16 bits have one of 16."""
  scheme, sizes = quant.SCHEMES[name](**options), np.array([3, 0, 7, 1])
  w = np.random.default_rng(3).standard_normal((4, 128, 72)).astype(np.float32)
  q = quant.QTensor(jax.jit(scheme.quantize)(jnp.asarray(w)), scheme)
  x, g = (
    np.random.default_rng(i).standard_normal((11, n)).astype(np.float32) for i, n in ((1, 128), (2, 72))
  )
  loss = lambda x: jnp.sum(grouped_dot(x, q, sizes) * g)
  each = np.asarray(quant.dequantize(q), np.float64)[np.repeat(np.arange(4), sizes)]
  expected = np.einsum("rf,rdf->rd", g, each)
  found = jax.jit(jax.grad(loss))(jnp.asarray(x))
  assert np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max()
  half = jax.grad(loss)(jnp.asarray(x, jnp.bfloat16))
  assert half.dtype == jnp.bfloat16 and np.abs(half - expected).max() <= 2**-8 * np.abs(expected).max()


@pytest.mark.core
@pytest.mark.parametrize(
  ("name", "options"),
  [
    ("int8", {}),
    pytest.param("int4", dict(group=4), marks=pytest.mark.slow),
    pytest.param("nf4", dict(block=4), marks=pytest.mark.slow),
  ],
)
def test_lora_of_a_model_whose_experts_are_integers_has_the_gradient_of_their_floats(name, options):
  """Attention's factors are trained, through experts of three layers."""
  cfg = MODELS["experts"]
  small = quant.apply(params_of(cfg), quant.SCHEMES[name](**options))
  floats = {
    path: quant.dequantize(x) if isinstance(x, quant.QTensor) and "experts" in path else x
    for path, x in tree.flatten(small).items()
  }
  ids = np.arange(24).reshape(4, 6)

  def gradient(params):
    params = lora.apply(params, [(r"layers/\d+/attn/[qv]/w", True)], rank=2, alpha=4.0, key=jax.random.key(0))
    start = jax.tree.map(lambda x: x + 0.01, lora.adapters(params))  # both factors have a gradient
    run = lambda adapters, params: Transformer(cfg).apply(
      {"params": lora.with_adapters(params, adapters)}, ids
    )[0]
    return jax.jit(jax.grad(lambda a, p: jnp.mean(jax.nn.logsumexp(run(a, p), axis=-1))))(start, params)

  found, expected = gradient(small), gradient(tree.unflatten(floats))
  assert any("experts" in path for path, x in tree.flatten(small).items() if isinstance(x, quant.QTensor))
  for path, x in tree.flatten(expected).items():
    assert np.abs(x).max() > 0
    np.testing.assert_allclose(
      tree.flatten(found)[path], x, atol=1e-4 * float(np.abs(x).max()), rtol=0, err_msg=path
    )


@on_a_cpu
@pytest.mark.parametrize("rows", [4, 64])
def test_no_floats_of_an_expert_are_made(rows):
  D, F, groups = 1024, 2063, 4
  scheme = quant.SCHEMES["int8"]()
  parts = jax.eval_shape(scheme.quantize, jax.ShapeDtypeStruct((groups, D, F), jnp.float32))
  sizes = jax.ShapeDtypeStruct((groups,), jnp.int32)
  x = jax.ShapeDtypeStruct((rows, D), jnp.float32)
  loss = lambda x, w, sizes: jnp.sum(jnp.square(grouped_dot(x, w, sizes)))

  def floats(w):
    """(temporary bytes over those of an expert as floats, whether there is such an array outside of fusions)."""
    program = jax.jit(jax.grad(loss)).lower(x, w, sizes).compile()
    text = re.sub(r"(?ms)^%(fused|wrapped).*?^}", "", program.as_text())
    share = program.memory_analysis().temp_size_in_bytes / (4 * D * F)
    return share, re.search(rf"(?:f32|bf16)\[(?:1,)?(?:{D},{F}|{F},{D})\]", text) is not None

  share, found = floats(quant.QTensor(parts, scheme))
  assert share < 0.9 and not found  # its bytes (0.25), a tile of 512 columns (0.25) and rows
  assert floats(jax.ShapeDtypeStruct((groups, D, F), jnp.float32))[1]
