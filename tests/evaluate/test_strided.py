"""Strided scoring: every token once, from the tokens before it in its window, in one program."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.config import Layer, ModelConfig
from jaxllm.errors import ConfigError, DataError, TokenizerError
from jaxllm.evaluate import strided
from jaxllm.nn import Transformer
from jaxllm.position import Rope
from jaxllm.tree import flatten, unflatten

COMPILED = "/jax/core/compile/backend_compile_duration"
compilations = []
jax.monitoring.register_event_duration_secs_listener(
  lambda event, seconds, **kwargs: compilations.append(event) if event == COMPILED else None
)


def first_of_window(n, window, stride):
  """{token: the first token of the window that scores it}, by walking over the text a window at a time."""
  found, scored, begin = {}, 0, 0
  while scored < n - 1:
    last = min(begin + window, n - 1)  # the last token that is predicted
    for token in range(scored + 1, last + 1):
      found[token] = last - min(window, n - 1)
    scored, begin = last, begin + stride
  return found


@given(st.integers(2, 200), st.integers(1, 60), st.data())
@settings(max_examples=150, deadline=None)
def test_every_token_but_the_first_is_scored_exactly_once(n, window, data):
  stride = data.draw(st.integers(1, window))
  windows, ids = strided.cover(n, window, stride), np.arange(n)
  wanted, seen = first_of_window(n, window, stride), []
  for i, count in enumerate(windows.counts):
    (tokens,) = windows.tokens(ids, i, 1)
    assert len(tokens) == windows.length + 1 == min(window, n - 1) + 1
    np.testing.assert_array_equal(np.diff(tokens), 1)
    seen += [(int(token), int(tokens[0])) for token in tokens[len(tokens) - count :]]
  assert [token for token, _ in seen] == list(range(1, n))  # in order, too
  assert dict(seen) == wanted
  for token, first in seen:
    assert min(token, window - stride + 1) <= token - first <= min(token, window)


@pytest.mark.parametrize(
  ("n", "window", "stride", "error", "words"),
  [
    (50, 8, 9, ConfigError, "stride: found 9, expected at most window = 8"),
    (50, 0, 1, ConfigError, "window: found 0"),
    (50, 8, 0, ConfigError, "stride: found 0"),
    (1, 8, 8, DataError, "found 1 tokens, expected at least 2"),
    (0, 8, 8, DataError, "found 0 tokens"),
  ],
)
def test_what_cannot_be_covered_is_refused(n, window, stride, error, words):
  with pytest.raises(error, match=words):
    strided.cover(n, window, stride)


V, T = 31, 12
CFG = ModelConfig(
  vocab_size=V,
  embed_dim=16,
  num_layers=3,
  num_heads=2,
  num_kv_heads=1,
  head_dim=8,
  mlp_dim=24,
  layers=(Layer(Rope(base=100.0)),),
  biases=("head",),
)
IDS = np.random.default_rng(0).integers(0, V, 40).astype(np.int32)


@pytest.fixture(scope="module")
def params():
  """Large enough for attention to be sharp."""
  shapes = jax.eval_shape(Transformer(CFG).init, jax.random.key(0), IDS[None])["params"]
  rng = np.random.default_rng(1)
  flat = {
    path: jnp.asarray(rng.standard_normal(leaf.shape, np.float32) * 2 / max(1, leaf.shape[0] ** 0.5))
    for path, leaf in flatten(shapes).items()
  }
  return unflatten(flat)


def scored(params, ids, window, stride, at_once, **kwargs):
  """(losses, hits) of tokens 1 .. n - 1."""
  windows = strided.cover(len(ids), window, stride)
  tables = CFG.rope_tables(seq_len=windows.length)
  parts = list(strided.score_text(Transformer(CFG), params, ids, windows, tables, at_once, **kwargs))
  token = parts[0][0] if "first" in kwargs else 1
  for first, nats, hits in parts:
    assert first == token and len(nats) == len(hits)
    token += len(nats)
  assert token == len(ids)
  return np.concatenate([nats for _, nats, _ in parts]), np.concatenate([hits for _, _, hits in parts])


@jax.jit
def last_logits(params, inputs_BT, last_B):
  logits_BTV, _ = Transformer(CFG).apply({"params": params}, inputs_BT)
  return logits_BTV[jnp.arange(len(inputs_BT)), last_B]


def token_by_token(params, ids, contexts):
  """(-ln p, hit) of each token from its own context alone: {token: first token of its context}."""
  rows, last = np.zeros((len(IDS), T), np.int32), np.zeros(len(IDS), np.int32)
  for row, (token, first) in zip(rows, contexts.items(), strict=False):
    row[: token - first] = ids[first:token]
  last[: len(contexts)] = [token - first - 1 for token, first in contexts.items()]
  logits = np.asarray(last_logits(params, rows, last), np.float64)[: len(contexts)]
  log_sum = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
  labels = ids[list(contexts)]
  return log_sum - logits[np.arange(len(labels)), labels], logits.argmax(-1) == labels


@pytest.mark.core
@pytest.mark.parametrize("stride", [1, 5, T])
def test_each_loss_is_that_of_the_token_after_its_context(params, stride):
  nats, hits = scored(params, IDS, T, stride, at_once=3)
  wanted = token_by_token(params, IDS, first_of_window(len(IDS), T, stride))
  # of nats up to 20: two orders of float32 sums, which sharp attention magnifies
  np.testing.assert_allclose(nats, wanted[0], rtol=0, atol=5e-5)
  np.testing.assert_array_equal(hits, wanted[1])
  assert abs(np.mean(nats, dtype=np.float64) - np.mean(wanted[0])) <= 1e-6


def test_a_text_shorter_than_the_window_is_one_window(params):
  nats, _ = scored(params, IDS[:9], 1000, 7, at_once=1)
  wanted, _ = token_by_token(params, IDS, {token: 0 for token in range(1, 9)})
  np.testing.assert_allclose(nats, wanted, rtol=0, atol=5e-5)


def test_a_run_that_begins_later_gives_the_rest(params):
  nats, hits = scored(params, IDS, T, 5, at_once=3)
  later = scored(params, IDS, T, 5, at_once=3, first=3)
  np.testing.assert_array_equal(later[0], nats[T + 10 :])
  np.testing.assert_array_equal(later[1], hits[T + 10 :])


def test_a_first_token_of_each_window_is_context_and_nothing_else(params):
  """Token 3 stands before each window's second token, and the same tokens are scored."""
  nats, _ = scored(params, IDS, T, 5, at_once=3, bos=3)
  windows = strided.cover(len(IDS), T, 5)
  for i, (end, count) in enumerate(zip(windows.ends, windows.counts, strict=True)):
    ids = np.concatenate([[3], IDS[end - T + 1 : end + 1]])
    np.testing.assert_array_equal(windows.tokens(IDS, i, 1, bos=3)[0], ids)
    wanted, _ = token_by_token(params, ids, {token: 0 for token in range(T - count + 1, T + 1)})
    np.testing.assert_allclose(nats[end - count : end], wanted, rtol=0, atol=5e-5)


def test_one_program_for_all_windows(params):
  scored(params, IDS, 7, 3, at_once=4)
  compilations.clear()
  scored(params, np.tile(IDS, 3), 7, 3, at_once=4)
  scored(params, IDS[:11], 7, 2, at_once=4)
  assert compilations == []


def test_the_perplexity_of_a_source_of_two_symbols(params):
  """A model that says p whatever it sees, on n_0 zeros and n_1 ones: exp(-(n_0 ln p_0 + n_1 ln p_1) / n)."""
  p = 0.8
  bias = np.full(V, -1e9, np.float32)
  bias[:2] = math.log(p), math.log(1 - p)
  fixed = {**params, "head_bias": jnp.asarray(bias), "head": jnp.zeros_like(params["head"])}
  ids = np.random.default_rng(2).choice(2, 500, p=[p, 1 - p]).astype(np.int32)
  zeros = int(np.sum(ids[1:] == 0))
  nats, hits = scored(fixed, ids, T, 4, at_once=3)
  entropy = -(zeros * math.log(p) + (499 - zeros) * math.log(1 - p)) / 499
  np.testing.assert_allclose(math.exp(np.mean(nats, dtype=np.float64)), math.exp(entropy), rtol=1e-6)
  assert np.sum(hits) == zeros


@given(st.integers(2, 300), st.integers(1, 60), st.integers(1, 20))
@settings(max_examples=100, deadline=None)
def test_stretches_of_text_take_every_token_once(n, blocks, at_once):
  edges = strided.block_edges(n, blocks)
  assert edges[0] == 1 and edges[-1] == n and len(edges) == min(blocks, n - 1) + 1
  sizes = np.diff(edges)
  assert sizes.min() >= 1 and sizes.max() - sizes.min() <= 1
  values = (
    np.random.default_rng(n).standard_normal(n).astype(np.float32)
  )  # of token 0 too, which has no place
  sums = np.zeros(len(sizes))
  for first in range(1, n, at_once):
    for i, amount in strided.block_sums(edges, first, values[first : first + at_once]).items():
      sums[i] += amount
  wanted = [values[a:b].astype(np.float64).sum() for a, b in itertools.pairwise(edges)]
  np.testing.assert_allclose(sums, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("place", "wrong"), [(0, -1), (7, V), (-1, 2**30)])
def test_ids_that_the_model_has_not(params, place, wrong):
  """On the host, before anything is compiled: JAX would read the last row of the embedding for them."""
  ids = IDS.copy()
  ids[place] = wrong
  with pytest.raises(
    TokenizerError, match=f"score_text: 1 of 40 tokens .* found id {wrong}, expected 0 to {V - 1}"
  ):
    scored(None, ids, 8, 4, 2)
  with pytest.raises(TokenizerError, match=f"found id {V}, expected"):
    scored(None, IDS, 8, 4, 2, bos=V)
