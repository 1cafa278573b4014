"""Properties that hold for every model, as functions, so that test_sabotage can show that each can fail."""

import dataclasses
import os

import components
import generation_table
import jax
import jax.numpy as jnp
import numpy as np
import oracle
from model_cases import MODELS, B, T, params, structure, tables, tokens

from jaxllm.nn import Context, Transformer, init_cache

PROGRAMS = {}
"""Compiled programs by kind and config; patched code needs an empty one."""

AS_USED = {"xla_backend_optimization_level": 3}
if "xla_cpu_use_fusion_emitters" in os.environ["XLA_FLAGS"]:  # jaxlib has it
  AS_USED["xla_cpu_use_fusion_emitters"] = True
OPTIMIZED = structure(MODELS["rope"])
"""Its forward passes are compiled as users have them; all else without LLVM's optimizations (conftest.py)."""


def program(kind, cfg):
  """The jitted function `kind` for the structure of cfg."""
  cfg = structure(cfg)
  if (kind, cfg) not in PROGRAMS:
    options = AS_USED if cfg == OPTIMIZED and kind in ("forward", "step") else None
    PROGRAMS[kind, cfg] = jax.jit(KINDS[kind](Transformer(cfg)), compiler_options=options)
  return PROGRAMS[kind, cfg]


def _forward(model):
  return lambda params, tokens, pos, rope: model.apply(
    {"params": params}, tokens, Context(pos=pos), rope=rope
  )[0]


def _step(model):
  return lambda params, tokens, valid, cache, rope: model.apply(
    {"params": params}, tokens, Context(valid=valid), cache=cache, rope=rope
  )


def _gradient(model):
  def loss(params, tokens, labels, weights, context, rope):
    logits, _ = model.apply({"params": params}, tokens, context, rope=rope)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(weights != 0, nll * weights, 0))

  return jax.grad(loss)


def _prefix(model):
  return lambda params, tokens, context, rope: model.apply({"params": params}, tokens, context, rope=rope)[0]


KINDS = {"forward": _forward, "step": _step, "gradient": _gradient, "prefix": _prefix}


def relative_error(found, truth):
  """max |found - truth| / max |truth|; NaN anywhere is infinitely wrong."""
  found, truth = np.asarray(found, np.float64), np.asarray(truth, np.float64)
  error = np.max(np.abs(found - truth)) / np.max(np.abs(truth))
  return np.inf if np.isnan(error) else error


def positions(offset=0):
  return np.arange(offset, offset + T, dtype=np.int32)[None]


def full(cfg, ids, offset=0, weights=None):
  """Logits [B, T, V] of one forward pass."""
  weights = params(cfg) if weights is None else weights
  return np.asarray(program("forward", cfg)(weights, ids, positions(offset), tables(cfg, offset)))


def chunked(cfg, ids, lengths_CB, sizes_C, poison=None, padding=3):
  """(logits [B, T, V] through the cache, tokens done [B]).

  Chunk c is sizes_C[c] wide, and row b has lengths_CB[c][b] real tokens in it.  Unused slots hold `poison`
  before every call, where it is given.
  """
  step, p, rope = program("step", cfg), params(cfg), tables(cfg)
  cache, done, out = init_cache(cfg, B, T), np.zeros(B, int), np.zeros((B, T, cfg.vocab_size), np.float32)
  for size, lengths in zip(sizes_C, lengths_CB, strict=True):
    cache.check_room(size)
    if poison is not None:
      unused = (np.arange(T) >= done[:, None])[:, None, :, None]
      spoil = lambda slots, unused=unused: tuple(jnp.where(unused, poison, x) for x in slots)
      cache = dataclasses.replace(cache, k=spoil(cache.k), v=spoil(cache.v))
    valid = np.arange(size)[None] < np.asarray(lengths)[:, None]
    at = np.minimum(done[:, None] + np.arange(size), T - 1)
    chunk = np.where(valid, np.take_along_axis(ids, at, axis=1), padding).astype(np.int32)
    logits, cache = step(p, chunk, valid, cache, rope)
    for b, n in enumerate(lengths):
      out[b, done[b] : done[b] + n] = logits[b, :n]
    done += lengths
    np.testing.assert_array_equal(cache.length, done)
  return out, done


CHUNKINGS = {
  "prefill, then decode": [8] + [1] * 16,
  "decode only": [1] * T,
  "chunks": [8, 8, 8],
  "uneven": [1, 1, 8, 1, 1, 1, 8, 1, 1, 1],
}
RAGGED = (
  [(8, 5, 1)] + [(1, 1, 1)] * 5 + [(3, 8, 1)]
)  # rows of 16, 18 and 7 tokens: on both sides of the trained length
RAGGED_SIZES = [8] + [1] * 5 + [8]


def check_oracle(name, offset=0, tolerance=5e-6):
  """float32 logits are those of a float64 decoder, at any position."""
  cfg, ids = MODELS[name], tokens()
  truth = oracle.logits(cfg, params(cfg), ids, positions(offset)[0])
  error = relative_error(full(cfg, ids, offset), truth)
  assert error <= tolerance, f"{name} at {offset}: {error:.2e} > {tolerance}"
  components.measured(cfg, "float64", error)


def check_large_mean(name, tolerance=1e-4):
  """Embeddings with a mean of 60: float32 holds a residual of 90 to 8e-6, so twenty times the tolerance."""
  cfg, ids, weights = MODELS[name], tokens(), params(MODELS[name])
  weights = weights | {"embed": weights["embed"] + 60}
  error = relative_error(full(cfg, ids, weights=weights), oracle.logits(cfg, weights, ids))
  assert error <= tolerance, f"{name} with a large mean: {error:.2e} > {tolerance}"


def check_small_embeddings(name, tolerance=5e-6):
  """Embeddings of 1e-3, whose mean square is the eps of the first norm: it is inside the root."""
  cfg, ids, weights = MODELS[name], tokens(), params(MODELS[name])
  weights = weights | {"embed": np.float32(1e-3) * weights["embed"]}
  error = relative_error(full(cfg, ids, weights=weights), oracle.logits(cfg, weights, ids))
  assert error <= tolerance, f"{name} with small embeddings: {error:.2e} > {tolerance}"


PREFIX = np.array([9, 0, 1], np.int32)


def with_prefix(cfg, ids):
  """Logits where the first tokens of each row see each other both ways."""
  context = Context(pos=positions(), prefix=PREFIX)
  return np.asarray(program("prefix", cfg)(params(cfg), ids, context, tables(cfg)))


def check_prefix(name, tolerance=5e-6):
  """By the float64 decoder, a row at a time; a prefix of 0 or 1 is plain causality."""
  cfg, ids = MODELS[name], tokens()
  found = with_prefix(cfg, ids)
  for b, n in enumerate(PREFIX):
    error = relative_error(found[b], oracle.logits(cfg, params(cfg), ids[b : b + 1], prefix=int(n))[0])
    assert error <= tolerance, f"{name} with a prefix of {n}: {error:.2e} > {tolerance}"
    components.measured("prefix", "float64", error)
  assert relative_error(found[1:], full(cfg, ids)[1:]) <= 1e-6


def check_decode(name, chunking="prefill, then decode", tolerance=1e-5):
  """Prefill and decoding in chunks give the logits of the full forward pass at every position."""
  generation_table.about("cache", name)
  cfg, ids, sizes = MODELS[name], tokens(), CHUNKINGS[chunking]
  found, _ = chunked(cfg, ids, [(n,) * B for n in sizes], sizes)
  error = relative_error(found, full(cfg, ids))
  assert error <= tolerance, f"{name}, {chunking}: {error:.2e} > {tolerance}"
  generation_table.measured("cache", name, full=error)
  generation_table.measured("cache", "bound", full=tolerance)


def check_ragged(name, tolerance=1e-5):
  """Rows of several lengths in one right-padded batch are as each row alone."""
  generation_table.about("cache", name)
  cfg, ids = MODELS[name], tokens()
  found, done = chunked(cfg, ids, RAGGED, RAGGED_SIZES)
  truth = full(cfg, ids)
  for b in range(B):
    error = relative_error(found[b, : done[b]], truth[b, : done[b]])
    assert error <= tolerance, f"{name}, row {b}: {error:.2e} > {tolerance}"
    generation_table.measured("cache", name, full=error)


def check_unused_slots(name):
  """NaN in the slots that hold no token, and other ids of padding, change nothing, to the last bit."""
  cfg, ids = MODELS[name], tokens()
  clean, _ = chunked(cfg, ids, RAGGED, RAGGED_SIZES)
  poisoned, _ = chunked(cfg, ids, RAGGED, RAGGED_SIZES, poison=np.nan, padding=17)
  np.testing.assert_array_equal(poisoned, clean)


def check_shift(name, shift=1_000_000, tolerance=1e-5):
  """Where only relative positions matter, the same tokens a million positions on have the same logits."""
  cfg, ids = MODELS[name], tokens()
  error = relative_error(full(cfg, ids, shift), full(cfg, ids))
  assert error <= tolerance, f"{name} shifted by {shift}: {error:.2e} > {tolerance}"


def gradient(name, ids, weights, context=None, num_layers=1):
  """d sum(weights * loss) / d parameters of a model of the first layers, the label of a token being its id + 1."""
  cfg = dataclasses.replace(MODELS[name], num_layers=num_layers, layers=MODELS[name].layers[:num_layers])
  context = Context(pos=positions(), valid=np.ones((B, T), bool)) if context is None else context
  labels = (ids + 1) % cfg.vocab_size
  return program("gradient", cfg)(params(cfg), ids, labels, weights, context, tables(cfg))


def check_later_tokens(name):
  """Logits up to t do not change by one bit when later tokens do."""
  cfg, ids, t = MODELS[name], tokens(), 13
  changed = np.where(np.arange(T) > t, tokens(seed=1), ids)
  assert (changed != ids).any()
  before, after = full(cfg, ids), full(cfg, changed)
  np.testing.assert_array_equal(after[:, : t + 1], before[:, : t + 1])
  assert np.abs(after[:, t + 1 :] - before[:, t + 1 :]).max() > 1e-3


def check_finite_gradient(name):
  """A row of padding, whose queries see no key, leaves the gradients of the others finite."""
  valid = np.ones((B, T), bool)
  valid[1] = False
  weights = np.broadcast_to(valid, (B, T)).astype(np.float32)
  grads = gradient(name, tokens(), weights, Context(pos=positions(), valid=valid))
  assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(grads)), (
    f"{name}: a gradient is not finite"
  )
