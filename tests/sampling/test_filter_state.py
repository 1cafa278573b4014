"""What samplers remember: histories, repeats, the surprise that mirostat steers, the coins that XTC tosses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filter_cases import padded
from sampling_reference import chi_square, chi_square_limit

from jaxllm.sampling import Chain, Mirostat, RepetitionPenalty, Temperature, TopP, Xtc
from jaxllm.sampling.history import History, counts, largest, repeats

core = pytest.mark.core
PROMPTS = [[5, 6, 7], [8], [9, 9, 9, 9]]


def test_a_history_is_the_newest_tokens_of_each_row():
  history = History.start(*padded(PROMPTS), 2)
  np.testing.assert_array_equal(
    history.tokens_BC, [[-1, -1, -1, 5, 6, 7], [-1, -1, -1, -1, -1, 8], [-1, -1, 9, 9, 9, 9]]
  )
  for token in range(3):
    history = history.push(jnp.full(3, token, jnp.int32))
  # the longest prompt has been given up as far as there was no room
  np.testing.assert_array_equal(
    history.tokens_BC, [[5, 6, 7, 0, 1, 2], [-1, -1, 8, 0, 1, 2], [9, 9, 9, 0, 1, 2]]
  )
  np.testing.assert_array_equal(history.drawn_B, [3, 3, 3])
  np.testing.assert_array_equal(history.recent(-1, prompt=False)[:, :3], np.full((3, 3), -1))
  np.testing.assert_array_equal(history.recent(2)[0], [-1, -1, -1, -1, 1, 2])
  np.testing.assert_array_equal(
    history.recent(jnp.array([[0], [4], [-1]])), [[-1] * 6, [-1, -1, 8, 0, 1, 2], [9, 9, 9, 0, 1, 2]]
  )


def test_counts_and_largest_leave_out_what_is_no_token():
  tokens_BC = jnp.array([[-1, 2, 0, 2, 3, 9]])  # 9 is beyond the vocabulary
  np.testing.assert_array_equal(counts(tokens_BC, 4), [[1, 0, 2, 1]])
  np.testing.assert_array_equal(largest(tokens_BC, jnp.array([[9, 4, 3, 5, 0, 7]]), 4), [[3, 0, 5, 0]])


def test_repeats_are_those_of_a_search():
  rng = np.random.default_rng(0)
  tokens_BC = np.concatenate([np.full((200, 3), -1), rng.integers(0, 3, (200, 12))], axis=1)
  tokens_BC[::5, 3:] = 1
  breaks_BC = (tokens_BC == 2) & (np.arange(200) % 2 == 0)[:, None]
  limit_B1 = rng.integers(-1, 14, (200, 1))
  found_BC = jax.jit(repeats)(tokens_BC, limit_B1, breaks_BC)
  for row, text in enumerate(tokens_BC.tolist()):
    for slot in range(15):
      length = 0
      while (
        length < min(slot, limit_B1[row, 0])
        and text[slot - 1 - length] == text[14 - length] >= 0
        and not breaks_BC[row, 14 - length]
      ):
        length += 1
      assert found_BC[row, slot] == length
  assert found_BC.max() >= 10


def test_a_history_with_room_never_forgets_the_prompt():
  sampler = RepetitionPenalty(2.0)
  roomy, tight = (sampler.init(*padded(PROMPTS), room) for room in (4, 0))
  for token in (1, 2, 3, 4):
    roomy, tight = (sampler.update(jnp.full(3, token), state, None) for state in (roomy, tight))
  np.testing.assert_array_equal(roomy.tokens_BC[0], [-1, 5, 6, 7, 1, 2, 3, 4])
  np.testing.assert_array_equal(tight.tokens_BC[0], [1, 2, 3, 4])


def test_a_history_that_grows_in_time_is_one_that_had_the_room_at_first():
  chain = Chain((RepetitionPenalty(2.0), Temperature(1.0), RepetitionPenalty(1.5)))
  roomy, small = (chain.init(*padded(PROMPTS), room) for room in (4, 0))
  jax.tree.map(np.testing.assert_array_equal, chain.grown(small, 4), roomy)


def steps(sampler, logits_TBV, seed=0):
  """(tokens [T, B], the state after the last): one draw a step of logits_TBV."""
  number, B = logits_TBV.shape[:2]

  def step(state, given):
    key, logits_BV = given
    tokens_B, state = sampler(jax.random.split(key, B), logits_BV, state)
    return state, (tokens_B, state)

  start = sampler.init(np.ones((B, 1), int), np.ones(B, int), number)
  _, (tokens_TB, states) = jax.lax.scan(
    step, start, (jax.random.split(jax.random.key(seed), number), logits_TBV)
  )
  return tokens_TB, states


@pytest.mark.component("mirostat")
def test_mirostat_is_its_recursion_in_float64():
  logits_TBV = 3 * jax.random.normal(jax.random.key(1), (40, 2, 50))
  tau, eta = np.array([1.0, 3.0]), np.array([0.5, 0.2])
  tokens_TB, mu_TB = jax.jit(functools.partial(steps, Mirostat(tau, eta)))(logits_TBV)
  mu_B = 2 * tau
  for step in range(40):
    for row in range(2):
      z = np.asarray(logits_TBV[step, row], np.float64)
      probs = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
      inside = -np.log2(probs) <= mu_B[row]
      token = tokens_TB[step, row]
      if not inside.any():
        inside = np.arange(50) == np.argmax(probs)
      assert inside[token]
      surprise = -np.log2(probs[token] / probs[inside].sum())
      mu_B[row] -= eta[row] * (surprise - tau[row])
    np.testing.assert_allclose(mu_TB[step], mu_B, atol=2e-5)


def test_mirostat_learns_from_what_was_drawn_alone():
  """A row of which nothing was left keeps its mu; another moves it by eta (s - tau), here of one bit and of two."""
  drawn_B, mu_B = jnp.array([-1, 0, 3, -1]), jnp.array([3.0, 3.0, 3.0, 1.0])
  logits_BV = jnp.log(jnp.array([[0.5, 0.25, 0.0, 0.25]] * 3 + [[0.0] * 4]))
  after_B = Mirostat(1.5, 0.4).update(drawn_B, mu_B, logits_BV)
  np.testing.assert_allclose(after_B, [3.0, 3.2, 2.8, 1.0], rtol=1e-6)


@core
@pytest.mark.slow
def test_mirostat_stays_where_it_is_in_a_row_with_nothing_left():
  logits_BV = jnp.array([[-jnp.inf] * 4, [0.0, 1.0, 2.0, 3.0]])
  sampler, state = Mirostat(2.0), jnp.array([3.0, 3.0])
  with jax.debug_nans(True):
    tokens_B, after = sampler(jax.random.split(jax.random.key(0), 2), logits_BV, state)
  assert tokens_B[0] == -1 and after[0] == 3.0
  assert tokens_B[1] >= 0 and after[1] != 3.0


def test_mirostat_holds_the_surprise_at_tau():
  logits_BV = jnp.broadcast_to(-1.1 * jnp.log(jnp.arange(1, 501)), (8, 500))  # Zipf's law: 6.3 bits a token
  run = jax.jit(lambda sampler: steps(sampler, jnp.broadcast_to(logits_BV, (200, 8, 500)))[1])
  for tau in (2.0, 4.0):
    mu_TB = np.asarray(run(Mirostat(tau, 0.1)))
    # mu moves by eta (s - tau), so its drift is the mean of s - tau
    assert abs((mu_TB[-1] - mu_TB[59]).mean() / 140 / 0.1) < 0.05


@pytest.mark.component("xtc")
@pytest.mark.parametrize("number", [20_000, pytest.param(200_000, marks=pytest.mark.slow)])
def test_the_coins_of_xtc_and_the_draw_are_independent(number):
  """Two coins of one chain, and a draw that neither excludes anything from."""
  logits_BV = jnp.broadcast_to(jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1])), (number, 4))
  chain = Chain((Xtc(0.5, 0.9), Xtc(0.5, 0.9)))
  key_B = jax.random.split(jax.random.key(3), number)
  state = chain.toss(key_B, chain.init(None, np.ones(number)))
  tokens_B, after = jax.jit(chain)(key_B, logits_BV, state)
  for one, other in zip(state, after, strict=True):  # tossed anew from the same keys
    np.testing.assert_array_equal(one, other)
  quarters = [np.minimum(np.asarray(x) * 4, 3).astype(int) for x in state]
  probs = np.outer(np.full(16, 1 / 16), [0.4, 0.3, 0.2, 0.1]).ravel()
  statistic, freedom = chi_square(quarters[0] * 16 + quarters[1] * 4 + np.asarray(tokens_B), probs)
  assert statistic <= chi_square_limit(freedom)


@core
def test_xtc_acts_as_often_as_it_should_and_is_tossed_by_the_rows_key_alone():
  key_B, logits_BV = jax.random.split(jax.random.key(0), 20_000), jnp.zeros((20_000, 2))
  chain = Chain((Temperature(0.7), Xtc(0.25, 0.1)))  # of two equal tokens the second is left
  tokens_B, _ = jax.jit(chain)(key_B, logits_BV, chain.init(None, np.ones(20_000)))
  share = float(jnp.mean(tokens_B))
  assert abs(share - 0.625) < 5 * np.sqrt(0.625 * 0.375 / 20_000)
  alone = chain(key_B[7:9], logits_BV[:2], chain.init(None, np.ones(2)))[0]
  np.testing.assert_array_equal(alone, tokens_B[7:9])


def test_a_row_of_xtc_is_cut_or_whole_by_a_coin_of_its_own():
  rows = 2000
  logits_BV = jnp.broadcast_to(jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1])), (rows, 4))
  sampler = Xtc(0.5, 0.15)
  toss = lambda seed: sampler.toss(jax.random.split(jax.random.key(seed), rows), jnp.ones(rows))
  kept_BV = lambda coin_B, sampler=sampler: np.isfinite(sampler.filter(logits_BV, coin_B))
  coins = [toss(0), toss(1)]
  cut_2B = np.array([~kept_BV(coin_B)[:, 0] for coin_B in coins])
  for coin_B, cut_B in zip(coins, cut_2B, strict=True):
    np.testing.assert_array_equal(
      kept_BV(coin_B), np.where(cut_B[:, None], [[False, False, True, True]], True)
    )
    rarer_B = ~kept_BV(coin_B, Xtc(0.2, 0.15))[:, 0]
    assert abs(rarer_B.mean() - 0.2) < 5 * np.sqrt(0.16 / rows) and not (rarer_B & ~cut_B).any()
  # two draws of a row are two coins: all four pairs come as often
  pairs = np.bincount(2 * cut_2B[0] + cut_2B[1], minlength=4)
  assert chi_square(2 * cut_2B[0] + cut_2B[1], np.full(4, 0.25))[0] < chi_square_limit(3), pairs


@pytest.mark.slow
def test_a_chain_of_all_kinds_of_state_is_one_scan():
  chain = Chain((RepetitionPenalty(1.5), Xtc(0.5, 0.05), TopP(0.95), Mirostat(3.0)))
  logits_TBV = jax.random.normal(jax.random.key(2), (30, 3, 20))
  tokens_TB, states = jax.jit(functools.partial(steps, chain))(logits_TBV)
  assert ((tokens_TB >= 0) & (tokens_TB < 20)).all()
  np.testing.assert_array_equal(states[0].tokens_BC[-1][:, -30:], tokens_TB.T)
