"""Speculative decoding: cheap drafts of several tokens, which the model reads in one call, and text distributed as its own."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import ConfigError, SamplingError, TokenizerError
from jaxllm.generate import loop, request
from jaxllm.generate.draft import Draft, draft_keys, drawn_from, probabilities
from jaxllm.generate.output import ENDED, Drawn, OnTokens, Reason, Rows, Stop
from jaxllm.nn import STORES, Cache, Transformer
from jaxllm.nn.store import Full, Quantized
from jaxllm.position import PositionTables
from jaxllm.sampling import Greedy, Sampler, check_logits


@dataclasses.dataclass(frozen=True)
class Speculated:
  """New ids a row and why it ended, as `output.Generated` has them; how many calls of the model it took, and drafts it kept.

  rounds: calls of the model after the prompt's; accepted: drafted tokens that became text, of gamma a round.
  """

  tokens: list[list[int]]
  reasons: list[Reason]
  rounds: list[int]
  accepted: list[int]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """What rounds carry: as `loop.State`, with a count of tokens for each row, the text so far, and the draft's own state.

  text_BS, length_B: prompts and new tokens; the newest one, token_B, is the only one that no cache holds.  count_B: how many
  tokens are new.
  """

  cache: Cache
  draft: Any
  memory: Any
  key: jax.Array
  text: jax.Array
  length: jax.Array
  token: jax.Array
  count: jax.Array
  done: jax.Array
  bad: jax.Array
  empty: jax.Array


def generate(
  model: Transformer,
  params: Any,
  prompts: Sequence[Sequence[int]],
  draft: Draft,
  *,
  gamma: int = 4,
  sampler: Sampler = Greedy(),  # noqa: B008 (a frozen value)
  key: jax.Array | None = None,
  max_new_tokens: int = loop.NEW_TOKENS,
  stop_ids: Iterable[int] | None = None,
  part: int = loop.PART,
  store: Full | Quantized = STORES["full"],
  stop: Stop | None = None,
  on_tokens: OnTokens | None = None,
) -> Speculated:
  """Text distributed as that of `loop.generate`, in rounds of `gamma` drafted tokens and one call of the model.

  Draft token x_i is drawn from q_i, and kept with probability min(1, p_i(x_i) / q_i(x_i)), p and q being what the sampler's
  filters leave of the model's and the draft's distributions after the same text; the first that is not kept is drawn anew from
  max(0, p_i - q_i), normalised, and after gamma kept ones one more comes from p.  Each token is then distributed as p: with
  Greedy() it is the text of `loop.generate`, and otherwise another draw of the same distribution.

  draft: a `draft.DraftModel` or `draft.PromptLookup`.  Rows keep as many tokens as they accept, independently.  The other
  arguments are those of `loop.generate`, and so are the errors, also of a draft model; further, ConfigError for a gamma that is
  no integer from 1 to part - 1, a draft that is neither of these, and a draft model with fewer positions than the longest
  prompt with its new tokens, and TokenizerError for a draft model with another vocabulary.
  Source: Leviathan et al. (2023), algorithm 1; Chen et al. (2023), algorithm 2.
  """
  cfg = request.checked_model(model, params)
  max_new_tokens, part = request.count("max_new_tokens", max_new_tokens), request.count("part", part)
  gamma, store = request.count("gamma", gamma), request.store(store)
  if gamma >= part:
    raise ConfigError(f"gamma: found {gamma}, expected at most part - 1 = {part - 1}, as a round is one call")
  if not isinstance(draft, Draft):
    raise ConfigError(
      f"draft: found {type(draft).__name__}, expected DraftModel(model, params) or PromptLookup(ngram)"
    )
  given, capacity = request.prepared(cfg, prompts, max_new_tokens, stop_ids, part, gamma)
  request.check_memory(cfg, len(prompts), capacity, part, store, reach=capacity + gamma)
  # windowed layers have room for a call as long as that of the prompts
  longer = max(0, gamma + 1 - given.tokens.shape[1])
  given = given._replace(tokens=np.pad(given.tokens, ((0, 0), (0, longer))))
  if draft.vocab_size not in (None, cfg.vocab_size):
    raise TokenizerError(
      f"draft: found a vocabulary of {draft.vocab_size}, expected the model's {cfg.vocab_size}, as drafted ids are its ids"
    )
  B = len(given.length)
  key = request.checked_key(key, sampler, B)
  tables, stop_V = jax.device_put((cfg.rope_tables(max_len=capacity + gamma), given.stop))

  settings = loop.Settings(model, capacity, part, store)
  first, drawn = loop.prefill(settings, params, tables, sampler, given, request.Own(), None, key)
  drafter = draft.start(given, part, capacity, max_new_tokens)
  state = start(first, drafter, given.tokens, given.length, capacity)
  rows, rounds, accepted = Rows(B, stop, on_tokens, None), np.zeros(B, int), np.zeros(B, int)
  limit = np.int32(max_new_tokens)
  while True:
    if rows.add(drawn):
      done_B = jax.device_put(np.asarray(state.done) | rows.ended, state.done.sharding)
      state = dataclasses.replace(state, done=done_B)
    done_B, count_B, bad_B = jax.device_get((state.done, state.count, state.bad))
    if bad_B.any():
      row = int(bad_B.argmax())
      raise SamplingError(
        f"row {row}: found NaN, +inf or nothing finite in the logits within {gamma + 1} tokens of new token {count_B[row]}, "
        f"expected finite ones; check the parameters and the model's dtype = {cfg.dtype}"
      )
    live_B = ~done_B & (count_B < max_new_tokens)
    if not live_B.any():
      result = rows.result(done_B, np.asarray(state.empty))
      return Speculated(result.tokens, result.reasons, rounds.tolist(), accepted.tolist())
    state, drawn, kept_B = one_round(model, params, tables, draft, sampler, stop_V, limit, state, gamma)
    rounds += live_B
    accepted += np.asarray(kept_B)


@functools.partial(jax.jit, static_argnames=("capacity",))
def start(first: loop.State, draft: Any, tokens_BT: jax.Array, length_B: jax.Array, capacity: int) -> State:
  """The state after the prompts, with the first token."""
  B, T = tokens_BT.shape
  text_BS = jnp.zeros((B, max(capacity, T)), jnp.int32).at[:, :T].set(tokens_BT)
  text_BS = jnp.where(jnp.arange(text_BS.shape[1])[None] == length_B[:, None], first.token[:, None], text_BS)
  ones = jnp.ones((B,), jnp.int32)
  return State(
    first.cache,
    draft,
    first.memory,
    first.key,
    text_BS,
    length_B + 1,
    first.token,
    ones,
    first.done,
    first.bad,
    first.empty,
  )


@functools.partial(jax.jit, static_argnames=("model", "gamma"), donate_argnames=("state",))
def one_round(
  model: Transformer,
  params: Any,
  tables: PositionTables,
  draft: Draft,
  sampler: Sampler,
  stop_V: jax.Array,
  max_new_tokens: jax.Array,
  state: State,
  gamma: int,
) -> tuple[State, Drawn, jax.Array]:
  """One call of the model: (state, new tokens [B, gamma + 1], how many of them were drafted)."""
  live_B = ~state.done & (state.count < max_new_tokens)
  keys = draft_keys(state.key, state.count, gamma + 1)
  draft_BG, q_GBV, draft_state = draft.propose(sampler, keys, state, gamma, len(stop_V))

  read = jnp.concatenate([state.token[:, None], draft_BG], axis=1)
  logits_BGV, cache = model.apply({"params": params}, read, cache=state.cache, rope=tables)
  p_GBV, memories = filtered(sampler, keys, state.memory, logits_BGV, draft_BG)
  place_GB1 = draft_BG.T[..., None]
  p_GB, q_GB = (
    jnp.take_along_axis(probabilities(x), place_GB1, axis=-1)[..., 0] for x in (p_GBV[:-1], q_GBV)
  )
  # where there is no q, as logits are NaN or the filters left nothing, no draft is kept and all of p is left
  kept_GB = (q_GB > 0) & (keys.uniform()[:-1] * q_GB < p_GB)
  a_B = jnp.sum(jnp.cumprod(kept_GB, axis=0), axis=0)  # drafts before the first that is not kept

  at = lambda x_GB: jax.vmap(lambda x_G, a: x_G[a], in_axes=(1, 0))(x_GB, a_B)
  memory, p_BV = jax.tree.map(at, memories), at(p_GBV)
  nothing = jnp.full_like(q_GBV[:1], -jnp.inf)  # after the last draft, all of p is left
  last_B = drawn_from(at(keys.last), p_BV, at(jnp.concatenate([q_GBV, nothing])))
  index_1G = jnp.arange(gamma + 1)[None]
  new_BG = jnp.where(index_1G == a_B[:, None], last_B[:, None], jnp.pad(draft_BG, ((0, 0), (0, 1))))

  stops_BG = stop_V[new_BG]
  before_BG = jnp.cumsum(stops_BG, axis=1) - stops_BG > 0
  keep_BG = live_B[:, None] & (index_1G <= a_B[:, None]) & ~before_BG
  keep_BG &= state.count[:, None] + index_1G < max_new_tokens
  good_BG = jax.vmap(check_logits)(logits_BGV)
  nothing_BG = good_BG & ~jnp.any(p_GBV > -jnp.inf, axis=-1).T
  empty_B = jnp.any(keep_BG & nothing_BG, axis=1)
  keep_BG &= jnp.cumsum(nothing_BG, axis=1) == 0
  n_B = jnp.sum(keep_BG, axis=1)
  slot_BG = jnp.where(keep_BG, state.length[:, None] + index_1G, state.text.shape[1])
  write = jax.vmap(lambda text, at, new: text.at[at].set(new, mode="drop"))
  token_B = jnp.take_along_axis(new_BG, jnp.maximum(n_B - 1, 0)[:, None], axis=1)[:, 0]
  held_B = state.cache.length + n_B
  moved = State(
    cache.cut(held_B),
    draft.cut(draft_state, held_B),
    sampler.update(last_B, memory, p_BV),
    state.key,
    write(state.text, slot_BG, new_BG),
    state.length + n_B,
    jnp.where(n_B > 0, token_B, state.token),
    state.count + n_B,
    state.done | jnp.any(keep_BG & stops_BG, axis=1) | empty_B,
    jnp.any(keep_BG & ~good_BG, axis=1),
    state.empty | empty_B,
  )
  return moved, Drawn(jnp.where(keep_BG, new_BG, ENDED)), jnp.minimum(n_B, a_B)


def filtered(
  sampler: Sampler, keys: Any, memory: Any, logits_BGV: jax.Array, draft_BG: jax.Array
) -> tuple[jax.Array, Any]:
  """(what the filters leave of the logits before each draft and after the last, [G, B, V], the memories they did so with)."""

  def one(memory, given):
    key_B, logits_BV, token_B = given
    memory = sampler.toss(key_B, memory)
    left_BV = sampler.filter(logits_BV, memory)
    return sampler.update(token_B, memory, left_BV), (left_BV, memory)

  padded = jnp.pad(draft_BG, ((0, 0), (0, 1)))  # the update after the last is not used
  return jax.lax.scan(one, memory, (keys.toss, logits_BGV.swapaxes(0, 1), padded.T))[1]
