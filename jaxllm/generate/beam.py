"""Beam search: the texts of highest probability, as far as a few unfinished ones at a time can find them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import ConfigError, SamplingError
from jaxllm.generate import loop, request
from jaxllm.nn import STORES, Cache, Transformer
from jaxllm.nn.store import Full, Quantized
from jaxllm.position import PositionTables
from jaxllm.sampling import check_logits
from jaxllm.sampling.base import log_probs


@dataclasses.dataclass(frozen=True)
class Beams:
  """For each prompt the best texts found, the best first: new ids with the stop id that ended them, and their scores."""

  tokens: list[list[list[int]]]
  scores: list[list[float]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Texts:
  """Texts of each prompt and group: new tokens [B, G, K, M], their sum or score [B, G, K], and their lengths [B, G, K]."""

  token: jax.Array
  score: jax.Array
  length: jax.Array

  def take(self, place_BGK: jax.Array) -> Texts:
    """The texts at these places of the third axis."""
    along = lambda x: jnp.take_along_axis(x, place_BGK.reshape(*place_BGK.shape, *[1] * (x.ndim - 3)), axis=2)
    return jax.tree.map(along, self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """step tokens were taken; unfinished texts by their sums, finished ones by their scores (-inf: none yet), and what goes on.

  going [B, G]: whether a better text may still be found; bad [B]: logits were no distribution; logits [B, G, K, V]: of each
  unfinished text.
  """

  step: jax.Array
  open: Texts
  ended: Texts
  going: jax.Array
  bad: jax.Array
  logits: jax.Array
  cache: Cache


def generate(
  model: Transformer,
  params: Any,
  prompts: Sequence[Sequence[int]],
  *,
  num_beams: int = 4,
  num_groups: int = 1,
  diversity_penalty: float = 0.0,
  length_penalty: float = 1.0,
  early_stopping: bool | Literal["never"] = False,
  num_return: int = 1,
  max_new_tokens: int = loop.NEW_TOKENS,
  stop_ids: Iterable[int] | None = None,
  part: int = loop.PART,
  store: Full | Quantized = STORES["full"],
) -> Beams:
  """The num_return best texts of each prompt by score = sum_t log p(token_t) / T^length_penalty, T new tokens.

  The result has fewer texts only where fewer exist: of one new token, as many as there are ids.

  Each step continues num_beams unfinished texts by every token and keeps the num_beams best that are unfinished; a text that
  ends, at a stop id or max_new_tokens, while it is among the num_beams best is a candidate for the result, of which as many are
  kept.  early_stopping True: the search of a prompt ends when num_beams texts have ended; False: when the best unfinished
  sum over the present length is no better than the worst of them; "never": the same over the largest possible length where
  length_penalty > 0.  num_groups: the beams in so many groups, each a search of its own, in which a token costs
  diversity_penalty for each earlier group's beam that takes it at the same step, while that group's search lasts; scores are
  less by what was paid.

  Compiled once a batch size, bucket of prompt lengths, room for new tokens (request.SLOTS apart), early_stopping and numbers of
  beams, groups and, from two on, stop ids; the rest is data.  Raises ConfigError for numbers of beams, groups and results that
  do not fit, an early_stopping that is none of these, a diversity_penalty that is no number of size request.STEEPEST at most,
  and a length_penalty that is none or takes scores of max_new_tokens out of float32; the other arguments and errors are those
  of `loop.generate`.
  Source: Sutskever et al. (2014), section 3.2; Wu et al. (2016), section 7 (length); Vijayakumar et al. (2018), section 4
  (groups); transformers' `num_beams` for when it ends.
  """
  cfg = request.checked_model(model, params)
  counts = dict(
    num_beams=num_beams, num_groups=num_groups, num_return=num_return, max_new_tokens=max_new_tokens
  )
  for name, value in counts.items():
    request.count(name, value)
  if num_beams % num_groups:
    raise ConfigError(f"num_groups: found {num_groups}, expected a divisor of num_beams = {num_beams}")
  if num_return > num_beams:
    raise ConfigError(f"num_return: found {num_return}, expected at most num_beams = {num_beams}")
  if not isinstance(early_stopping, bool) and str(early_stopping) != "never":
    raise ConfigError(f'early_stopping: found {early_stopping!r}, expected True, False or "never"')
  length_penalty = request.length_penalty(length_penalty, max_new_tokens)
  steepest = request.STEEPEST
  diversity_penalty = request.number("diversity_penalty", diversity_penalty, -steepest, steepest)
  part, store = request.count("part", part), request.store(store)
  given, capacity = request.prepared(cfg, prompts, max_new_tokens, stop_ids, part)
  request.check_memory(cfg, num_beams * len(prompts), capacity, part, store, reach=capacity)
  kept = max(2, 1 + int(given.stop.sum())) * (num_beams // num_groups)
  tables = jax.device_put(cfg.rope_tables(max_len=capacity))
  settings = loop.Settings(model, capacity, part, store)
  shape = (num_groups, num_beams // num_groups, min(kept, cfg.vocab_size * (num_beams // num_groups)))
  penalties = np.float32(length_penalty), np.float32(diversity_penalty)
  ended, bad_B = search(
    settings,
    params,
    tables,
    given,
    penalties,
    shape,
    early_stopping,
    np.int32(max_new_tokens),
    request.room(max_new_tokens),
  )
  ended, bad_B = jax.device_get((ended, bad_B))
  if bad_B.any():
    raise SamplingError(
      f"row {bad_B.argmax()}: found NaN, +inf or nothing finite in the logits, expected finite ones; check the parameters and "
      f"the model's dtype = {cfg.dtype}"
    )
  out = Beams([], [])
  for b in range(len(prompts)):
    flat = [x.reshape(num_beams, *x.shape[2:]) for x in (ended.score[b], ended.token[b], ended.length[b])]
    best = [i for i in np.argsort(-flat[0], kind="stable")[:num_return] if flat[0][i] > -np.inf]
    out.tokens.append([flat[1][i][: flat[2][i]].tolist() for i in best])
    out.scores.append([float(flat[0][i]) for i in best])
  return out


@functools.partial(jax.jit, static_argnames=("settings", "shape", "early_stopping", "room"))
def search(
  settings: loop.Settings,
  params: Any,
  tables: PositionTables,
  prompts: request.Prompts,
  penalties: tuple[jax.Array, jax.Array],
  shape: tuple[int, int, int],
  early_stopping: bool | str,
  max_new_tokens: jax.Array,
  room: int,
) -> tuple[Texts, jax.Array]:
  """(ended texts of all groups, whether a prompt's logits were no distribution); shape: groups, beams of each, candidates."""
  B, (G, K, kept), M = len(prompts.tokens), shape, max_new_tokens
  length_penalty, diversity_penalty = penalties
  logits_BV, cache = loop.read_prompts(settings, params, tables, prompts, request.Own())
  V = logits_BV.shape[1]
  zeros = lambda *more: jnp.zeros((B, G, K, *more))
  first = jnp.where(
    (jnp.arange(K) == 0)[None, None], zeros(), -jnp.inf
  )  # all beams of a group are one text yet
  no_texts = Texts(zeros(room).astype(jnp.int32), zeros() - jnp.inf, zeros().astype(jnp.int32))
  state = State(
    jnp.int32(0),
    dataclasses.replace(no_texts, score=first),
    no_texts,
    jnp.ones((B, G), bool),
    ~check_logits(logits_BV),
    jnp.broadcast_to(logits_BV[:, None, None], (B, G, K, V)),
    cache.take(jnp.repeat(jnp.arange(B), G * K)),
  )

  def one_step(state):
    step = state.step
    score, token, beam = continuations(state, prompts.stop, diversity_penalty, kept)
    texts = Texts(
      jnp.take_along_axis(state.open.token, beam[..., None], axis=2).at[..., step].set(token),
      score,
      jnp.full(score.shape, step + 1),
    )
    ends = prompts.stop[token] | (step + 1 == M)
    place = jax.lax.top_k(jnp.where(ends, -jnp.inf, score), K)[1]
    going_on = texts.take(place)

    # a text that ends counts only from among the K best
    counts = ends & (jnp.arange(kept) < K)[None, None] & state.going[..., None]
    if early_stopping is True:
      counts &= jnp.any(state.ended.score == -jnp.inf, axis=-1, keepdims=True)
    final = jnp.where(counts, score / (step + 1.0) ** length_penalty, -jnp.inf)
    both = jax.tree.map(
      lambda a, b: jnp.concatenate([a, b], axis=2), state.ended, dataclasses.replace(texts, score=final)
    )
    ended = both.take(jax.lax.top_k(both.score, K)[1])

    full = jnp.all(ended.score > -jnp.inf, axis=-1)
    longest = jnp.where(length_penalty > 0, M, step + 1) if early_stopping == "never" else step + 1
    hope = going_on.score[..., 0] / longest.astype(jnp.float32) ** length_penalty
    going = state.going & (~full | (hope > jnp.min(ended.score, axis=-1)))
    if early_stopping is True:
      going &= ~full
    rows = jnp.take_along_axis(beam, place, axis=2) + K * jnp.arange(B * G).reshape(B, G, 1)
    cache = state.cache.take(rows.reshape(-1))
    newest = going_on.token[..., step].reshape(-1, 1)
    logits, cache = settings.model.apply({"params": params}, newest, cache=cache, rope=tables)
    bad = state.bad | ~jnp.all(check_logits(logits[:, 0]).reshape(B, -1), axis=1)
    return State(step + 1, going_on, ended, going, bad, logits[:, 0].reshape(B, G, K, V), cache)

  unfinished = lambda state: (state.step < M) & jnp.any(state.going) & ~jnp.any(state.bad)
  state = jax.lax.while_loop(unfinished, one_step, state)
  return state.ended, state.bad


def continuations(
  state: State, stop_V: jax.Array, diversity_penalty: jax.Array, kept: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The best continuations of each group, [B, G, kept]: sums, tokens, and the beams that they continue."""
  B, G, K, V = state.logits.shape
  sums = state.open.score[..., None] + log_probs(state.logits)
  taken_BV, found = jnp.zeros((B, V)), []
  for g in range(G):
    penalised = (sums[:, g] - diversity_penalty * taken_BV[:, None]).reshape(B, K * V)
    score, place = jax.lax.top_k(penalised, kept)
    found.append((score, place % V, place // V))
    if g + 1 < G:  # the K unfinished ones are what the group goes on with
      _, places = jax.lax.top_k(jnp.where(stop_V[place % V], -jnp.inf, score), K)
      token_BK = jnp.take_along_axis(place % V, places, axis=1)
      # a group whose search is over takes no token
      taken_BV += jnp.where(state.going[:, g, None], jnp.sum(jax.nn.one_hot(token_BK, V), axis=1), 0.0)
  score, token, beam = (jnp.stack(one, axis=1) for one in zip(*found, strict=True))
  return score, token, beam
