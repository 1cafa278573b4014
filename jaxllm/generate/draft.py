"""Where drafts come from: a smaller model, or the text itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.errors import ConfigError
from jaxllm.generate import loop, request
from jaxllm.nn import Transformer
from jaxllm.sampling import Greedy, Sampler
from jaxllm.sampling.base import draw


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Keys:
  """Keys [G, B] of G draws: for the sampler's own chance, the draft's draw, whether it is kept, and the draw in its place."""

  toss: jax.Array
  draft: jax.Array
  keep: jax.Array
  last: jax.Array

  def uniform(self) -> jax.Array:
    """A number in [0, 1) for each draft, [G, B]."""
    return jax.vmap(jax.vmap(jax.random.uniform))(self.keep)


def draft_keys(key_B: jax.Array, count_B: jax.Array, G: int) -> Keys:
  """Keys of new tokens count, count + 1, ..., which depend on a row's key and the token's number alone."""

  def of(key, number):
    return jax.random.split(jax.random.fold_in(key, number), 4)

  number_GB = count_B[None] + jnp.arange(G, dtype=jnp.int32)[:, None]
  keys_GB4 = jax.vmap(jax.vmap(of), in_axes=(None, 0))(key_B, number_GB)
  return Keys(*(keys_GB4[..., i] for i in range(4)))


def probabilities(logits: jax.Array) -> jax.Array:
  """softmax, and 0 throughout where no logit is finite."""
  left = jnp.any(logits > -jnp.inf, axis=-1, keepdims=True)
  return jnp.where(left, jax.nn.softmax(jnp.where(left, logits, 0.0), axis=-1), 0.0)


def drawn_from(key_B: jax.Array, p_BV: jax.Array, q_BV: jax.Array) -> jax.Array:
  """A token a row from max(0, p - q), normalised, of logits p and q; from p where nothing is left: [B]."""
  rest_BV = jnp.maximum(probabilities(p_BV) - probabilities(q_BV), 0.0)
  some_B1 = jnp.sum(rest_BV, axis=-1, keepdims=True) > 0
  return draw(key_B, jnp.where(some_B1, jnp.log(rest_BV), p_BV))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftModel:
  """Drafts by a model with the same vocabulary: q is what the sampler's filters leave of its distribution.

  It reads its own last draft too, one call more a round, so that its cache holds what the model accepts in every case.
  Source: Leviathan et al. (2023), section 2.
  """

  model: Transformer = dataclasses.field(metadata=dict(static=True))
  params: Any

  @property
  def vocab_size(self) -> int | None:
    """Of its ids."""
    return self.model.cfg.vocab_size

  def start(self, prompts: request.Prompts, part: int, capacity: int, max_new_tokens: int) -> Any:
    """Its state after the prompts: the tables for so many positions, and a cache."""
    cfg = request.checked_model(self.model, self.params, "draft's ")
    cfg.check_length(
      int(prompts.length.max()) + max_new_tokens, "draft model: longest prompt and max_new_tokens"
    )
    capacity = capacity if cfg.length_limit is None else min(capacity, cfg.length_limit)
    reach = capacity + part
    request.check_memory(cfg, len(prompts.length), capacity, part, what="draft model", reach=reach)
    tables = jax.device_put(cfg.rope_tables(max_len=reach))
    settings = loop.Settings(self.model, capacity, part)
    state, _ = loop.prefill(settings, self.params, tables, Greedy(), prompts, request.Own(), None, None)
    return tables, state.cache

  def propose(
    self, sampler: Sampler, keys: Keys, state: Any, gamma: int, vocab_size: int
  ) -> tuple[jax.Array, jax.Array, Any]:
    """(drafts [B, gamma], what q was drawn from [gamma, B, V], its state)."""
    tables, cache = state.draft

    def one(carry, key):
      token_B, memory, cache = carry
      toss_B, draft_B = key
      logits, cache = self.model.apply({"params": self.params}, token_B[:, None], cache=cache, rope=tables)
      memory = sampler.toss(toss_B, memory)
      left_BV = sampler.filter(logits[:, 0], memory)
      token_B = draw(draft_B, left_BV)
      return (token_B, sampler.update(token_B, memory, left_BV), cache), (token_B, left_BV)

    carry = (state.token, state.memory, cache)
    (_, _, cache), (token_GB, left_GBV) = jax.lax.scan(one, carry, (keys.toss, keys.draft))
    return token_GB[:gamma].T, left_GBV[:gamma], (tables, cache)

  def cut(self, state: Any, length_B: jax.Array) -> Any:
    """Its state with so many tokens a row."""
    tables, cache = state
    return tables, cache.cut(length_B)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptLookup:
  """Drafts by what followed the newest `ngram` tokens when they last stood in the text, or else the newest ngram - 1, ..., 1.

  q has the drafted token alone, so it is kept with the probability p(x).  Where nothing matches, the newest token is drafted
  again.  Source: Saxena (2023), prompt lookup decoding.
  """

  ngram: int = dataclasses.field(default=3, metadata=dict(static=True))

  def __post_init__(self):
    if type(self.ngram) is not int or self.ngram < 1:
      raise ConfigError(f"PromptLookup.ngram: found {self.ngram!r}, expected an integer of at least 1")

  @property
  def vocab_size(self) -> int | None:
    """Any."""
    return None

  def start(self, prompts: request.Prompts, part: int, capacity: int, max_new_tokens: int) -> Any:
    """No state."""
    return ()

  def propose(
    self, sampler: Sampler, keys: Keys, state: Any, gamma: int, vocab_size: int
  ) -> tuple[jax.Array, jax.Array, Any]:
    """(drafts [B, gamma], logits that leave each draft alone [gamma, B, V], no state)."""
    draft_BG = jax.vmap(lambda text, length: self._row(text, length, gamma))(state.text, state.length)
    q_GBV = jnp.where(jax.nn.one_hot(draft_BG.T, vocab_size, dtype=bool), 0.0, -jnp.inf)
    return draft_BG, q_GBV, ()

  def _row(self, text_S: jax.Array, length: jax.Array, gamma: int) -> jax.Array:
    place_S = jnp.arange(len(text_S))
    best = length - 1  # what follows it is not there: the newest token again
    same_S = jnp.ones(len(text_S), bool)
    for k in range(1, self.ngram + 1):  # slot i ends in the newest k tokens, and is not the newest itself
      newest = text_S[jnp.maximum(length - k, 0)]
      same_S &= (
        (jnp.roll(text_S, k - 1) == newest) & (place_S >= k - 1) & (place_S < length - 1) & (length >= k)
      )
      found = jnp.any(same_S)
      best = jnp.where(found, len(text_S) - 1 - jnp.argmax(same_S[::-1]), best)
    return text_S[jnp.minimum(best + 1 + jnp.arange(gamma), length - 1)]

  def cut(self, state: Any, length_B: jax.Array) -> Any:
    """No state."""
    return state


Draft = DraftModel | PromptLookup
"""A source of drafts."""
