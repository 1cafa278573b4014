"""Generation token by token: one compiled program reads the prompts, another draws the tokens in chunks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.config import ModelConfig
from jaxllm.errors import ConfigError, SamplingError
from jaxllm.generate import request
from jaxllm.generate.output import ENDED, Drawn, Generated, OnTokens, Rows, Stop
from jaxllm.nn import STORES, Cache, Context, Transformer, init_cache
from jaxllm.nn.cache import grow
from jaxllm.nn.store import Full, Quantized
from jaxllm.position import PositionTables
from jaxllm.sampling import NOTHING, Greedy, Sampler, check_logits
from jaxllm.sampling.base import log_probs

NEW_TOKENS = 128
"""max_new_tokens where a caller gives none."""

PART = 512
"""Longer prompts are read so many tokens at a time, and layers with a window hold so many more than it."""

ROOM = 512
"""New tokens that a cache has room for at first: a step's attention reads all of its slots, used or not."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """What decoding carries: `step` tokens a row were drawn, and all but the newest are in the cache.

  memory: the sampler's state; key [B]: each row's own, from which a step folds its own; token [B]: the newest;
  place: its position, where the caller gave those of the prompts; done [B]: the row met a stop id; bad [B]: its
  logits are no distribution; empty [B]: the sampler left nothing, and the row ended there.
  """

  cache: Cache
  memory: Any
  key: jax.Array
  token: jax.Array
  place: request.Place | None
  step: jax.Array
  done: jax.Array
  bad: jax.Array
  empty: jax.Array

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
  max_new_tokens: int = NEW_TOKENS,
  stop_ids: Iterable[int] | None = None,
  rope: PositionTables | None = None,
  chunk: int = 32,
  part: int = PART,
  store: Full | Quantized = STORES["full"],
  stop: Stop | None = None,
  on_tokens: OnTokens | None = None,
  logprobs: int | None = None,
  positions: Sequence[np.ndarray] | None = None,
  prefix: Sequence[int] | None = None,
  copies: int = 1,
  negative_prompts: Sequence[Sequence[int]] | None = None,
  guidance_scale: float | Sequence[float] = 1.5,
) -> Generated:
  """Draws token_t from sampler(logits(prompt, tokens before t)), row by row, to a stop id or max_new_tokens.

  prompts: lists of ids, of any lengths.  key: one key, of which row i uses fold_in(key, i), or one a row; its
  token t uses fold_in(row's key, t).  A row depends on its own prompt and key alone: of its batch, it sees no
  more than the rounding of sums over a larger bucket.  stop_ids: () never stops early; None means the
  config's eos_ids.  rope: tables of fixed frequencies in place of the
  config's, as in Transformer.  chunk: how many tokens are drawn between two looks of the host, which changes
  none of them; 1 is the least delay and the most overhead.  part: a longer prompt is read so many tokens at a time;
  layers whose queries see a window hold that and a part, whatever the length of the text.  store: the form of the
  cache (`nn.STORES` has them by name).

  Between chunks: stop(row, its new ids) is asked after every new token, in order, and ends the row with an
  integer, which says how many of them to keep; on_tokens(row, new ids) is called with what each row has got
  (more than stop keeps, where that is fewer than it was told before).  logprobs: None, or of how many of the
  likeliest tokens, besides the drawn one, the log-probability is wanted (0: none).

  positions: those of each prompt's tokens, [T] or [T, 2], where they are not 0, 1, 2, ...; new tokens follow as
  `position.next_glm_positions` says.  prefix: how many leading tokens of each prompt see each other in both
  directions (`nn.Context`), all of which the first part must hold.

  copies: rows of each prompt, which is read once: rows 0 to copies - 1 are the first prompt's.  negative_prompts: a
  prompt to steer away from for each, with the strength guidance_scale, s, a number or one a prompt: classifier-free
  guidance, logits = u + s (c - u) of the log-probabilities c after the prompt and u after the negative one, both
  followed by the new tokens, before the sampler; s = 1 is the prompt alone.

  Compiled once a batch size, bucket of prompt lengths (`request.bucket`) and cache capacity (SLOTS apart);
  sampler parameters, stop ids, tables and max_new_tokens are data.  The cache, the sampler's memory and dynamic NTK's
  tables begin with room for ROOM new tokens, and double when they are drawn (one more program): a text that ends early
  costs what it is long.

  A row of which the sampler leaves nothing ends there, for the reason "exhausted".  Raises DataError for an empty prompt,
  TokenizerError for an id outside the vocabulary, SamplingError for logits with NaN, +inf or nothing finite, ConfigError
  for the other arguments, for params that are not this model's, where a learned table has fewer positions than the longest
  prompt with its new tokens, and where a cache for all of them is more than the devices' memory.
  Source of the guidance: Sanchez et al. (2023), "Stay on topic with classifier-free guidance", section 2.2.
  """
  cfg = request.checked_model(model, params)
  max_new_tokens, chunk = request.count("max_new_tokens", max_new_tokens), request.count("chunk", chunk)
  part, logprobs = request.count("part", part), request.top("logprobs", logprobs, cfg.vocab_size)
  store, copies = request.store(store), request.count("copies", copies)
  stop, on_tokens = request.callback("stop", stop), request.callback("on_tokens", on_tokens)
  both, guide = prompts, None
  if negative_prompts is not None:
    prompts = request.id_rows("prompts", prompts, cfg.vocab_size)
    guide = request.guide(prompts, negative_prompts, guidance_scale)
    both = [*prompts, *request.id_rows("negative_prompts", negative_prompts, cfg.vocab_size)]
    if positions is not None or prefix is not None:
      raise ConfigError("negative_prompts: cannot be given with positions or a prefix; leave those out")
  given, capacity = request.prepared(cfg, both, max_new_tokens, stop_ids, part)
  # as read_prompts makes it; with positions of their own, what a window leaves out is not what the order says
  call = min(part, given.tokens.shape[1]) if positions is None else None
  slots = min(capacity, request.room(given.tokens.shape[1] + min(ROOM, max_new_tokens)))
  B = len(prompts) * copies
  key = request.checked_key(key, sampler, B)
  own = request.Own.of(positions, prefix, given.length, given.tokens.shape[1], part)
  first = 0 if own.pos is None else int(own.pos.max()) + 1
  cfg.check_length(first + max_new_tokens, "largest position and max_new_tokens")
  before = 0 if slots == capacity else max(slots, capacity // 2)
  reach = 0 if rope is not None else first + capacity
  request.check_memory(cfg, len(both) * copies, capacity, call, store, before=before, reach=reach)
  fixed = None if rope is None else request.fixed(rope)
  tables_for = lambda slots: jax.device_put(fixed or cfg.rope_tables(max_len=first + slots))
  tables, stop_V, own, guide = tables_for(slots), *jax.device_put((given.stop, own, guide))

  settings = Settings(model, slots, part, store, logprobs, copies)
  longest = int(given.length.max())
  rows = Rows(B, stop, on_tokens, logprobs)
  given = given._replace(stop=stop_V)
  state, drawn = prefill(settings, params, tables, sampler, given, own, guide, key)
  guide = None if guide is None else jnp.repeat(guide, copies)
  while True:
    if rows.add(drawn):  # for the device, a row that `stop` has ended is done
      done_B = jax.device_put(np.asarray(state.done) | rows.ended, state.done.sharding)
      state = dataclasses.replace(state, done=done_B)
    if state.over or int(state.step) >= max_new_tokens:
      break
    if slots < capacity and int(state.step) >= slots - longest:
      slots = min(2 * slots, capacity)
      state, tables = grown(state, sampler, cfg, slots, call), tables_for(slots)
    limit = np.int32(max_new_tokens if slots == capacity else min(max_new_tokens, slots - longest))
    state, drawn = decode(
      settings, params, tables, sampler, stop_V, guide, limit, state, min(chunk, request.room(max_new_tokens))
    )

  done_B, bad_B, empty_B = jax.device_get((state.done, state.bad, state.empty))
  if bad_B.any():
    raise SamplingError(
      f"row {bad_B.argmax()}: found NaN, +inf or nothing finite in the logits of new token "
      f"{int(state.step) - 1}, expected finite ones (or -inf for some); check the parameters and the model's dtype = "
      f"{cfg.dtype}"
    )
  return rows.result(done_B, empty_B)


@dataclasses.dataclass(frozen=True)
class Settings:
  """What programs are compiled for beside the shapes of their arguments; capacity: of the cache that prompts are read into."""

  model: Transformer
  capacity: int
  part: int
  store: Full | Quantized = STORES["full"]
  logprobs: int | None = None
  copies: int = 1


@functools.partial(jax.jit, static_argnames=("settings",))
def prefill(
  settings: Settings,
  params: Any,
  tables: PositionTables,
  sampler: Sampler,
  prompts: request.Prompts,
  own: request.Own,
  guide: jax.Array | None,
  key: jax.Array | None,
) -> tuple[State, Drawn]:
  """Reads prompts into a new cache and draws a first token: (state, [B, 1])."""
  logits_BV, cache = read_prompts(settings, params, tables, prompts, own)
  logits_BV = guided(logits_BV, guide)
  tokens_BT, length_B, place = prompts.tokens, prompts.length, own.next
  if settings.copies > 1:
    repeat = lambda x: jnp.repeat(x, settings.copies, axis=0)
    cache, logits_BV, tokens_BT, length_B, place = jax.tree.map(
      repeat, (cache, logits_BV, tokens_BT, length_B, place)
    )
  B, room = len(logits_BV), max(settings.capacity - tokens_BT.shape[1], 0)
  memory = sampler.init(tokens_BT[:B], length_B[:B], room)
  none_B, first_B = jnp.zeros((B,), bool), jnp.zeros((B,), jnp.int32)
  key_B = request.row_keys(key, B)
  state = State(cache, memory, key_B, first_B, place, jnp.int32(0), done=none_B, bad=none_B, empty=none_B)
  state, drawn = draw(sampler, prompts.stop, logits_BV, state, settings.logprobs)
  return state, jax.tree.map(lambda x: x[:, None], drawn)


@functools.partial(jax.jit, static_argnames=("cfg", "capacity", "call"))
def grown(state: State, sampler: Sampler, cfg: ModelConfig, capacity: int, call: int | None) -> State:
  """The state with room for `capacity` tokens a row."""
  memory = sampler.grown(state.memory, capacity - state.cache.capacity)
  return dataclasses.replace(state, cache=grow(cfg, state.cache, capacity, call=call), memory=memory)


def read_prompts(
  settings: Settings,
  params: Any,
  tables: PositionTables,
  prompts: request.Prompts,
  own: request.Own,
) -> tuple[jax.Array, Cache]:
  """(logits [B, V] of each row's last token, the cache) of prompts, read in parts where they are long."""
  (B, T), length_B = prompts.tokens.shape, prompts.length
  cfg, part = settings.model.cfg, min(settings.part, T)
  call = part if own.pos is None else None
  cache = init_cache(cfg, B, settings.capacity, call=call, store=settings.store)

  def read(start, cache):
    valid = start + jnp.arange(part)[None] < length_B[:, None]
    cut = lambda x: None if x is None else jax.lax.dynamic_slice_in_dim(x, start, part, axis=1)
    context = Context(valid=valid, pos=cut(own.pos), prefix=own.prefix)
    variables = {"params": params}
    logits, cache = settings.model.apply(
      variables, cut(prompts.tokens), context, cache, tables, logits="last"
    )
    return logits[:, 0], cache

  def next_part(carry):
    start, logits_BV, cache = carry
    new_BV, cache = read(start, cache)
    has_tokens_B1 = (start < length_B)[:, None]
    return start + part, jnp.where(has_tokens_B1, new_BV, logits_BV), cache

  if part == T:
    return read(0, dataclasses.replace(cache, fresh=True))
  unread = lambda carry: carry[0] < jnp.max(length_B)
  start = (jnp.int32(0), jnp.zeros((B, cfg.vocab_size), jnp.float32), cache)
  return jax.lax.while_loop(unread, next_part, start)[1:]


def guided(logits_BV: jax.Array, guide_B: jax.Array | None) -> jax.Array:
  """The logits themselves, or u + guide (c - u) of the log-probabilities c of the first half of the rows and u of the other.

  Where either is -inf, c: what the model excludes stays excluded, and what only the negative prompt excludes is not steered.
  """
  if guide_B is None:
    return logits_BV
  c_BV, u_BV = jnp.split(log_probs(logits_BV), 2)
  both_BV = (c_BV > -jnp.inf) & (u_BV > -jnp.inf)
  finite = lambda x_BV: jnp.where(both_BV, x_BV, 0.0)
  return jnp.where(both_BV, finite(u_BV) + guide_B[:, None] * (finite(c_BV) - finite(u_BV)), c_BV)


@functools.partial(jax.jit, static_argnames=("settings", "chunk"), donate_argnames=("state",))
def decode(
  settings: Settings,
  params: Any,
  tables: PositionTables,
  sampler: Sampler,
  stop_V: jax.Array,
  guide: jax.Array | None,
  max_new_tokens: jax.Array,
  state: State,
  chunk: int,
) -> tuple[State, Drawn]:
  """Up to `chunk` more tokens: (state, [B, chunk], ENDED where there are none)."""
  model, logprobs = settings.model, settings.logprobs
  start, end = state.step, jnp.minimum(state.step + chunk, max_new_tokens)

  def unfinished(carry):
    state, _ = carry
    return (state.step < end) & ~state.over

  def one_token(carry):
    state, drawn = carry
    place = state.place
    context = Context(pos=None if place is None else place.pos[:, None])
    token_B = state.token if guide is None else jnp.tile(state.token, 2)
    logits, cache = model.apply({"params": params}, token_B[:, None], context, state.cache, tables)
    read = dataclasses.replace(state, cache=cache, place=None if place is None else place.moved())
    moved, new = draw(sampler, stop_V, guided(logits[:, 0], guide), read, logprobs)
    return moved, drawn.put(new, state.step - start)

  return jax.lax.while_loop(unfinished, one_token, (state, Drawn.none(len(state.done), chunk, logprobs)))


def draw(
  sampler: Sampler, stop_V: jax.Array, logits_BV: jax.Array, state: State, logprobs: int | None = None
) -> tuple[State, Drawn]:
  """The next token of every row: (state, [B], ENDED where the row ended before)."""
  key_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.key, state.step)
  token_B, memory = sampler(key_B, logits_BV, state.memory)
  bad_B = ~state.done & ~check_logits(logits_BV)
  empty_B = state.empty | (~state.done & ~bad_B & (token_B == NOTHING))
  done_B = state.done | empty_B
  token_B = jnp.maximum(token_B, 0)  # an ended row is still read
  drawn = Drawn.of(jnp.where(done_B, ENDED, token_B), logits_BV, logprobs)
  moved = dict(memory=memory, token=token_B, step=state.step + 1)
  done_B |= stop_V[token_B]
  return dataclasses.replace(state, **moved, done=done_B, bad=bad_B, empty=empty_B), drawn
