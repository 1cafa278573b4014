"""What blocks and attention may be told: a prefix, layer scaling, a shrunk embedding gradient, soft caps."""

import dataclasses

import components
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import MODELS, B, T, params, tables, tokens
from model_checks import PREFIX, check_prefix, full, relative_error, with_prefix

from jaxllm.nn import Context, Transformer, attention, init_cache
from jaxllm.nn.transformer import head
from jaxllm.ops.blockwise import Blockwise
from jaxllm.ops.head import shrink_gradient
from jaxllm.ops.losses import cross_entropy
from jaxllm.tree import flatten, stack_layers, unflatten

ROPE = MODELS["rope"]


@pytest.mark.core
@pytest.mark.parametrize("name", ["rope", "deepnorm_glm", "rerope"])
def test_a_prefix_is_seen_from_both_sides(name):
  check_prefix(name)


def test_a_changed_token_of_the_prefix_moves_earlier_logits_and_one_after_it_does_not():
  ids, before = tokens(), with_prefix(ROPE, tokens())
  for t, moves in ((7, True), (15, False)):
    changed = ids.copy()
    changed[0, t] = (ids[0, t] + 1) % ROPE.vocab_size
    moved = np.abs(with_prefix(ROPE, changed) - before)[0, :t].max()
    assert moved > 1e-3 if moves else moved == 0, (t, moved)


def test_a_prefix_under_tiles_and_in_a_cache():
  ids = tokens()
  tiles = dataclasses.replace(ROPE, attention=Blockwise(5, 7))
  assert relative_error(with_prefix(tiles, ids), with_prefix(ROPE, ids)) <= 2e-6
  cache, weights = init_cache(ROPE, B, T), params(ROPE)
  step = jax.jit(lambda p, ids, context, cache: Transformer(ROPE).apply({"params": p}, ids, context, cache))
  first, cache = step(weights, ids[:, :12], Context(prefix=PREFIX), cache)
  rest, _ = step(weights, ids[:, 12:], Context(), cache)
  assert relative_error(np.concatenate([first, rest], axis=1), with_prefix(ROPE, ids)) <= 1e-5


def test_layer_scaling_keeps_float16_finite():
  """Where the third layer's q k^T / sqrt(H) is above float16's 65504, what is computed of it with layer scaling is not.

  Scores are accumulated in float32 here, so neither overflows; what the trick promises is the range.
  """
  large = lambda path, x: x * 140 if path in ("layers/2/attn/q/w", "layers/2/attn/k/w") else x
  weights = unflatten({path: large(path, x) for path, x in flatten(params(ROPE)).items()})
  plain, scaled = (dataclasses.replace(ROPE, layer_scaling=on) for on in (False, True))
  ids = tokens()
  assert relative_error(full(scaled, ids, weights=weights), full(plain, ids, weights=weights)) <= 1e-5

  def largest(cfg):
    """The largest score that the third layer computes before it multiplies by its number, read off a capped model."""
    seen = []

    def core(q, k, v, q_side, k_side, window, score, sinks):
      seen.append(jnp.max(jnp.abs(jnp.einsum("BTKGH,BSKH->BKGTS", q.reshape(B, T, 2, 2, -1), k))))
      return cfg.attention(q, k, v, q_side, k_side, window, score, sinks)

    spy = dataclasses.replace(cfg, attention=core)
    Transformer(spy).apply({"params": weights}, ids, rope=tables(cfg))
    return float(seen[2])

  assert largest(plain) > 65504 > largest(scaled) > 20_000


@pytest.mark.parametrize("tied", [False, True])
def test_a_shrunk_embedding_gradient_is_a_tenth_and_nothing_else_changes(tied):
  plain = dataclasses.replace(ROPE, num_layers=1, layers=ROPE.layers[:1], tie_embeddings=tied)
  shrunk, ids = dataclasses.replace(plain, embed_gradient=0.1), tokens()

  def run(cfg):
    def loss(p):
      hidden, _ = Transformer(cfg).apply({"params": p}, ids, logits=None)
      return jnp.mean(cross_entropy(hidden, head(cfg, p), ids)[0])

    return jax.jit(jax.value_and_grad(loss))(params(plain))

  (loss, grads), (shrunk_loss, shrunk_grads) = run(plain), run(shrunk)
  assert loss == shrunk_loss
  expected, found = flatten(grads), flatten(shrunk_grads)
  for path in expected:
    share = 0.1 if path == "embed" else 1
    np.testing.assert_allclose(found[path], expected[path] * share, rtol=1e-5, atol=1e-9, err_msg=path)
  error = relative_error(found["embed"], 0.1 * expected["embed"])
  components.measured("embed_gradient", "a tenth of jax.grad", error)


def test_shrinking_keeps_every_bit():
  x = np.random.default_rng(0).standard_normal(10_000) * 10.0 ** np.arange(-20, 20).repeat(250)
  x = x.astype(np.float32)
  np.testing.assert_array_equal(jax.jit(lambda x: shrink_gradient(x, 0.1))(x), x)


def test_a_scanned_layer_knows_its_number(monkeypatch):
  """The scaling cancels, so it is made to show: by scores that are not linear in the queries."""
  linear = attention.inner_products
  monkeypatch.setattr(attention, "inner_products", lambda q, k: jnp.tanh(linear(q, k)))
  cfg = dataclasses.replace(ROPE, num_layers=3, layers=ROPE.layers[:1], layer_scaling=True)
  weights = params(cfg)
  unrolled = Transformer(cfg).apply({"params": weights}, tokens())[0]
  scanned = Transformer(cfg, scan=True).apply({"params": stack_layers(weights, 1)}, tokens())[0]
  unscaled = dataclasses.replace(cfg, layer_scaling=False)
  plain = Transformer(unscaled, scan=True).apply({"params": stack_layers(weights, 1)}, tokens())[0]
  assert relative_error(scanned, unrolled) <= 1e-5
  assert relative_error(plain, unrolled) > 1e-2


@pytest.mark.parametrize("cap", [1.0, 30.0])
def test_soft_caps_bound_logits(cap):
  logits = full(dataclasses.replace(ROPE, logit_softcap=cap), tokens())
  assert np.abs(logits).max() <= cap
  raw = full(ROPE, tokens())
  np.testing.assert_allclose(
    logits, cap * np.tanh(raw.astype(np.float64) / cap), rtol=0, atol=5e-6 * np.abs(raw).max()
  )
