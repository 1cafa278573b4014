"""ALiBi: slopes of the published recipe, and a bias that low precision cannot hurt where it matters."""

import components
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import ConfigError
from jaxllm.position import POSITIONS, alibi_slopes

HEADS = range(1, 129)
pytestmark = pytest.mark.component("alibi")
ALIBI = POSITIONS["alibi"]()


def golden_slopes(golden, n):
  table = golden["alibi"]["slope_of_exponent"]
  return np.array([table[str(e)] for e in golden["alibi"]["exponents"][str(n)]])


def bias(q_pos, k_pos, num_heads, method=ALIBI):
  """[N, T, S] of one sequence; heads of 16."""
  q_pos, k_pos = (jnp.asarray(pos, jnp.int32)[None] for pos in (q_pos, k_pos))
  return np.asarray(method.bias({}, q_pos, k_pos, num_heads, 16))[0]


def one_token_back(method):
  """What is subtracted one token back, [N] for each of HEADS, in one program: shapes compile one by one otherwise."""
  q_pos, k_pos = jnp.ones((1, 1), jnp.int32), jnp.zeros((1, 1), jnp.int32)
  biases = jax.jit(lambda: [method.bias({}, q_pos, k_pos, n, 16) for n in HEADS])()
  return [-np.asarray(bias)[0, :, 0, 0] for bias in biases]


@pytest.mark.parametrize("n", [pytest.param(n, marks=[pytest.mark.core] * (n == 12)) for n in HEADS])
def test_slopes_of_the_published_recipe(n, golden):
  """To the float64 rounding of one power of two; every one positive and different."""
  slopes = alibi_slopes(n)
  assert slopes.dtype == np.float64 and slopes.shape == (n,)
  components.measured_close("alibi", "fifty digits", slopes, golden_slopes(golden, n), rtol=2.3e-16)
  assert np.all(slopes > 0) and len(set(slopes)) == n


def test_bloom_and_mpt_follow_the_same_recipe(golden):
  assert golden["alibi"]["bloom_agrees"] == golden["alibi"]["mpt_agrees"] == list(HEADS)
  for n, slopes in golden["alibi"]["bloom"].items():
    np.testing.assert_allclose(alibi_slopes(int(n)), slopes, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bias_max", [4, 16])
def test_mpt_with_another_bias_max(bias_max, golden):
  """MPT's slopes for all head counts are those of the recipe to the power bias_max / 8, in the same order."""
  assert golden["alibi"]["mpt_agrees_with_bias_max"][str(bias_max)] == list(HEADS)
  for n, found in zip(HEADS, one_token_back(POSITIONS["alibi"](bias_max=bias_max)), strict=True):
    expected = golden_slopes(golden, n) ** (bias_max / 8)
    np.testing.assert_allclose(alibi_slopes(n, bias_max), expected, rtol=1e-14, atol=0)
    np.testing.assert_array_equal(found, expected.astype(np.float32))


@pytest.mark.core
def test_falcon_rounds_its_slopes(golden):
  """To the last bit, for all head counts; what is rounded is not what is not."""
  table, falcon = golden["alibi"]["falcon_slope_of_exponent"], POSITIONS["alibi"](slope_dtype="bfloat16")
  for n, found in zip(HEADS, one_token_back(falcon), strict=True):
    expected = [table[str(e)] for e in golden["alibi"]["exponents"][str(n)]]
    np.testing.assert_array_equal(found, expected)
  assert np.max(np.abs(falcon.slopes(12) / alibi_slopes(12) - 1)) > 1e-4


@pytest.mark.component("alibi")
def test_falcon_rounds_its_products(golden):
  """Slope, position and product, to the last bit; the bias of a pair is a difference of two of them."""
  falcon, far = POSITIONS["alibi"](slope_dtype="bfloat16"), golden["alibi"]["falcon_positions"]
  products_NP = np.array(golden["alibi"]["falcon_products_of_12_heads"])
  expected = (products_NP[:, None] - products_NP[:, :, None]).astype(np.float32)
  np.testing.assert_array_equal(bias(far, far, 12, falcon), expected)
  exact = bias(far, far, 12)
  assert np.max(np.abs(expected - exact)) > 1 and expected[0, far.index(257), far.index(256)] == 0


def test_before_the_division_the_bias_is_divided_too():
  before = POSITIONS["alibi"](placement="before")
  np.testing.assert_array_equal(4 * bias(range(8), range(8), 12, before), bias(range(8), range(8), 12))


@pytest.mark.parametrize(
  ("field", "bad"),
  [("bias_max", 0), ("bias_max", None), ("slope_dtype", "float16"), ("placement", "between")],
)
def test_bad_fields_are_named(field, bad):
  with pytest.raises(ConfigError, match=rf"Alibi.{field}: found {bad!r}, expected "):
    POSITIONS["alibi"](**{field: bad})


@pytest.mark.core
def test_slopes_written_out():
  eight = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
  np.testing.assert_array_equal(alibi_slopes(1), [1 / 256])
  np.testing.assert_array_equal(alibi_slopes(2), [1 / 16, 1 / 256])
  np.testing.assert_array_equal(alibi_slopes(8), eight)
  np.testing.assert_array_equal(alibi_slopes(12)[:8], eight)
  np.testing.assert_allclose(alibi_slopes(12)[8:], [0.70711, 0.35355, 0.17678, 0.08839], rtol=0, atol=5e-6)
  np.testing.assert_allclose(alibi_slopes(40)[[0, -1]], [0.84090, 0.27263], rtol=0, atol=5e-6)


@pytest.mark.core
def test_bias_written_out():
  """Four tokens, two heads of slopes 1/16 and 1/256."""
  distance = np.array([[0, 1, 2, 3], [-1, 0, 1, 2], [-2, -1, 0, 1], [-3, -2, -1, 0]])
  found = bias(range(4), range(4), 2)
  assert found.dtype == np.float32
  np.testing.assert_array_equal(found[0], distance / 16)
  np.testing.assert_array_equal(found[1], distance / 256)


@pytest.mark.parametrize("n", [1, 8, 12, 40])
def test_zero_on_the_diagonal_and_falling_with_distance(n):
  found = bias(range(64), range(64), n)
  np.testing.assert_array_equal(np.diagonal(found, axis1=1, axis2=2), 0.0)
  for t in range(1, 64):
    assert np.all(np.diff(found[:, t, : t + 1], axis=1) > 0)


@pytest.mark.parametrize("shift", [1, 4096, 2**24 + 1, 2**31 - 1 - 64])
def test_shift_changes_no_bit(shift):
  np.testing.assert_array_equal(
    bias(shift + np.arange(64), shift + np.arange(64), 12), bias(range(64), range(64), 12)
  )


def test_a_decoded_row_is_the_row_of_the_full_bias():
  full = bias(range(64), range(64), 12)
  for t in (0, 5, 63):
    np.testing.assert_array_equal(bias([t], range(64), 12)[:, 0], full[:, t])


def test_positions_of_each_row():
  """A batch has positions of its own a row: padding and packing move them."""
  q_pos, k_pos = jnp.array([[5, 6], [0, 1]], jnp.int32), jnp.array([[4, 5, 6], [9, 0, 1]], jnp.int32)
  found = np.asarray(ALIBI.bias({}, q_pos, k_pos, 2, 16))
  assert found.shape == (2, 2, 2, 3)
  np.testing.assert_array_equal(found[0, 0], np.array([[-1, 0, 1], [-2, -1, 0]]) / 16)
  np.testing.assert_array_equal(found[1, 0], np.array([[9, 0, 1], [8, -1, 0]]) / 16)


@pytest.mark.core
@pytest.mark.parametrize("n", [8, 40])
def test_the_nearest_keys_stay_distinct_in_bfloat16(n):
  """The last 64 of 4096; in the form slope * key position the steepest head of 40 has 4 values left."""
  near = jnp.asarray(bias([4095], np.arange(4032, 4096), n)[:, 0], jnp.bfloat16)
  assert [len(np.unique(head)) for head in np.asarray(near, np.float32)] == [64] * n
  absolute = jnp.asarray(alibi_slopes(40)[0] * np.arange(4032, 4096), jnp.bfloat16)
  assert len(np.unique(np.asarray(absolute, np.float32))) == 4


@pytest.mark.core
@pytest.mark.parametrize("num_kv_heads", [6, 3, 1])
def test_scores_add_the_bias_after_the_scaling(num_kv_heads):
  """q k + m_h (j - i) for each query head h = k G + g; a bias divided by sqrt(H) too is another result."""
  N, K, H, T = 6, num_kv_heads, 16, 24
  rng = np.random.default_rng(0)
  q, k = rng.standard_normal((1, T, N, H)) / np.sqrt(H), rng.standard_normal((1, T, K, H))
  pos = np.arange(T, dtype=np.int32)[None]
  found = ALIBI.scores(q.astype(np.float32), k.astype(np.float32), pos, pos, None, {})
  assert found.dtype == jnp.float32 and found.shape == (1, K, N // K, T, T)
  found = np.asarray(found, np.float64).reshape(N, T, T)
  product = np.einsum("tnh,snh->nts", q[0], np.repeat(k[0], N // K, axis=1))
  distance = np.arange(T)[None] - np.arange(T)[:, None]
  slopes = alibi_slopes(N)[:, None, None]
  np.testing.assert_allclose(found, product + slopes * distance, rtol=0, atol=1e-5)
  assert np.max(np.abs(found - (product + slopes * distance / np.sqrt(H)))) > 1


def test_nope_adds_nothing():
  nope = POSITIONS["nope"]()
  pos = jnp.arange(3, dtype=jnp.int32)[None]
  assert nope.bias({}, pos, pos, 4, 8) is None and nope.frequencies(64) is None and nope.params(None) == {}
  x = jnp.ones((1, 3, 4, 8))
  assert nope.rotate_q(x, pos, None) is x and nope.rotate_k(x, pos, None) is x and nope.embed(x, pos, {}) is x
