"""T5's bias: the buckets of transformers at every distance, and a table that is read by them."""

import math

import components
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import ConfigError
from jaxllm.position import POSITIONS
from jaxllm.position.bias import t5_thresholds

pytestmark = pytest.mark.component("t5")
T5 = POSITIONS["t5"]()


def expected_buckets(row, longest):
  buckets = np.zeros(longest + 1, int)
  for bucket, start in row["starts"].items():
    buckets[start:] = int(bucket)
  return buckets


@pytest.mark.core
def test_buckets_of_transformers(golden):
  """Every distance from 0 to 20000, twelve pairs of (num_buckets, max_distance): no one differs."""
  assert len(golden["t5"]["rows"]) == 12
  for row in golden["t5"]["rows"]:
    distance = np.arange(golden["t5"]["longest"] + 1)
    method = POSITIONS["t5"](row["num_buckets"], row["max_distance"])
    found = np.asarray(jax.jit(method.buckets)(jnp.asarray(distance, jnp.int32)))
    np.testing.assert_array_equal(found, expected_buckets(row, distance[-1]), err_msg=str(method))
  components.measured("t5", "transformers' buckets", 0)


def test_thresholds_written_out():
  """T5's own: sixteen distances one by one, then 16 * 8^(k/16), rounded up."""
  starts = t5_thresholds(32, 128)
  assert starts[:16] == list(range(1, 17)) and len(starts) == 31
  assert starts[16:] == [math.ceil(16 * 8 ** (k / 16)) for k in range(1, 16)]
  assert t5_thresholds(8, 64) == [
    1,
    2,
    3,
    4,
    8,
    16,
    32,
  ]  # exact powers, where a rounded logarithm may go wrong


def test_what_comes_after_and_what_is_far():
  found = np.asarray(T5.buckets(jnp.array([-5, -1, 0, 127, 128, 2**31 - 1])))
  np.testing.assert_array_equal(found, [0, 0, 0, 31, 31, 31])


def test_the_bias_is_the_table_at_the_bucket():
  """Positions of each row; a head is a column of the table."""
  method = POSITIONS["t5"](4, 8)
  table = np.arange(12, dtype=np.float32).reshape(4, 3)
  q_pos, k_pos = jnp.array([[9, 3], [1, 0]]), jnp.array([[0, 8, 9], [0, 1, 2]])
  found = method.bias({"table": jnp.asarray(table)}, q_pos, k_pos, 3, 16)
  bucket = np.array([[[3, 1, 0], [2, 0, 0]], [[1, 0, 0], [0, 0, 0]]])  # starts 1, 2, 4
  assert found.dtype == jnp.float32
  np.testing.assert_array_equal(found, np.moveaxis(table[bucket], -1, 1))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (dict(num_buckets=1), "T5Bias.num_buckets: found 1, expected an integer of at least 2"),
    (dict(num_buckets=8.0), "T5Bias.num_buckets: found 8.0"),
    (dict(max_distance=None), "T5Bias.max_distance: found None"),
    (dict(max_distance=16), "T5Bias.max_distance: found 16, expected more than num_buckets // 2 = 16"),
  ],
)
def test_bad_fields_are_named(fields, message):
  with pytest.raises(ConfigError, match=message):
    POSITIONS["t5"](**fields)
