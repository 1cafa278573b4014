"""Contrastive search: the likely token that repeats the text before it least."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import ConfigError, SamplingError
from jaxllm.generate import loop, request
from jaxllm.generate.output import ENDED, Generated
from jaxllm.nn import STORES, Cache, Context, Transformer, init_cache
from jaxllm.nn.store import Full, Quantized
from jaxllm.nn.transformer import head
from jaxllm.position import PositionTables
from jaxllm.sampling import check_logits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """step tokens were taken; hidden [B, S, D]: directions of the hidden states of all tokens in the cache, 0 for none."""

  step: jax.Array
  new: jax.Array
  logits: jax.Array
  hidden: jax.Array
  cache: Cache
  done: jax.Array
  bad: jax.Array


def generate(
  model: Transformer,
  params: Any,
  prompts: Sequence[Sequence[int]],
  *,
  alpha: float = 0.6,
  top_k: int = 4,
  max_new_tokens: int = loop.NEW_TOKENS,
  stop_ids: Iterable[int] | None = None,
  store: Full | Quantized = STORES["full"],
) -> Generated:
  """token_t = argmax over the top_k likeliest v of (1 - alpha) p(v) - alpha max_j cos(h_v, h_j), j < t.

  h_v is the last hidden state of v read after the text, h_j those of the tokens before it, prompt included.  alpha 0 is greedy.
  A step reads top_k tokens a row; prompts are read in one call.  Compiled once a batch size, bucket of prompt lengths, room for
  new tokens (request.SLOTS apart) and top_k.  Raises ConfigError for an alpha outside [0, 1], and a top_k
  that is no integer from 1 to the size of the vocabulary; the other arguments and errors are those of `loop.generate`.
  Source: Su et al. (2022), "A contrastive framework for neural text generation", equation 5.
  """
  cfg = request.checked_model(model, params)
  max_new_tokens = request.count("max_new_tokens", max_new_tokens)
  alpha, store = request.number("alpha", alpha, 0, 1), request.store(store)
  if request.count("top_k", top_k) > cfg.vocab_size:
    raise ConfigError(f"top_k: found {top_k}, expected at most the vocabulary, {cfg.vocab_size}")
  given, capacity = request.prepared(cfg, prompts, max_new_tokens, stop_ids, request.ANY)
  request.check_memory(cfg, top_k * len(prompts), capacity, None, store, reach=capacity)
  tables = jax.device_put(cfg.rope_tables(max_len=capacity))
  state = search(
    model,
    params,
    tables,
    given,
    np.float32(alpha),
    np.int32(max_new_tokens),
    int(top_k),
    request.room(max_new_tokens),
    capacity,
    store,
  )
  new_BT, done_B, bad_B = jax.device_get((state.new, state.done, state.bad))
  if bad_B.any():
    raise SamplingError(
      f"row {bad_B.argmax()}: found NaN, +inf or nothing finite in the logits, expected finite ones; check the parameters and "
      f"the model's dtype = {cfg.dtype}"
    )
  tokens = [[token for token in row if token != ENDED] for row in new_BT.tolist()]
  return Generated(tokens, ["stop" if done else "length" for done in done_B])


@functools.partial(jax.jit, static_argnames=("model", "top_k", "room", "capacity", "store"))
def search(
  model: Transformer,
  params: Any,
  tables: PositionTables,
  prompts: request.Prompts,
  alpha: jax.Array,
  max_new_tokens: jax.Array,
  top_k: int,
  room: int,
  capacity: int,
  store: Full | Quantized,
) -> State:
  """The state when every row has ended."""
  tokens_BT, length_B, stop_V = prompts
  B, T = tokens_BT.shape
  to_logits = head(model.cfg, params)
  valid_BT = jnp.arange(T)[None] < length_B[:, None]
  cache = dataclasses.replace(init_cache(model.cfg, B, capacity, store=store), fresh=True)
  variables = {"params": params}
  hidden_BTD, cache = model.apply(variables, tokens_BT, Context(valid=valid_BT), cache, tables, logits=None)
  last_BD = jnp.take_along_axis(hidden_BTD, (length_B - 1)[:, None, None], axis=1)[:, 0]
  seen_BTD = jnp.where(valid_BT[..., None], direction(hidden_BTD), 0.0)
  none_B = jnp.zeros((B,), bool)
  state = State(
    jnp.int32(0),
    jnp.full((B, room), ENDED, jnp.int32),
    to_logits(last_BD[:, None])[:, 0],
    jnp.pad(seen_BTD, ((0, 0), (0, room), (0, 0))),
    cache,
    none_B,
    none_B,
  )

  def one_step(state):
    p_BC, token_BC = jax.lax.top_k(jax.nn.softmax(state.logits, axis=-1), top_k)
    candidates = state.cache.take(jnp.repeat(jnp.arange(B), top_k))
    hidden, candidates = model.apply(
      variables, token_BC.reshape(-1, 1), cache=candidates, rope=tables, logits=None
    )
    hidden_BCD = hidden.reshape(B, top_k, -1)
    way_BCD = direction(hidden_BCD)
    cosine = jnp.einsum("BCD,BSD->BCS", way_BCD, state.hidden, precision="highest")
    read_BS = jnp.any(state.hidden != 0, axis=-1)
    likeness_BC = jnp.max(jnp.where(read_BS[:, None], cosine, -1.0), axis=-1)
    best_B = jnp.argmax((1 - alpha) * p_BC - alpha * likeness_BC, axis=1)
    of_best = lambda x: jax.vmap(lambda row, i: row[i])(x, best_B)
    token_B = of_best(token_BC)
    rows = jnp.arange(B) * top_k + best_B
    return State(
      state.step + 1,
      state.new.at[:, state.step].set(jnp.where(state.done, ENDED, token_B)),
      to_logits(of_best(hidden_BCD)[:, None])[:, 0],
      state.hidden.at[:, T + state.step].set(of_best(way_BCD)),
      candidates.take(rows),
      state.done | stop_V[token_B],
      state.bad | (~state.done & ~check_logits(state.logits)),
    )

  unfinished = lambda state: (state.step < max_new_tokens) & ~jnp.all(state.done) & ~jnp.any(state.bad)
  return jax.lax.while_loop(unfinished, one_step, state)


def direction(x: jax.Array) -> jax.Array:
  """x / ||x||_2 over the last axis, float32."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-30))
