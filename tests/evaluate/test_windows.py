"""What is scored: windows that end at the same bytes, each byte once, each table as if it were alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.config import Layer, ModelConfig
from jaxllm.evaluate import windows as w
from jaxllm.nn import Transformer
from jaxllm.position import LogN, Rope
from jaxllm.tree import flatten, unflatten

TEXT = np.random.default_rng(0).integers(0, 256, 1000).astype(np.uint8)


@pytest.mark.core
def test_windows_of_every_length_end_with_the_same_block():
  cut = {length: w.cut_windows(TEXT, length, 64, 7) for length in (8, 16, 33, 64)}
  for length, found in cut.items():
    assert found.dtype == np.int32 and found.shape == (7, length + 1)
    np.testing.assert_array_equal(found[:, -9:], cut[8])
    np.testing.assert_array_equal(found, cut[64][:, -length - 1 :])


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 40), st.integers(0, 300))
@settings(max_examples=100, deadline=None)
def test_windows_are_stretches_at_one_stride_inside_the_text(count, length, longer, spare):
  longest = length + longer
  text = (np.arange(longest + 1 + count + spare) % 256).astype(np.uint8)
  found, stride = w.cut_windows(text, length, longest, count), w.window_stride(text, longest, count)
  assert stride >= 1
  for i, row in enumerate(found):
    end = longest + 1 + i * stride
    assert end <= len(text)
    np.testing.assert_array_equal(row, text[end - length - 1 : end])


@given(st.integers(1, 12), st.integers(0, 50))
@settings(max_examples=50, deadline=None)
def test_a_repeated_block_is_an_exact_tile_that_ends_as_the_window_does(block, more):
  windows = np.random.default_rng(block).integers(0, 256, (3, block + 1 + more))
  repeated = w.repeat_last_block(windows, block)
  assert repeated.shape == windows.shape
  np.testing.assert_array_equal(repeated[:, -block:], windows[:, -block:])
  np.testing.assert_array_equal(repeated[:, block:], repeated[:, :-block])


# Three layers with sharp attention; RoPE as trained, stretched and with log-n goes through one program.
T = 13
CFG = ModelConfig(
  vocab_size=256,
  embed_dim=24,
  num_layers=3,
  num_heads=2,
  num_kv_heads=1,
  head_dim=12,
  mlp_dim=32,
  layers=(Layer(Rope(base=100.0, original_length=8)),),
)
CONFIGS = {
  "none": CFG,
  "pi": CFG.with_position("pi", factor=4.0),
  "yarn": CFG.with_position("yarn", factor=4.0),
  "ntk, log-n": dataclasses.replace(CFG.with_position("ntk", factor=4.0), query_scale=LogN(8, 1.0)),
}
WINDOWS = w.cut_windows(TEXT, T, T, 6)


@pytest.fixture(scope="module")
def params():
  shapes = jax.eval_shape(Transformer(CFG).init, jax.random.key(0), WINDOWS[:1])["params"]
  rng = np.random.default_rng(1)
  flat = {
    path: rng.standard_normal(leaf.shape, np.float32)
    * (2 * leaf.shape[0] ** -0.5 if len(leaf.shape) > 1 else 1)
    for path, leaf in flatten(shapes).items()
  }
  return jax.tree.map(jnp.asarray, unflatten(flat))


def stacked(names):
  tables = [CONFIGS[name].rope_tables(seq_len=T) for name in names]
  return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *tables)


@pytest.fixture(scope="module")
def scored(params):
  return jax.device_get(w.score_windows(Transformer(CFG), params, WINDOWS, stacked(CONFIGS)))


def nats_and_hits(logits, labels):
  logits = np.asarray(logits, np.float64)
  log_sum = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
  return log_sum - np.take_along_axis(logits, labels[..., None], -1)[..., 0], logits.argmax(-1) == labels


@pytest.mark.parametrize("member", range(len(CONFIGS)))
def test_each_table_scores_as_its_own_model_does(params, scored, member):
  model = Transformer(CONFIGS[list(CONFIGS)[member]])
  logits, _ = jax.jit(model.apply)({"params": params}, WINDOWS[:, :-1])
  nats, hits = nats_and_hits(logits, WINDOWS[:, 1:])
  # of nats up to 20: two orders of float32 sums, which sharp attention magnifies
  np.testing.assert_allclose(scored[0][member], nats, rtol=0, atol=5e-5)
  np.testing.assert_array_equal(scored[1][member], hits)


def test_the_tables_do_differ(scored):
  for member in range(1, len(CONFIGS)):
    assert np.abs(scored[0][member] - scored[0][0]).max() > 0.1


def test_each_byte_is_scored_once_and_from_the_bytes_before_it_only(params, scored):
  # Row t holds the first t + 1 bytes and zeros behind them: the mean loss, a byte at a time.
  model, mean = Transformer(CFG), []
  last_logits = jax.jit(
    lambda prefixes: model.apply({"params": params}, prefixes)[0][jnp.arange(T), jnp.arange(T)]
  )
  for window in WINDOWS:
    prefixes = np.where(np.arange(T)[None] <= np.arange(T)[:, None], window[None, :-1], 0)
    nats, _ = nats_and_hits(last_logits(prefixes), window[1:])
    mean.append(nats.mean())
  np.testing.assert_allclose(np.mean(scored[0][0], axis=1, dtype=np.float64), mean, rtol=0, atol=1e-6)
  assert abs(w.bits_per_byte(scored[0][0]) - np.mean(mean) / np.log(2)) <= 1e-6


def test_batches_of_windows_do_not_change_a_score(params, scored, monkeypatch):
  monkeypatch.setattr(w, "TOKENS_AT_ONCE", 2 * T)
  jitted = jax.jit(w.score_windows.__wrapped__, static_argnames="model")
  nats, hits = jitted(Transformer(CFG), params, WINDOWS, stacked(CONFIGS))
  np.testing.assert_allclose(nats, scored[0], rtol=0, atol=1e-5)
  np.testing.assert_array_equal(hits, scored[1])


def test_bits_are_summed_in_float64():
  nats = np.full(2**20 + 1, 0.1, np.float32)
  assert abs(w.bits_per_byte(nats) - float(np.float32(0.1)) / np.log(2)) < 1e-12
