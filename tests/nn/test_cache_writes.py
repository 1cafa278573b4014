"""Where a call's tokens go in the slots of a cache, and that a loop of calls changes them where they lie."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import MODELS, params, tables

from jaxllm import parallel
from jaxllm.nn import Transformer, init_cache, store
from jaxllm.nn.context import Context


def rows_apart(slots_BKS, at_BT, new_BKT):
  """The same write with rows as an axis of its own, as it is on a mesh."""
  row = lambda slots, at, new: slots.at[:, at].set(new, mode="drop", unique_indices=True)
  return jax.vmap(row)(slots_BKS, at_BT, new_BKT)


@pytest.mark.core
@pytest.mark.parametrize("rest", [(), (3,)])
def test_tokens_go_to_their_slots_and_those_outside_of_them_nowhere(rest):
  """In one write of all rows, and in one of each, as a mesh has it."""
  rng, (B, K, S, T) = np.random.default_rng(0), (3, 2, 5, 4)
  slots = rng.normal(size=(B, K, S, *rest)).astype(np.float32)
  new = rng.normal(size=(B, K, T, *rest)).astype(np.float32)
  at = np.array([[1, 2, 3, 4], [3, 4, 5, 6], [0, 5, -1, 9]], np.int32)
  expected = slots.copy()
  for b, row in enumerate(at):
    for t, place in enumerate(row):
      if 0 <= place < S:
        expected[b, :, place] = new[b, :, t]
  np.testing.assert_array_equal(store.write(*map(jnp.asarray, (slots, at, new))), expected)
  np.testing.assert_array_equal(jax.jit(store.write)(slots, at, new), expected)
  with jax.set_mesh(parallel.make_mesh("data=2", jax.devices()[:2])):
    np.testing.assert_array_equal(jax.jit(store.write)(slots, at, new), expected)


def copies(batch):
  """How many copies of a layer's slots a loop that decodes has, beside those before it."""
  cfg, S = MODELS["rope"], 48
  cache = init_cache(cfg, batch, S)

  def loop(p, cache, token):
    def step(carry):
      cache, token = carry
      logits, cache = Transformer(cfg).apply({"params": p}, token, Context(), cache, tables(cfg, 0))
      return cache, jnp.argmax(logits, axis=-1).astype(jnp.int32)

    return jax.lax.while_loop(lambda carry: carry[0].length[0] < S, step, (cache, token))

  lowered = jax.jit(loop, donate_argnums=1).lower(params(cfg), cache, jnp.zeros((batch, 1), jnp.int32))
  shape = ",".join(map(str, cache.k[0].shape))
  body = lowered.compile().as_text().split("ENTRY")[0]
  return len(re.findall(rf"= f32\[{shape}\]\S* copy\(", body))


@pytest.mark.parametrize("batch", [1, 3])
def test_a_loop_does_not_copy_the_slots(batch, monkeypatch):
  assert copies(batch) == 0
  if batch == 1:  # what the other way of writing costs
    monkeypatch.setattr(store, "write", rows_apart)
    assert copies(batch) > 0
