"""Prefill and decoding with a cache against the full forward pass, for every position method."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import MODELS, B, T, each_cached, params, tables, tokens
from model_checks import (
  CHUNKINGS,
  check_decode,
  check_ragged,
  check_unused_slots,
  full,
  relative_error,
)

from jaxllm.errors import ConfigError
from jaxllm.nn import Context, Transformer, init_cache, transformer
from jaxllm.nn.store import write


@each_cached
@pytest.mark.parametrize("chunking", CHUNKINGS)
def test_chunks_give_the_full_forward_pass(name, chunking):
  check_decode(name, chunking)


@each_cached
def test_right_padded_rows_of_several_lengths(name):
  check_ragged(name)


@each_cached
def test_nan_in_unused_slots_changes_nothing(name):
  check_unused_slots(name)


@pytest.mark.core
def test_a_row_alone():
  cfg, ids = MODELS["rope"], tokens()
  model, rope, weights = Transformer(cfg), tables(cfg), params(cfg)
  alone = jax.jit(lambda weights, ids: model.apply({"params": weights}, ids, rope=rope)[0])
  truth = full(cfg, ids)
  for b in range(B):
    assert relative_error(alone(weights, ids[b : b + 1]), truth[b : b + 1]) <= 1e-5


def test_other_rows_do_not_matter():
  cfg, ids = MODELS["rope"], tokens()
  changed = np.where(np.arange(B)[:, None] == 1, ids, tokens(seed=1))
  np.testing.assert_array_equal(full(cfg, changed)[1], full(cfg, ids)[1])


def test_the_config_alone_gives_the_same():
  """Without rope=, the model makes its own tables: those of its config."""
  for name in ("dynamic_ntk, log-n at test time", "yarn, and the rest otherwise"):
    cfg, ids = MODELS[name], tokens()
    own = jax.jit(lambda weights, ids, cfg=cfg: Transformer(cfg).apply({"params": weights}, ids)[0])
    assert relative_error(own(params(cfg), ids), full(cfg, ids)) <= 5e-6, name


def test_logits_of_the_last_real_token_only():
  cfg, ids, lengths = MODELS["rope"], tokens(), np.array([24, 7, 1])
  context = Context(valid=np.arange(T)[None] < lengths[:, None])

  def parts(weights, ids):
    apply = lambda logits: Transformer(cfg).apply(
      {"params": weights}, ids, context, rope=tables(cfg), logits=logits
    )[0]
    return apply("last"), apply(None), apply("all")

  last, hidden, all_logits = map(np.asarray, jax.jit(parts)(params(cfg), ids))
  np.testing.assert_allclose(last[:, 0], all_logits[np.arange(B), lengths - 1], rtol=0, atol=2e-5)
  np.testing.assert_allclose(hidden @ params(cfg)["head"], all_logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("captured", [False, True])
def test_a_program_with_a_cache_traces_a_layer_of_each_kind_once(monkeypatch, captured):
  """Three layers of two kinds; each for itself where a caller captures what its layers give."""
  cfg, ids, traced = MODELS["rope"], tokens(), []
  truth = full(cfg, ids)

  class Counted(transformer.FeedForward):
    def __call__(self, x):
      traced.append(self.path)
      return super().__call__(x)

  monkeypatch.setattr(transformer, "FeedForward", Counted)
  weights = params(cfg)
  traced.clear()
  asked = dict(capture_intermediates=True, mutable="intermediates") if captured else {}
  apply = lambda weights, ids: Transformer(cfg).apply(
    {"params": weights}, ids, cache=init_cache(cfg, B, T), rope=tables(cfg), **asked
  )
  result = jax.jit(apply)(weights, ids)
  assert len(traced) == (3 if captured else 2)
  logits = result[0][0] if captured else result[0]
  assert relative_error(logits, truth) <= 1e-5


@pytest.mark.parametrize("name", ["rope", "dynamic_ntk"])
def test_padding_past_the_end_of_the_cache_overwrites_nothing(name):
  """A chunk of 4 tokens and 12 of padding, in a cache with room for 6 more: the full forward pass."""
  cfg, ids = MODELS[name], tokens()[:, :14]
  model, rope = Transformer(cfg), tables(cfg)

  def decode(weights, ids):
    cache = init_cache(cfg, B, 16)
    _, cache = model.apply({"params": weights}, ids[:, :10], cache=cache, rope=rope)
    padded = np.pad(np.arange(10, 14), (0, 12))
    chunk = Context(valid=np.broadcast_to(np.arange(16) < 4, (B, 16)))
    logits, cache = model.apply({"params": weights}, ids[:, padded], chunk, cache, rope)
    return logits[:, :4], cache.length

  logits, length = jax.jit(decode)(params(cfg), ids)
  assert relative_error(logits, full(cfg, tokens())[:, 10:14]) <= 1e-5
  np.testing.assert_array_equal(length, 14)


def test_a_full_cache_keeps_what_it_holds():
  slots = np.arange(2 * 4, dtype=np.float32).reshape(2, 1, 4, 1)
  found = write(jnp.asarray(slots), np.array([[3, 4], [4, 5]]), jnp.full((2, 1, 2, 1), -1.0))
  np.testing.assert_array_equal(found[..., 0, :, 0], [[0, 1, 2, -1], [4, 5, 6, 7]])


def test_a_full_cache_is_refused():
  cache = init_cache(MODELS["rope"], B, 8)
  cache.check_room(8)
  cache = dataclasses.replace(cache, length=np.array([2, 6, 0], np.int32))
  cache.check_room(2)
  with pytest.raises(ConfigError, match="6 tokens and 3 more do not fit in 8 slots"):
    cache.check_room(3)
  with pytest.raises(ConfigError, match="index and segment"):
    Transformer(MODELS["nope"]).apply(
      {"params": params(MODELS["nope"])}, tokens(), Context(segment=np.zeros((B, T), np.int32)), cache=cache
    )
