"""Generation token by token: one compiled program reads the prompts, another draws the tokens in chunks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import SamplingError
from jaxllm.generate import request
from jaxllm.nn import Cache, Context, Transformer, init_cache
from jaxllm.position import PositionTables
from jaxllm.sampling import NOTHING, Greedy, Sampler, check_logits

ENDED = -1
"""Stands where a token would, in rows that ended before."""

SLOTS = 128
"""Cache capacities are multiples of it, so that one program serves many lengths of prompt and output."""


@dataclasses.dataclass(frozen=True)
class Generated:
  """New ids a row, with the stop id that ended it; and why it ended: a stop id, or max_new_tokens."""

  tokens: list[list[int]]
  reasons: list[Literal["stop", "length"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """What decoding carries: `step` tokens a row were drawn, and all but the newest are in the cache.

  memory: the sampler's state; key [B]: each row's own, from which a step folds its own; token [B]: the
  newest; done [B]: the row met a stop id; bad [B]: its logits are no distribution, or the sampler left nothing.
  """

  cache: Cache
  memory: Any
  key: jax.Array
  token: jax.Array
  step: jax.Array
  done: jax.Array
  bad: jax.Array

  @property
  def over(self) -> jax.Array:
    """Whether nothing is left to draw: every row has ended, or one cannot go on."""
    return jnp.all(self.done) | jnp.any(self.bad)


def generate(
  model: Transformer,
  params: Any,
  prompts: Sequence[Sequence[int]],
  *,
  sampler: Sampler = Greedy(),  # noqa: B008 (a frozen value)
  key: jax.Array | None = None,
  max_new_tokens: int = 128,
  stop_ids: Iterable[int] | None = None,
  rope: PositionTables | None = None,
  chunk: int = 32,
) -> Generated:
  """Draws token_t from sampler(logits(prompt, tokens before t)), row by row, to a stop id or max_new_tokens.

  prompts: lists of ids, of any lengths.  key: one key, of which row i uses fold_in(key, i), or one a row; its
  token t uses fold_in(row's key, t).  A row depends on its own prompt and key alone: of its batch, it sees no
  more than the rounding of sums over a larger bucket.  stop_ids: () never stops early; None means the
  config's eos_ids.  rope: tables of fixed frequencies in place of the
  config's, as in Transformer.  chunk: how many tokens are drawn between two looks of the host, which changes
  none of them.

  Compiled once a batch size, bucket of prompt lengths (powers of two) and cache capacity (SLOTS apart);
  sampler parameters, stop ids, tables and max_new_tokens are data.  Raises DataError for an empty prompt,
  TokenizerError for an id outside the vocabulary, SamplingError for logits with NaN, +inf or nothing finite, or
  of which the sampler leaves nothing, ConfigError for the other arguments, and where a learned table has fewer
  positions than the longest prompt with its new tokens.
  """
  cfg = model.cfg
  max_new_tokens, chunk = request.count("max_new_tokens", max_new_tokens), request.count("chunk", chunk)
  tokens_BT, length_B = request.padded(prompts, cfg.vocab_size, cfg.length_limit)
  cfg.check_length(int(length_B.max()) + max_new_tokens, "longest prompt and max_new_tokens")
  key_B = request.row_keys(key, sampler, len(length_B))
  capacity = -(-(tokens_BT.shape[1] + max_new_tokens) // SLOTS) * SLOTS
  capacity = capacity if cfg.length_limit is None else min(capacity, cfg.length_limit)
  tables = cfg.rope_tables(max_len=capacity) if rope is None else request.fixed(rope)
  stop_V = request.stop_mask(cfg.eos_ids if stop_ids is None else stop_ids, cfg.vocab_size)
  tables, stop_V = jax.device_put((tables, stop_V))

  state, new_BT = prefill(model, params, tables, sampler, stop_V, tokens_BT, length_B, key_B, capacity)
  chunks = [np.asarray(new_BT)]
  while not state.over and int(state.step) < max_new_tokens:
    state, new_BT = decode(model, params, tables, sampler, stop_V, np.int32(max_new_tokens), state, chunk)
    chunks.append(np.asarray(new_BT))

  done_B, bad_B = jax.device_get((state.done, state.bad))
  if bad_B.any():
    raise SamplingError(
      f"row {bad_B.argmax()}: found NaN, +inf or nothing finite in the logits of new token "
      f"{int(state.step) - 1}, expected finite ones (or -inf for some), of which the sampler leaves one; check the "
      f"parameters, the model's dtype = {cfg.dtype} and what the sampler excludes"
    )
  tokens = [[token for token in row if token != ENDED] for row in np.concatenate(chunks, axis=1).tolist()]
  return Generated(tokens, ["stop" if done else "length" for done in done_B])


@functools.partial(jax.jit, static_argnames=("model", "capacity"))
def prefill(
  model: Transformer,
  params: Any,
  tables: PositionTables,
  sampler: Sampler,
  stop_V: jax.Array,
  tokens_BT: jax.Array,
  length_B: jax.Array,
  key_B: jax.Array,
  capacity: int,
) -> tuple[State, jax.Array]:
  """Reads right-padded prompts into a new cache and draws a first token: (state, new ids [B, 1])."""
  B, T = tokens_BT.shape
  context = Context(valid=jnp.arange(T)[None] < length_B[:, None])
  cache = init_cache(model.cfg, B, capacity)
  logits_B1V, cache = model.apply({"params": params}, tokens_BT, context, cache, tables, logits="last")
  none_B, memory = jnp.zeros((B,), bool), sampler.init(tokens_BT, length_B, capacity - T)
  state = State(cache, memory, key_B, jnp.zeros((B,), jnp.int32), jnp.int32(0), done=none_B, bad=none_B)
  state, new_B = draw(sampler, stop_V, logits_B1V[:, 0], state)
  return state, new_B[:, None]


@functools.partial(jax.jit, static_argnames=("model", "chunk"), donate_argnames=("state",))
def decode(
  model: Transformer,
  params: Any,
  tables: PositionTables,
  sampler: Sampler,
  stop_V: jax.Array,
  max_new_tokens: jax.Array,
  state: State,
  chunk: int,
) -> tuple[State, jax.Array]:
  """Up to `chunk` more tokens: (state, new ids [B, chunk], ENDED where there are none)."""
  start, end = state.step, jnp.minimum(state.step + chunk, max_new_tokens)

  def unfinished(carry):
    state, _ = carry
    return (state.step < end) & ~state.over

  def one_token(carry):
    state, new_BT = carry
    logits_B1V, cache = model.apply({"params": params}, state.token[:, None], cache=state.cache, rope=tables)
    moved, new_B = draw(sampler, stop_V, logits_B1V[:, 0], dataclasses.replace(state, cache=cache))
    return moved, new_BT.at[:, state.step - start].set(new_B)

  none_BT = jnp.full((len(state.done), chunk), ENDED, jnp.int32)
  return jax.lax.while_loop(unfinished, one_token, (state, none_BT))


def draw(sampler: Sampler, stop_V: jax.Array, logits_BV: jax.Array, state: State) -> tuple[State, jax.Array]:
  """The next token of every row: (state, new ids [B], ENDED where the row ended before)."""
  key_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.key, state.step)
  token_B, memory = sampler(key_B, logits_BV, state.memory)
  bad_B = ~state.done & (~check_logits(logits_BV) | (token_B == NOTHING))
  token_B = jnp.maximum(token_B, 0)  # an ended row, whose filters may leave nothing, is still read
  new_B = jnp.where(state.done, ENDED, token_B)
  done_B = state.done | stop_V[token_B]
  return State(state.cache, memory, state.key, token_B, state.step + 1, done=done_B, bad=bad_B), new_B
