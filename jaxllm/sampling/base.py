"""The sampler contract, the draw, and what every filter shares."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import SamplingError


class Sampler:
  """Draws from softmax(filter(logits)); a kind of sampler overrides `filter`, and `init` and `update` if it
  remembers anything.

  The state is an argument and a result.  Nothing here depends on the other rows of the batch: a row's token
  is a function of its own key, logits, parameters and state.
  """

  def init(self, tokens, lengths):
    """The state before the first draw, from the prompts tokens [B, T] and their lengths [B]."""
    return ()

  def filter(self, logits_BV, state):
    """Logits as float32, whatever came in, and -inf where a token is excluded; at least one stays."""
    return logits_BV.astype(jnp.float32)

  def update(self, tokens_B, state):
    """The state after tokens_B were drawn."""
    return state

  def __call__(self, key_B, logits_BV, state):
    """Draws one token a row with one key a row: (tokens_B int32, state).

    token = argmax_v (filtered_v + g_v), g Gumbel noise of the row's own key.  Rows that `check_logits`
    refuses give a token without meaning.  Raises SamplingError unless key_B holds one key a row.
    """
    if key_B.shape[:1] != logits_BV.shape[:1]:
      raise SamplingError(
        f"a sampler needs one key a row: found keys of shape {key_B.shape} for logits of shape "
        f"{logits_BV.shape}; use jax.random.split(key, {logits_BV.shape[0]})"
      )
    tokens_B = draw(key_B, self.filter(logits_BV, state))
    return tokens_B, self.update(tokens_B, state)


def draw(key_B, logits_BV):
  """One categorical draw a row from softmax(logits_BV), by the Gumbel-max trick: int32 [B]."""
  # mode="high": the default noise has 2^23 values and stops at 15.9, so tokens 16 nats below the best are
  # starved.  With 151,935 of them at 1e-7 each it draws the tail 0.6 % of the time instead of 1.5 %.
  categorical = lambda key, logits_V: jax.random.categorical(key, logits_V, mode="high")
  return jax.vmap(categorical)(key_B, logits_BV).astype(jnp.int32)


def check_logits(logits_BV):
  """True for each row that can be sampled from: no NaN, no +inf, and at least one finite logit ([B] bool).

  A draw from any other row silently gives a token (0, as a rule), so whoever samples returns this flag from
  the compiled program and raises SamplingError on the host.  Pass the logits before the filters: a filter may
  hide the fault, and never empties a good row.
  """
  logits_BV = logits_BV.astype(jnp.float32)
  unusable_BV = jnp.isnan(logits_BV) | jnp.isposinf(logits_BV)
  return jnp.any(jnp.isfinite(logits_BV), axis=-1) & ~jnp.any(unusable_BV, axis=-1)


def only_argmax(logits_BV):
  """-inf everywhere but at the first of each row's largest logits."""
  best_BV = jax.nn.one_hot(jnp.argmax(logits_BV, axis=-1), logits_BV.shape[-1], dtype=bool)
  return jnp.where(best_BV, logits_BV, -jnp.inf)


def per_row(value, logits_BV, dtype=jnp.float32):
  """A parameter ready to broadcast against logits_BV: a scalar, or [B] made a [B, 1] column.

  Raises SamplingError if its length is not the number of rows.
  """
  value = jnp.asarray(value, dtype)
  if value.ndim == 0:
    return value
  if value.shape != logits_BV.shape[:1]:
    raise SamplingError(
      f"a sampler's parameter has shape {value.shape}, the logits have {logits_BV.shape[0]} rows; "
      "give a scalar or one value a row"
    )
  return value[:, None]


def checked(sampler, name, valid, meaning, dtype=np.float32):
  """Validates a field while its sampler is built, and gives it its one form.

  A scalar becomes a Python number (an int where a float is meant, or a NumPy scalar, would trace the program
  again), rows become an array of `dtype`.  Tracers pass as they are.  Raises SamplingError for what is not a
  number or [B] numbers, or not `valid`.
  """
  value = getattr(sampler, name)
  if isinstance(value, jax.core.Tracer):
    return
  found = np.asarray(value)
  whole = np.issubdtype(dtype, np.integer)
  kinds = (np.integer,) if whole else (np.integer, np.floating)
  numeric = any(jnp.issubdtype(found.dtype, kind) for kind in kinds)  # jnp's knows bfloat16
  if not numeric or found.ndim > 1 or not np.all(valid(found)):
    raise SamplingError(
      f"{type(sampler).__name__}: {name} must be {meaning}, or [B] of them; found {value!r}"
    )
  if whole:
    found = np.minimum(found, np.iinfo(dtype).max)
  number = int if whole else float
  object.__setattr__(sampler, name, found.astype(dtype) if found.ndim else number(found))


def as_pytree(cls):
  """Registers a frozen dataclass as a pytree: every field is data, none is static.

  Not jax.tree_util.register_dataclass, which rebuilds through __init__: JAX puts None, shapes and arrays
  still being computed into a tree, and checking those would fail or wait for the device.
  """
  names = tuple(field.name for field in dataclasses.fields(cls))

  def flatten(sampler):
    return tuple(getattr(sampler, name) for name in names), None

  def flatten_with_keys(sampler):
    return tuple((jax.tree_util.GetAttrKey(name), getattr(sampler, name)) for name in names), None

  def unflatten(_, leaves):
    sampler = object.__new__(cls)
    for name, leaf in zip(names, leaves, strict=True):
      object.__setattr__(sampler, name, leaf)
    return sampler

  jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
  return cls
