"""The table of edges: what each filter keeps, which parameters are refused, which logits are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import SamplingError
from jaxllm.sampling import SAMPLERS, Chain, Greedy, Temperature, TopK, TopP, check_logits
from jaxllm.sampling.base import first_largest

core = pytest.mark.core
INF, NAN = np.inf, np.nan
ALL = [0, 1, 2, 3]
FOUR = np.log([0.15, 0.5, 0.05, 0.3])  # descending: 1, 3, 0, 2
HALVES = np.log([0.5, 0.25, 0.125, 0.125])  # cumulative sums exact in binary
TIED = [1.0, 2.0, 2.0, 0.0]
FLAT = [0.0, 0.0, 0.0, 0.0]
ONE = [-INF, -INF, 0.5, -INF]

KEPT = [  # sampler, logits, the ids it keeps
  pytest.param(Greedy(), FOUR, [1], marks=core),
  (Greedy(), TIED, [1]),
  (Greedy(), ONE, [2]),
  (Greedy(), [-INF, -1e30, -INF, -INF], [1]),
  (Temperature(0), FOUR, [1]),
  (Temperature(0.0), TIED, [1]),
  (Temperature(0), FLAT, [0]),
  (Temperature(0), ONE, [2]),
  (Temperature(0), [0.0, -1.0, -INF, -1e-30], [0]),
  (Temperature(1e-38), [-700.0, -701.0, -702.0, -699.5], [3]),  # every quotient is -inf: the limit is greedy
  (Temperature(1e-38), [700.0, 701.0, 702.0, 699.5], [2]),
  (Temperature(1e-45), FOUR, [1]),  # a denormal, flushed to zero by some hardware
  (Temperature(1e38), FOUR, ALL),
  (Temperature(1), ONE, [2]),
  (TopK(0), FOUR, ALL),
  (TopK(1), FOUR, [1]),
  (TopK(2), FOUR, [1, 3]),
  (TopK(4), FOUR, ALL),
  (TopK(5), FOUR, ALL),
  (TopK(2**40), FOUR, ALL),
  (TopK(np.int8(2)), FOUR, [1, 3]),
  (TopK(1), TIED, [1, 2]),
  (TopK(2), TIED, [1, 2]),
  (TopK(3), TIED, [0, 1, 2]),
  (TopK(1), FLAT, ALL),
  (TopK(3), ONE, [2]),
  (TopP(0), FOUR, [1]),
  (TopP(1e-4), FOUR, [1]),
  (TopP(0.4), FOUR, [1]),
  (TopP(0.5), FOUR, [1]),
  pytest.param(TopP(0.500001), FOUR, [1, 3], marks=core),
  (TopP(0.8), FOUR, [1, 3]),
  (TopP(0.95), FOUR, [0, 1, 3]),
  (TopP(1), FOUR, ALL),
  (TopP(0.5), HALVES, [0]),
  (TopP(0.75), HALVES, [0, 1]),
  (TopP(0.75001), HALVES, [0, 1, 2]),
  (TopP(0.875), HALVES, [0, 1, 2]),
  (TopP(0.99), HALVES, ALL),
  (TopP(0), TIED, [1]),
  (TopP(0.5), TIED, [1, 2]),
  (TopP(0), FLAT, [0]),
  (TopP(0.5), FLAT, [0, 1]),
  (TopP(0.51), FLAT, [0, 1, 2]),
  (TopP(0.9), ONE, [2]),
  (TopP(1), ONE, [2]),
  (TopP(1), [0.0, -200.0, -300.0, -1e30], ALL),  # probabilities that are 0 in float32 stay at p = 1
  (TopP(1), [3e38, -3e38, 0.0, 1.0], ALL),
  (Chain(()), FOUR, ALL),
  (Chain((Greedy(), TopP(1), TopK(0))), FOUR, [1]),
  (Chain((TopK(2), TopP(0.7))), FOUR, [1, 3]),  # .5 and .3 become .625 and .375
  (Chain((TopK(2), TopP(0.6))), FOUR, [1]),
  (Chain((TopP(0.6), TopK(2))), FOUR, [1, 3]),
  (Chain((Temperature(0.5), TopP(0.7))), FOUR, [1, 3]),  # squares: .25 of .365 = .685
  (Chain((Temperature(0.5), TopP(0.68))), FOUR, [1]),
  (Chain((TopP(0.68), Temperature(0.5))), FOUR, [1, 3]),
]


@jax.jit
def filter_and_draw(sampler, key_B, logits_BV):
  state = sampler.init(None, None)
  return sampler.filter(logits_BV, state), sampler(key_B, logits_BV, state)[0]


@pytest.mark.parametrize(("sampler", "logits", "kept"), KEPT)
def test_the_filter_keeps_exactly_these_tokens(sampler, logits, kept):
  logits_BV = jnp.asarray([logits], jnp.float32)
  with jax.debug_nans(True):
    filtered_BV, tokens_B = filter_and_draw(sampler, jax.random.split(jax.random.key(0), 1), logits_BV)
  np.testing.assert_array_equal(np.flatnonzero(filtered_BV[0] > -INF), kept)
  assert int(tokens_B[0]) in kept
  assert bool(check_logits(logits_BV)[0])


REFUSED = [
  pytest.param("temperature", {"temperature": -0.1}, marks=core),
  ("temperature", {"temperature": NAN}),
  ("temperature", {"temperature": INF}),
  ("temperature", {"temperature": -INF}),
  ("temperature", {"temperature": 1e39}),  # infinite in float32
  ("temperature", {"temperature": [1.0, -1.0]}),
  ("temperature", {"temperature": None}),
  ("temperature", {"temperature": "0.7"}),
  ("temperature", {"temperature": True}),
  ("temperature", {"temperature": [[1.0]]}),
  ("temperature", {"temperature": [[1.0], [1.0, 2.0]]}),
  ("top_k", {"k": -1}),
  ("top_k", {"k": 1.0}),
  ("top_k", {"k": NAN}),
  ("top_k", {"k": np.array([3, -1])}),
  ("top_p", {"p": 1.0001}),
  ("top_p", {"p": -1e-6}),
  ("top_p", {"p": NAN}),
  ("top_p", {"p": jnp.array([0.5, 2.0])}),
  ("chain", {"samplers": Greedy()}),
  ("chain", {"samplers": (0.5,)}),
  ("chain", {"samplers": 3}),
]


@pytest.mark.parametrize(("name", "kw"), REFUSED)
def test_a_wrong_parameter_is_refused_and_named(name, kw):
  with pytest.raises(SamplingError, match=rf"{SAMPLERS[name].__name__}: {next(iter(kw))} must be .*; found "):
    SAMPLERS[name](**kw)


LOGITS = [  # one row of logits, whether it can be drawn from
  pytest.param([0.0, 1.0, -INF], True, marks=core),
  ([-INF, -3e38, -INF], True),
  ([3e38, 3e38, 3e38], True),
  ([-INF, -INF, -INF], False),
  ([NAN, 1.0, 2.0], False),
  ([1.0, 2.0, NAN], False),
  ([NAN, NAN, NAN], False),
  ([-INF, NAN, -INF], False),
  ([INF, 0.0, 1.0], False),
  ([INF, -INF, 1.0], False),
  ([INF, NAN, 1.0], False),
]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("logits", "usable"), LOGITS)
def test_logits_that_nothing_can_be_drawn_from_are_flagged_a_row(logits, usable, dtype):
  if dtype == jnp.float16 and usable:
    logits = np.clip(logits, -6e4, 6e4)
    logits[np.isneginf(logits)] = -INF
  logits_BV = jnp.asarray([[0.0, 0.0, 0.0], logits, [1.0, 2.0, 3.0]], dtype)
  for flag in (check_logits, jax.jit(check_logits)):
    np.testing.assert_array_equal(flag(logits_BV), [True, usable, True])


def test_a_bad_row_leaves_its_neighbours_alone():
  sampler = Chain((Temperature(0.7), TopK(3), TopP(0.9)))
  good_BV = jnp.asarray(np.random.default_rng(0).normal(size=(5, 7)), jnp.float32)
  bad_BV = good_BV.at[1].set(-INF).at[2, 3].set(NAN).at[4, 0].set(INF)
  key_B = jax.random.split(jax.random.key(3), 5)
  good_B, bad_B = (filter_and_draw(sampler, key_B, logits_BV)[1] for logits_BV in (good_BV, bad_BV))
  np.testing.assert_array_equal(check_logits(bad_BV), [True, False, False, True, False])
  np.testing.assert_array_equal(good_B[jnp.array([0, 3])], bad_B[jnp.array([0, 3])])


def test_the_number_of_keys_and_of_parameters_must_be_the_number_of_rows():
  logits_BV = jnp.zeros((3, 4))
  with pytest.raises(SamplingError, match="one key a row"):
    TopP(0.5)(jax.random.key(0), logits_BV, ())
  with pytest.raises(SamplingError, match=r"shape \(2,\), the logits have 3 rows"):
    TopP([0.5, 0.6]).filter(logits_BV, ())


@pytest.mark.parametrize("nan", [[0], [3], [1, 2], [0, 1, 2, 3]])
def test_the_first_largest_is_that_of_numpy_and_a_token_even_beside_nan(nan):
  rng = np.random.default_rng(0)
  logits_BV = rng.integers(-3, 3, (200, 4)).astype(np.float32)  # most rows have equal ones
  logits_BV[rng.random(logits_BV.shape) < 0.3] = -INF
  found_B = first_largest(jnp.asarray(logits_BV))
  np.testing.assert_array_equal(found_B, np.argmax(logits_BV, axis=-1))
  logits_BV[:, nan] = np.nan
  found_B = np.asarray(first_largest(jnp.asarray(logits_BV)))
  assert ((found_B >= 0) & (found_B < 4)).all()
