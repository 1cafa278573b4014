"""Weights and rows from 1e-37 to 1e38: what they are held as does not depend on their size, until they count as zeros."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantization_table import refused

from jaxllm import quant
from jaxllm.errors import QuantError
from jaxllm.ops import quantized
from jaxllm.quant.groups import held
from jaxllm.quant.w8a8 import per_token

SMALLEST = float(np.finfo(np.float32).tiny)  # that is normal
ROWS = ("w8a8", "zeroquant", "llm_int8")
INT8 = ("int8", "int8_tensor", "int8_asym", *ROWS)
GROUPS = ("zeroquant", "int4", "int4_asym", "int3", "int3_asym")
HALF = ("glm_int8", "glm_int4")  # scales of half precision have its range


def random(shape, seed=0):
  w = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
  return w / np.abs(w).max()


def applied(w, name):
  return quant.apply({"x": {"w": w}}, quant.SCHEMES[name](), [("x/w", True)])["x"]["w"]


@pytest.mark.parametrize("power", [-112, -66, -13, 100, 126])
def test_rows_of_another_size_have_the_same_integers(power):
  """1e-34, 1e-20, 1e-4, 1e30 and 8.5e37, by exact powers of two."""
  x, size = random((4, 64)), np.float32(2.0**power)
  (n, scale), (found, of) = jax.jit(per_token)(x), jax.jit(per_token)(x * size)
  np.testing.assert_array_equal(found, n)
  np.testing.assert_array_equal(of, scale * size)
  assert np.abs(n).max(-1).tolist() == [127] * 4


@pytest.mark.parametrize("name", ROWS)
def test_products_of_rows_of_1e38_are_1e38_as_large(name):
  x, q = random((3, 128), 1), applied(random((128, 8)) / 128, name)
  product = jax.jit(quantized.product)
  fields = {} if name != "llm_int8" else dict(threshold=float("inf"))
  q = quant.QTensor(q.parts, quant.SCHEMES[name](**fields))
  size = np.float32(2.0**127)
  np.testing.assert_allclose(product(x * size, q), product(x, q) * size, rtol=1e-6)
  assert np.isfinite(product(x * size, q)).all()


@pytest.mark.parametrize("name", [name for name in quant.SCHEMES if name not in HALF])
@pytest.mark.parametrize("power", [-110, 126])
def test_weights_of_another_size_have_the_same_integers(name, power):
  w, size = random((128, 16)), np.float32(2.0**power)
  one, other = applied(w, name), applied(w * size, name)
  for part in one.parts:
    factor = size if part == "scale" else 1
    np.testing.assert_array_equal(other.parts[part], one.parts[part] * factor)
  np.testing.assert_array_equal(quant.dequantize(other), quant.dequantize(one) * size)


@pytest.mark.parametrize("name", quant.SCHEMES)
@pytest.mark.parametrize("size", [1e38, 3e38])
def test_larger_weights_are_refused(name, size):
  """Their reciprocals are flushed to 0."""
  assert not (jax.jit(lambda x: 1 / x)(np.float32(size)) > 0) or jax.default_backend() != "cpu"
  with pytest.raises(
    QuantError, match=r"x/w: found NaN or infinity, .*or a weight beyond 8.5e\+37"
  ) as caught:
    applied(np.full((128, 16), size, np.float32), name)
  refused(f"any scheme, weights of {size:g}", caught.value)


@pytest.mark.parametrize("name", [*INT8, *GROUPS[1:]])
def test_small_weights_are_off_by_half_a_scale_or_count_as_zeros(name):
  """Columns whose range goes from 1e-38 to 1e-34: none is held half."""
  size = np.geomspace(1e-38, 1e-34, 256).astype(np.float32)
  w = (random((128, 256)) * size).astype(np.float32)
  w[0] = size
  if name == "int8_tensor":
    w = w[:, 200:]
  q = applied(w, name)
  found, scale = np.asarray(quant.dequantize(q), np.float64), np.asarray(q.parts["scale"], np.float64).T
  zeros = np.broadcast_to(scale == 1, (1, w.shape[1]))[0]
  assert not found[:, zeros].any()
  more = 2 ** int(name[3]) / 256 if name in ("int4_asym", "int3_asym") else 0
  assert np.all(np.abs(found - w) <= scale * (0.5 + more + 1e-4))
  extent = w.max(0).astype(np.float64) - np.minimum(w.min(0), 0) if "asym" in name else np.abs(w).max(0)
  assert np.all(zeros[extent < 100 * SMALLEST] | (name in GROUPS))
  assert not zeros[extent > 600 * SMALLEST].any() and (zeros.any() or name == "int8_tensor")


def test_a_scale_of_a_group_is_twice_the_smallest_normal_number_at_least():
  below = SMALLEST * np.array([0, 0.5, 1, 1.5, 2], np.float32)
  assert held(jnp.asarray(below)).tolist() == [1] * 5
  np.testing.assert_array_equal(held(jnp.asarray([3 * SMALLEST])).astype(jnp.float32), [3 * SMALLEST])


@pytest.mark.parametrize(("name", "fields"), [("int8", {}), ("zeroquant", dict(group=1))])
def test_the_largest_weight_is_127_for_every_mantissa(name, fields):
  """All of [1, 2), so that all that there are: no quotient comes to 127.5, and nothing has to be cut."""
  w = np.arange(0x3F800000, 0x40000000, dtype=np.uint32).view(np.float32)
  quantize = jax.jit(quant.SCHEMES[name](**fields).quantize)
  for sign in (1, -1):  # -127.5 would be -128, while 127.5 ends at 127
    n = np.asarray(quantize(sign * w[None])["value"])
    assert n.min() == n.max() == sign * 127
