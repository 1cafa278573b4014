"""Caches that hold less than all keys and values in full: rings are exact, integers are off by half a step, cuts are undone."""

import dataclasses

import components
import generation_table
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_cases import CACHES, CALL, decoded, step
from model_cases import MODELS, B, T, params, structure, tables, tokens
from model_checks import full, relative_error

from jaxllm.config import Layer
from jaxllm.errors import ConfigError
from jaxllm.nn import Transformer, init_cache
from jaxllm.nn.store import Quantized
from jaxllm.position import StreamingRope

WINDOWED = ("nope", "alibi", "rope", "dynamic_ntk", "rerope", "streaming", "sinks")


COMPILED = {
  "ring": WINDOWED,
  "int8": ("rope", "dynamic_ntk", "rerope"),
  "int4": ("rope", "dynamic_ntk", "rerope"),
}
"""Models whose programs the default set compiles; all that these serve, which differ in data, are in it."""
SERVED = {kind: {structure(MODELS[name]) for name in names} for kind, names in COMPILED.items()}
EVERY = [(kind, name) for kind in CACHES if kind != "full" for name in MODELS]  # test_decoding.py has "full"


def row(kind, name):
  marks = [] if structure(MODELS[name]) in SERVED.get(kind, ()) else [pytest.mark.slow]
  marks += [pytest.mark.core] * ((kind, name) == ("ring", "rope"))
  return pytest.param(kind, name, marks=marks + [pytest.mark.component(kind)] * kind.startswith("int"))


@pytest.mark.parametrize(("kind", "name"), [row(*pair) for pair in EVERY])
def test_every_kind_gives_the_full_forward_pass_within_its_bound(kind, name):
  """And to the last bit the same, whatever is in slots that hold no token, and whichever ids are padding."""
  generation_table.about("cache", name)
  cfg, ids, cache = MODELS[name], tokens(), CACHES[kind].empty(MODELS[name])
  rings = [slots for slots in cache.slots if slots.call is not None]
  assert rings and all(slots.size < T for slots in rings)
  logits, last = decoded(cfg, ids, cache)
  np.testing.assert_array_equal(decoded(cfg, ids, cache, poison=np.nan, padding=7)[0], logits)
  error = relative_error(logits, full(cfg, ids))
  assert CACHES[kind].least <= error <= CACHES[kind].bound_of(name)
  generation_table.measured("cache", name, **{kind: error})
  generation_table.measured("cache", "bound", **{kind: CACHES[kind].bound})
  for x, number in zip(last.k, last.layers, strict=True):
    assert {leaf.shape[2] for leaf in jax.tree.leaves(x)} <= {last.slots[number].size, 4}  # or first slots


def test_rows_of_several_lengths_in_a_ring():
  cfg, ids, lengths = MODELS["rope"], tokens(), np.array([20, 7, 13])
  cache, found, done = (
    init_cache(cfg, B, T, call=CALL),
    np.zeros((B, T, cfg.vocab_size), "f"),
    np.zeros(B, int),
  )
  rng = np.random.default_rng(0)
  while (done < lengths).any():
    n = np.minimum(rng.integers(0, CALL + 1, B), lengths - done)
    at = np.minimum(done[:, None] + np.arange(CALL), T - 1)
    chunk = np.take_along_axis(ids, at, axis=1)
    logits, cache = step(cfg)(params(cfg), chunk, np.arange(CALL)[None] < n[:, None], cache, tables(cfg))
    for b in range(B):
      found[b, done[b] : done[b] + n[b]] = logits[b, : n[b]]
    done += n
  truth = full(cfg, ids)
  for b in range(B):
    assert relative_error(found[b, : lengths[b]], truth[b, : lengths[b]]) <= 1e-5


def test_a_streaming_cache_does_not_grow_with_the_text():
  """4 sinks and a window of 8: 16 slots a layer, whatever the capacity."""
  method = StreamingRope(100.0, original_length=12, window=8, sinks=4)
  cfg = dataclasses.replace(MODELS["streaming"], layers=(Layer(method),))
  small, large = (init_cache(cfg, B, capacity, call=CALL) for capacity in (T, 1 << 20))
  assert {s.size for s in large.slots} == {16}
  sizes = lambda cache: [x.nbytes for x in jax.tree.leaves(cache)]
  assert sizes(small) == sizes(large)
  assert relative_error(decoded(cfg, tokens(), large)[0], full(cfg, tokens())) <= 1e-5


def test_a_call_that_a_ring_cannot_hold_is_refused():
  cfg = MODELS["rope"]
  with pytest.raises(
    ConfigError, match=r"found a call of 5 tokens, expected at most 4.*init_cache\(call=5\)"
  ):
    Transformer(cfg).apply({"params": params(cfg)}, tokens()[:, :5], cache=init_cache(cfg, B, T, call=CALL))


def test_a_cut_cache_goes_on_as_if_nothing_had_been_read_since():
  """Up to a call's tokens, which a ring has written over the oldest ones."""
  cfg, ids = MODELS["rope"], tokens()
  for call in (CALL, None):
    cache = init_cache(cfg, B, T, call=call)
    _, cache = decoded(cfg, ids, cache, sizes=[4, 4, 4, 4])
    other = np.roll(ids, 5, axis=1)
    at = jnp.full(B, 16)
    wrong = step(cfg)(params(cfg), other[:, :CALL], np.ones((B, CALL), bool), cache, tables(cfg))[1]
    found, _ = decoded(cfg, ids[:, 16:], wrong.cut(at), sizes=[3, 1, 4])
    assert relative_error(found, full(cfg, ids)[:, 16:]) <= 1e-5
    np.testing.assert_array_equal(wrong.cut(at + 99).length, wrong.length)


def test_rows_can_be_taken():
  cfg, ids, rows = MODELS["rope"], tokens(), np.array([2, 2, 0])
  _, cache = decoded(cfg, ids, init_cache(cfg, B, T, call=CALL), sizes=[4, 4, 4])
  found, _ = decoded(cfg, ids[rows, 12:], jax.jit(type(cache).take)(cache, rows), sizes=[4, 4, 4])
  assert relative_error(found, full(cfg, ids)[rows, 12:]) <= 1e-5


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("H", [16, 15])
def test_a_number_is_off_by_half_a_step_and_the_first_slots_by_nothing(bits, H):
  """Against integers computed in float64, for rows written anywhere, of any scale, and constant ones."""
  store, rng = Quantized(bits, sinks=2), np.random.default_rng(bits)
  K, S = 2, 6
  x = (rng.normal(size=(1, S, K, H)) * 10.0 ** rng.integers(-3, 4, (1, S, K, 1)) + rng.normal()).astype("f")
  x[0, 3] = 0.7
  at = rng.permutation(S)[None]
  slots = store.write(store.empty(1, K, S, H, "float32"), at, jnp.asarray(x))
  assert slots.n.dtype == jnp.uint8 and slots.n.shape[-1] == (H if bits == 8 else (H + 1) // 2)
  found = np.asarray(store.read(slots, "float32"), np.float64)[0][:, at[0]].swapaxes(0, 1)
  low, step = x[0].min(-1, keepdims=True).astype(float), np.ptp(x[0].astype(float), axis=-1, keepdims=True)
  step = step / (2**bits - 1)
  off = np.abs(found - x[0])
  assert (off <= step / 2 * (1 + 1e-3) + 1e-6 * np.abs(x[0])).all()
  np.testing.assert_array_equal(off[at[0] < 2], 0)
  np.testing.assert_allclose(found[3], 0.7, rtol=1e-6)
  expected = low + step * np.round((x[0] - low) / np.where(step > 0, step, 1))
  rest = at[0] >= 2
  components.measured_close(f"int{bits}", "float64", found[rest], expected[rest], atol=1e-3)


def test_bytes_of_a_token():
  """int8 takes H + 8 bytes a head and token, int4 H / 2 + 8."""
  for bits in (8, 4):
    empty = jax.eval_shape(lambda bits=bits: Quantized(bits, sinks=0).empty(1, 1, 1000, 64, "bfloat16"))
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(empty)) == 1000 * (bits * 8 + 8)


@pytest.mark.parametrize("fields", [dict(bits=2), dict(sinks=-1), dict(sinks=1.0)])
def test_other_integers_are_refused(fields):
  (name,) = fields
  with pytest.raises(ConfigError, match=f"Quantized.{name}: found"):
    Quantized(**fields)
