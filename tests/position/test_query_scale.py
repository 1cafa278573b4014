"""log-n: queries times ln(position + 1) / ln(train length), in the training and the test-time form."""

import components
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import ConfigError
from jaxllm.position import Llama4Scale, LogN
from jaxllm.position.query_scale import query_scale_table

pytestmark = pytest.mark.component("log_n")


def factors(scale, n, dtype=jnp.float32, window=None):
  """The factor of the n-th token, n from 1, read off queries of ones."""
  pos = jnp.asarray(np.asarray(n)[None] - 1, jnp.int32)
  q = jnp.ones((1, len(n), 2, 4), dtype)
  out = np.asarray(
    jax.jit(lambda table, q, pos: table(q, pos, window))(query_scale_table(scale), q, pos), np.float64
  )
  np.testing.assert_array_equal(out, np.broadcast_to(out[:, :, :1, :1], out.shape))
  return out[0, :, 0, 0]


@pytest.mark.core
@pytest.mark.parametrize("floor", [0.0, 1.0])
def test_factors_at_train_length_512(floor, golden):
  """512: 1; 513: 1.000313; 4096: 1.33333 exactly 4/3; the first token 0 in the form to train with."""
  pins = golden["rope"]["pins"]["log_n_512"]
  n = [int(key) for key in pins]
  found = factors(LogN(512, floor=floor), n)
  expected = np.maximum(floor, list(pins.values()))
  components.measured_close("log_n", "fifty digits", found, expected, rtol=2.5e-7)
  assert [round(found[n.index(m)], d) for m, d in ((513, 6), (4096, 5))] == [1.000313, 1.33333]


@pytest.mark.core
def test_the_test_time_form_leaves_the_trained_length_alone():
  """Exactly 1 before the train length, never below 1, and growing after it."""
  n = np.arange(1, 4097)
  found = factors(LogN(512, floor=1.0), n)
  np.testing.assert_array_equal(found[:511], 1.0)
  assert np.all(found >= 1.0) and np.all(np.diff(found[512:]) > 0)


def test_the_training_form_scales_below_one():
  n = np.arange(1, 1025)
  found = factors(LogN(512), n)
  assert found[0] == 0.0 and np.all(np.diff(found) > 0) and np.all(found[:511] < 1)
  np.testing.assert_allclose(found, np.log(n) / np.log(512), rtol=3e-7, atol=0)


@pytest.mark.parametrize("n", [2**24 + 1, 2**30, 2**31])
def test_up_to_the_last_position(n):
  """Position 2^31 - 1 is the 2^31-th token, which an int32 cannot count."""
  np.testing.assert_allclose(factors(LogN(512, floor=1.0), [n]), [np.log(n) / np.log(512)], rtol=3e-7)


def test_without_a_scale_queries_are_untouched():
  table = query_scale_table(None)
  q = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9, 3, 8)), jnp.float32)
  pos = jnp.arange(18, dtype=jnp.int32).reshape(2, 9) * 1000
  np.testing.assert_array_equal(table(q, pos), q)


def test_a_bfloat16_query_has_the_factor_of_a_float32_one():
  """To one rounding: the logarithms and their ratio are taken in float32."""
  n = np.array([2, 100, 511, 640, 4096])
  found = factors(LogN(512), n, jnp.bfloat16)
  np.testing.assert_allclose(found, np.log(n) / np.log(512), rtol=2**-8, atol=0)


def test_methods_with_and_without_share_one_program():
  scales = (None, LogN(512), LogN(128, floor=1.0), Llama4Scale(512), Llama4Scale(16384, 0.3))
  tables = [query_scale_table(scale) for scale in scales]
  assert len({jax.tree.structure(table) for table in tables}) == 1
  shapes = {tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(table)) for table in tables}
  assert len(shapes) == 1


@pytest.mark.component("llama4")
@pytest.mark.parametrize("window", [None, 7])
def test_the_temperature_of_llama_4(window):
  """Exactly 1 for the first L0 tokens, then a step every L0, on every layer; integers are divided as integers."""
  n = np.array([1, 16384, 16385, 32768, 32769, 10**6, 2**24 + 16385, 2**31])
  found = factors(Llama4Scale(16384, 0.1), n, window=window)
  np.testing.assert_array_equal(found[:2], 1.0)
  np.testing.assert_allclose(found, 1 + 0.1 * np.log(1 + (n - 1) // 16384), rtol=2e-7)


def test_the_temperature_of_transformers():
  torch = pytest.importorskip("torch")
  ministral3 = pytest.importorskip("transformers.models.ministral3.modeling_ministral3")
  name = next(name for name in vars(ministral3) if name.endswith("get_llama_4_attn_scale"))
  n = np.unique(np.random.default_rng(0).integers(1, 2**20, 500))
  theirs = vars(ministral3)[name](torch.tensor(n - 1)[None], 0.1, 16384).numpy().ravel()
  components.measured_close(
    "llama4", "transformers' Ministral 3", factors(Llama4Scale(16384), n), theirs, rtol=2e-7
  )


def test_log_n_is_not_of_windows():
  np.testing.assert_array_equal(factors(LogN(8), np.arange(1, 100), window=7), 1.0)


@pytest.mark.parametrize(
  "field, value",
  [("train_length", v) for v in (1, 0, -5, 512.5, None)] + [("floor", v) for v in (-0.5, 1.5, float("nan"))],
)
def test_bad_fields_are_named(field, value):
  with pytest.raises(ConfigError) as caught:
    LogN(**(dict(train_length=512) | {field: value}))
  message = str(caught.value)
  assert field in message and repr(value) in message and "expected" in message
