"""The sampler contract, the draw, and what every filter shares."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import SamplingError

ROOM = 1024
"""How many draws `init` makes place for where nobody says how many there will be."""

NOTHING = -1
"""The token of a row whose filters left none."""

KINDS = {"b": ((np.bool_,), bool), "i": ((np.integer,), int), "f": ((np.integer, np.floating), float)}
"""For each kind of NumPy type, which types may be given for it, and the Python type of one."""


class Sampler:
  """Draws from softmax(filter(logits)); a kind of sampler overrides `filter`, `init` and `update` if it
  remembers anything, and `toss` if its filter is a matter of chance.

  The state is an argument and a result, of the same shapes unless it is `grown`.  Nothing here depends on the other rows
  of the batch: a row's token is a function of its own key, logits, parameters and state.
  """

  @property
  def by_chance(self):
    """Whether what is drawn depends on the keys."""
    return True

  def init(self, tokens, lengths, room=ROOM):
    """The state before the first draw, from right-padded prompts tokens [B, T] and their lengths [B].

    room: how many draws a row has place for beyond T, an integer known when the program is compiled; what
    remembers tokens keeps the newest T + room of a row, prompt included, and forgets the oldest.
    """
    return ()

  def grown(self, state, more):
    """The state with place for `more` draws beyond those that `init` was told of."""
    return state

  def toss(self, key_B, state):
    """The state for one draw, with whatever chance `filter` needs from one key a row."""
    return state

  def filter(self, logits_BV, state):
    """Logits as float32, whatever came in, and -inf where a token is excluded.

    What goes by probability leaves at least one; what bans tokens may ban all that the model allows.
    """
    return logits_BV.astype(jnp.float32)

  def update(self, tokens_B, state, logits_BV):
    """The state after tokens_B were drawn from softmax(logits_BV), the filtered ones."""
    return state

  def __call__(self, key_B, logits_BV, state):
    """Draws one token a row with one key a row: (tokens_B int32, state).

    token = argmax_v (filtered_v + g_v), g Gumbel noise of the row's own key; NOTHING (-1) where the filters
    left no token.  Rows that `check_logits` refuses give a token without meaning.  Raises SamplingError unless
    key_B holds one key a row.
    """
    if key_B.shape[:1] != logits_BV.shape[:1]:
      raise SamplingError(
        f"a sampler needs one key a row: found keys of shape {key_B.shape} for logits of shape "
        f"{logits_BV.shape}; use jax.random.split(key, {logits_BV.shape[0]})"
      )
    state = self.toss(key_B, state)
    filtered_BV = self.filter(logits_BV, state)
    left_B = jnp.any(filtered_BV > -jnp.inf, axis=-1)
    tokens_B = jnp.where(left_B, draw(key_B, filtered_BV), NOTHING)
    return tokens_B, self.update(tokens_B, state, filtered_BV)


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
  hide the fault.  That filters left nothing of a good row shows in its token, NOTHING.
  """
  logits_BV = logits_BV.astype(jnp.float32)
  unusable_BV = jnp.isnan(logits_BV) | jnp.isposinf(logits_BV)
  return jnp.any(jnp.isfinite(logits_BV), axis=-1) & ~jnp.any(unusable_BV, axis=-1)


def first_largest(logits_BV):
  """The first of each row's largest logits, int32 [B], as `jnp.argmax` but for rows with NaN, which give the last.

  A maximum and a minimum, each of which XLA reduces in vectors on a CPU, and not the pairs of `jnp.argmax` (two cores, 32,000
  logits, 1 and 8 rows: 12 and 150 microseconds, as pairs 135 and 538).
  """
  last = logits_BV.shape[-1] - 1
  id_BV = jax.lax.broadcasted_iota(jnp.int32, logits_BV.shape, logits_BV.ndim - 1)
  is_BV = logits_BV == jnp.max(logits_BV, axis=-1, keepdims=True)
  return jnp.min(jnp.where(is_BV, id_BV, last), axis=-1)


def only_argmax(logits_BV):
  """-inf everywhere but at the first of each row's largest logits."""
  best_BV = jax.nn.one_hot(first_largest(logits_BV), logits_BV.shape[-1], dtype=bool)
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


def per_token(value, logits_BV, dtype):
  """A table ready to broadcast against logits_BV: [V] made [1, V], or [B, V] as it is.

  Raises SamplingError if it has another shape than the logits.
  """
  value = jnp.asarray(value, dtype)
  if value.shape not in (logits_BV.shape, logits_BV.shape[-1:]):
    raise SamplingError(
      f"a sampler's table of tokens has shape {value.shape}, the logits have shape {logits_BV.shape}; "
      "give one value a token, [V] or [B, V]"
    )
  return value.reshape(-1, logits_BV.shape[-1])


def log_probs(logits_BV):
  """Logarithms of softmax(logits_BV), float32; -inf where the logit is."""
  return jax.nn.log_softmax(logits_BV.astype(jnp.float32), axis=-1)


def entropy(log_BV):
  """- sum_v p_v log p_v in nats, from log p: [B, 1]; nothing for what has no probability."""
  log_BV = jnp.where(log_BV > -jnp.inf, log_BV, 0.0)  # 0 * -inf would be a NaN that jax_debug_nans reports
  return -jnp.sum(jnp.exp(log_BV) * log_BV, axis=-1, keepdims=True)


def at_least(logits_BV, keep_BV):
  """The logits where keep_BV or where they are the row's largest (all of those that are equal); else -inf."""
  return jnp.where(keep_BV | (logits_BV == jnp.max(logits_BV, axis=-1, keepdims=True)), logits_BV, -jnp.inf)


def _numbers(value, dtype):
  """(an array, whether it is of what may be given for `dtype`): integers above those of `dtype` are its largest."""
  try:
    found = np.asarray(value)
  except ValueError:  # rows of several lengths
    return np.empty(0, object), False
  kinds, _ = KINDS[np.dtype(dtype).kind]
  fits = any(jnp.issubdtype(found.dtype, kind) for kind in kinds)  # jnp's knows bfloat16
  if fits and np.issubdtype(dtype, np.integer):
    found = np.minimum(found, np.int64(np.iinfo(dtype).max))
  return found, fits


def checked(sampler, name, valid, meaning, dtype=np.float32):
  """Validates a field while its sampler is built, and gives it its one form.

  A scalar becomes a Python number (an int where a float is meant, or a NumPy scalar, would trace the program
  again), rows become an array of `dtype`.  Tracers pass as they are.  Raises SamplingError for what is not a
  number or [B] numbers, or not `valid`.
  """
  value = getattr(sampler, name)
  if isinstance(value, jax.core.Tracer):
    return
  found, fits = _numbers(value, dtype)
  if not fits or found.ndim > 1 or not np.all(valid(found)):
    raise SamplingError(
      f"{type(sampler).__name__}: {name} must be {meaning}, or [B] of them; found {value!r}"
    )
  _, number = KINDS[np.dtype(dtype).kind]
  object.__setattr__(sampler, name, found.astype(dtype) if found.ndim else number(found))


def checked_table(sampler, name, valid, meaning, dtype=np.float32):
  """Validates a field of one value a token while its sampler is built, and makes it an array of `dtype`.

  Tracers pass as they are.  An integer above those of `dtype` becomes its largest, a float beyond it an infinity.  Raises
  SamplingError for what is not [V] or [B, V] numbers (of truth values, where `dtype` is bool), or then not `valid`.
  """
  value = getattr(sampler, name)
  if isinstance(value, jax.core.Tracer):
    return
  found, fits = _numbers(value, dtype)
  with np.errstate(over="ignore"):
    table = found.astype(dtype) if fits else found
  if not fits or found.ndim not in (1, 2) or not found.size or not np.all(valid(table)):
    shown = value if found.size <= 8 else f"an array of shape {found.shape}, {found.dtype}"
    raise SamplingError(f"{type(sampler).__name__}: {name} must be {meaning}; found {shown!r}")
  object.__setattr__(sampler, name, table)


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
