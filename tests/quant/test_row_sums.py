"""One row times a weight as a GPU computes it: a sum of products of numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops import rows
from jaxllm.ops.call import Device
from jaxllm.quant import SCHEMES, codebook

D, F = 256, 96
SUMS = [name for name in SCHEMES if name not in ("w8a8", "zeroquant", "llm_int8")]


@pytest.mark.parametrize("platform", ["cuda", "cpu"])
@pytest.mark.parametrize("name", SUMS)
def test_a_row_is_multiplied_as_the_dequantized_weight_is(name, platform, monkeypatch):
  for module in (rows, codebook):
    monkeypatch.setattr(module, "current_device", lambda: Device(platform))
  scheme, rng = SCHEMES[name](), np.random.default_rng(0)
  parts = scheme.quantize(jnp.asarray(rng.normal(size=(D, F)), jnp.float32))
  x = rng.normal(size=(1, D)).astype(np.float32)
  text = jax.jit(scheme.product).lower(jnp.asarray(x), parts).as_text()
  assert ("dot_general" in text) == (platform == "cpu")
  expected = x.astype(np.float64) @ np.asarray(scheme.dequantize(parts), np.float64)
  # 256 products of standard normals, each rounded to float32
  np.testing.assert_allclose(scheme.product(jnp.asarray(x), parts), expected, atol=2e-5 * np.sqrt(D))


@pytest.mark.parametrize("count", [2, rows.FEW, rows.FEW + 1])
def test_pairs_of_rows_and_weights_are_summed(count):
  rng = np.random.default_rng(1)
  x, w = rng.normal(size=(2, count, D)).astype(np.float32), rng.normal(size=(2, F, D)).astype(np.float32)
  expected = sum(np.float64(w[i]) @ np.float64(x[i]).T for i in range(2))
  np.testing.assert_allclose(rows.unpacked(*zip(x, w, strict=True)), expected, atol=2e-5 * np.sqrt(D))
