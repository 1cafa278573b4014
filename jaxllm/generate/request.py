"""What a caller asks for, checked on the host and laid out in arrays whose shapes rarely change."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import tree
from jaxllm.config import ModelConfig
from jaxllm.errors import ConfigError, DataError, SamplingError, TokenizerError
from jaxllm.nn.cache import init_cache
from jaxllm.nn.shapes import expected_shapes
from jaxllm.nn.store import FULL, STORES, Full, Quantized
from jaxllm.nn.transformer import Transformer
from jaxllm.ops.memory import memory_of
from jaxllm.position import PositionTables, next_glm_positions
from jaxllm.sampling import Sampler

SLOTS = 128
"""Capacities of caches are multiples of it and an eighth of the next power of two: one program serves many lengths."""

ANY = 1 << 30
"""A part that holds any prompt."""

THREEFRY = "threefry2x32"
"""The kind of keys whose draws for a row depend on its own key alone: another kind's first words make one of it."""

LARGEST_POWER = 24
"""Of ten, by which a score may be divided or multiplied for its length."""

STEEPEST = 1e6
"""The most that logits and sums may be weighed with, as what comes of it stays finite in float32."""

VOCABULARY = {"embed": 0, "head": 1, "head_bias": 0}
"""The axis of the vocabulary of the parameters that may have more rows than ids."""

WHOLE = 512
"""The longest prompt that is padded to a power of two; a longer one to an eighth of it."""

MOST = 2**31 - 1
"""The most tokens of a row, as positions are int32."""


def checked_model(model: Any, params: Any, name: str = "") -> ModelConfig:
  """The config of a model whose parameters these may be; raises ConfigError for what is no model and for another tree.

  name: what messages put before "model" and "params".
  """
  if not isinstance(model, Transformer):
    raise ConfigError(f"{name}model: found {type(model).__name__}, expected nn.Transformer(cfg)")
  names = list(params) if isinstance(params, Mapping) else None
  if names is None or "embed" not in names:
    found = type(params).__name__ if names is None else f"a tree of {', '.join(map(str, names[:4]))}"
    hint = '; give its "params"' if names is not None and "params" in names else ""
    raise ConfigError(
      f"{name}params: found {found}, expected the model's parameters (embed, layers, ...){hint}"
    )
  _check_shapes(model.cfg, params, name)
  return model.cfg


def _check_shapes(cfg: ModelConfig, params: Mapping[str, Any], name: str) -> None:
  layers = params.get("layers", {})
  if len(layers) != cfg.num_layers:
    raise ConfigError(
      f"{name}params: found {len(layers)} layers, expected {cfg.num_layers}, those of the model's config"
    )
  expected, found = expected_shapes(cfg), tree.flatten(params)
  if missing := expected.keys() - found.keys():
    raise ConfigError(f"{name}params: found no {min(missing)}, expected it, {list(expected[min(missing)])}")
  for path, shape in expected.items():
    has = tuple(found[path].shape)
    padded = VOCABULARY.get(path)  # rows that a mesh adds
    same = len(has) == len(shape) and all(
      n >= m if axis == padded else n == m for axis, (n, m) in enumerate(zip(has, shape, strict=True))
    )
    if not same:
      raise ConfigError(
        f"{name}params: found {path} of shape {list(has)}, expected {list(shape)}, that of the model's config"
      )


def number(name: str, value: Any, least: float = -np.inf, most: float = np.inf) -> float:
  """`value` as a finite float from `least` to `most`; raises ConfigError."""
  real = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
  if not real or not np.isfinite(value) or not least <= value <= most:
    bounds = f" from {least:g} to {most:g}" if np.isfinite(most - least) else ""
    raise ConfigError(f"{name}: found {value!r}, expected a finite number{bounds}")
  return float(value)


def length_penalty(value: Any, max_new_tokens: int) -> float:
  """A number whose power of the longest text leaves scores finite and apart in float32; raises ConfigError."""
  most = LARGEST_POWER / math.log10(max(max_new_tokens, 10))
  return number("length_penalty", value, -round(most, 1), round(most, 1))


def count(name: str, value: Any) -> int:
  """`value` as an int from 1 to MOST; raises ConfigError."""
  if not _is_integer(value) or value < 1:
    raise ConfigError(f"{name}: found {value!r}, expected an integer of at least 1")
  if value > MOST:
    raise ConfigError(f"{name}: found {value}, expected at most {MOST}")
  return int(value)


def store(value: Any) -> Full | Quantized:
  """`value` if it is a form of the cache; raises ConfigError."""
  if not isinstance(value, (Full, Quantized)):
    names = ", ".join(map(repr, STORES))
    raise ConfigError(f"store: found {value!r}, expected a value such as STORES[name], name one of {names}")
  return value


def callback(name: str, value: Any) -> Any:
  """None, or `value` if it can be called; raises ConfigError."""
  if value is not None and not callable(value):
    raise ConfigError(f"{name}: found {value!r}, expected None or a function")
  return value


def top(name: str, value: Any, vocab_size: int) -> int | None:
  """None, or `value` as an int from 0 to the size of the vocabulary; raises ConfigError."""
  if value is None:
    return None
  if not _is_integer(value) or not 0 <= value <= vocab_size:
    raise ConfigError(f"{name}: found {value!r}, expected None or an integer from 0 to {vocab_size}")
  return int(value)


def bucket(length: int, part: int) -> int:
  """The smallest bucket for a prompt: powers of two from 16 to WHOLE, then an eighth of the next one apart.

  What is longer than `part` is read part by part, and its bucket is a multiple of it; parts that hold no token are not read.
  """
  power = max(16, 1 << (length - 1).bit_length())
  if power <= min(part, WHOLE):
    return power
  step = power // 8 if length <= part else part * max(1, power // 8 // part)
  return -(-length // step) * step


def padded(
  prompts: Sequence[Sequence[int]], vocab_size: int, length_limit: int | None = None, part: int = ANY
) -> tuple[np.ndarray, np.ndarray]:
  """(ids [B, T] right-padded to a bucket, lengths [B]), int32.

  length_limit: a bucket within `part` ends there, as padding needs positions too; a longer prompt makes it as long as itself.

  Raises DataError for no prompts, an empty one, or one that is no list; TokenizerError for what is not an id.
  """
  rows = id_rows("prompts", prompts, vocab_size)
  lengths = [len(row) for row in rows]
  T = bucket(max(lengths), part)
  if length_limit is not None and length_limit < T:
    T = max(min(T, length_limit), *lengths)
    T = T if part >= T else -(-T // part) * part
  return np.array([row + [0] * (T - len(row)) for row in rows], np.int32), np.array(lengths, np.int32)


def id_rows(name: str, prompts: Any, vocab_size: int) -> list[list[int]]:
  """Lists of ids; raises DataError for none, an empty one, or one that is no list; TokenizerError for what is not an id."""
  if isinstance(prompts, (str, bytes)) or not hasattr(prompts, "__len__"):
    raise DataError(f"{name}: found {prompts!r}, expected a list of lists of ids")
  if len(prompts) == 0:
    raise DataError(f"{name}: found none, expected a list of at least one list of ids")
  return [_row(f"{name}[{i}]", prompt, vocab_size) for i, prompt in enumerate(prompts)]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Place:
  """The position of a row's next token, [B] or [B, 2], and how much more the one after has: as `next_glm_positions` says."""

  pos: Any
  ahead: Any

  def moved(self) -> Place:
    """That of the token after."""
    return dataclasses.replace(self, pos=self.pos + self.ahead)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Own:
  """What a caller says of the prompts' tokens: pos [B, T] or [B, T, 2], the place of what follows, and prefix [B]; or None."""

  pos: Any = None
  next: Place | None = None
  prefix: Any = None

  @staticmethod
  def of(
    positions: Sequence[Any] | None, prefix: Sequence[int] | None, length_B: np.ndarray, T: int, part: int
  ) -> Own:
    """Of lists with an entry a prompt; raises ConfigError for what does not fit the prompts."""
    pos = following = leading = None
    if positions is not None:
      rows = [_positions(i, *pair) for i, pair in enumerate(_each("positions", positions, length_B.tolist()))]
      if len({row.shape[1:] for row in rows}) > 1:
        raise ConfigError("positions: found [T] for some prompts and [T, 2] for others, expected one for all")
      pos = np.stack([np.pad(row, [(0, T - len(row)), *[(0, 0)] * (row.ndim - 1)]) for row in rows])
      two = [next_glm_positions(row, 2) for row in rows]
      following = Place(np.stack([a for a, _ in two]), np.stack([b - a for a, b in two]))
    if prefix is not None:
      for i, (count, n) in enumerate(_each("prefix", prefix, length_B.tolist())):
        if not _is_integer(count) or not 0 <= count <= min(n, part):
          raise ConfigError(
            f"prefix[{i}]: found {count!r}, expected an integer from 0 to {min(n, part)}, the tokens of the first part"
          )
      leading = np.array(prefix, np.int32)
    return Own(pos, following, leading)


def guide(prompts: Sequence[Any], negative_prompts: Sequence[Any], scale: Any) -> np.ndarray:
  """The guidance of each prompt, float32 [B]; raises ConfigError for what is no number or does not fit the prompts."""
  _each("negative_prompts", negative_prompts, prompts)
  found = _array(scale)
  numeric = np.issubdtype(found.dtype, np.integer) or np.issubdtype(found.dtype, np.floating)
  if not numeric or found.shape not in ((), (len(prompts),)) or not (np.abs(found) <= STEEPEST).all():
    raise ConfigError(
      f"guidance_scale: found {scale!r}, expected a number of size {STEEPEST:g} at most, or one a prompt"
    )
  return np.broadcast_to(found.astype(np.float32), (len(prompts),))


def _each(name: str, values: Sequence[Any], prompts: Sequence[Any]) -> zip:
  found = len(values) if hasattr(values, "__len__") else repr(values)
  if found != len(prompts):
    raise ConfigError(f"{name}: found {found}, expected {len(prompts)}, one a prompt")
  return zip(values, prompts, strict=True)


def _positions(i: int, row: Any, n: int) -> np.ndarray:
  found = _array(row)
  if (
    found.shape not in ((n,), (n, 2))
    or not np.issubdtype(found.dtype, np.integer)
    or found.min() < 0
    or found.max() > MOST // 2
  ):
    raise ConfigError(
      f"positions[{i}]: found {found.dtype} of shape {found.shape}, expected integers from 0 to {MOST // 2} of shape ({n},) or "
      f"({n}, 2)"
    )
  return found.astype(np.int32)


def room(max_new_tokens: int) -> int:
  """Places for so many new tokens: a multiple of SLOTS, so that one program serves many numbers of them."""
  return -(-max_new_tokens // SLOTS) * SLOTS


class Prompts(NamedTuple):
  """Checked prompts as all ways of generating read them: right-padded ids [B, T], lengths [B], and which ids end a text [V]."""

  tokens: Any
  length: Any
  stop: Any


def prepared(
  cfg: ModelConfig,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int,
  stop_ids: Iterable[int] | None,
  part: int,
  ahead: int = 0,
) -> tuple[Prompts, int]:
  """(the prompts, the capacity of a cache) with room for so many new tokens, and for `ahead` that may be read and given up.

  stop_ids None: the config's eos_ids.  What would be read past the last position is not written: such tokens cannot be kept.
  Raises as `padded` and `stop_mask` do, and ConfigError where a learned table has too few positions.
  """
  tokens_BT, length_B = padded(prompts, cfg.vocab_size, cfg.length_limit, part)
  cfg.check_length(int(length_B.max()) + max_new_tokens, "longest prompt and max_new_tokens")
  needed = tokens_BT.shape[1] + max_new_tokens + ahead
  step = max(SLOTS, 1 << (needed - 1).bit_length() - 3)
  if needed > MOST:
    raise ConfigError(f"max_new_tokens: found {max_new_tokens}, expected fewer: positions are below 2^31")
  capacity = min(-(-needed // step) * step, MOST if cfg.length_limit is None else cfg.length_limit)
  stop_V = stop_mask(cfg.eos_ids if stop_ids is None else stop_ids, cfg.vocab_size)
  return Prompts(tokens_BT, length_B, stop_V), capacity


def check_memory(
  cfg: ModelConfig,
  rows: int,
  capacity: int,
  call: int | None,
  store: Full | Quantized = FULL,
  *,
  what: str = "max_new_tokens",
  before: int = 0,
  reach: int = 0,
) -> None:
  """Raise ConfigError for what is more than all devices hold, before anything is compiled for it.

  That is a cache of `capacity`, with the one of capacity `before` that it takes the place of, and tables for `reach` positions.
  """

  def bytes_of(capacity: int) -> int:
    cache = jax.eval_shape(functools.partial(init_cache, cfg, rows, capacity, call=call, store=store))
    return sum(x.size * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(cache))

  tables = sum(4 * cfg.rotary_dim(rope) * len(rope.seq_lens(reach)[1]) for rope in cfg.ropes) if reach else 0
  needed = bytes_of(capacity) + (bytes_of(before) if before else 0) + tables
  there = memory_of(jax.devices())
  if there is not None and needed > there.bytes * there.devices:
    raise ConfigError(
      f"{what}: found a cache and tables of positions of {needed / 2**30:,.1f} GiB, for {rows} rows of {capacity} tokens, "
      f"expected at most the {there.bytes * there.devices / 2**30:,.1f} GiB of the devices; ask for fewer tokens or rows, or "
      "for a cache of integers"
    )


def stop_mask(stop_ids: Iterable[int], vocab_size: int) -> np.ndarray:
  """Which ids end a row, bool [V]: one shape for any number of them.

  Raises ConfigError for what is no list, TokenizerError for what is not an id.
  """
  mask_V = np.zeros(vocab_size, bool)
  if isinstance(stop_ids, str) or not isinstance(stop_ids, Iterable):
    raise ConfigError(f"stop_ids: found {stop_ids!r}, expected a tuple of ids")
  for i, token in enumerate(stop_ids):
    mask_V[_checked_id(f"stop_ids[{i}]", token, vocab_size)] = True
  return mask_V


def checked_key(key: jax.Array | None, sampler: Sampler, B: int) -> jax.Array | None:
  """The key, or one a row; None is good where nothing is drawn by chance, as by Greedy.

  Raises SamplingError for what is no sampler, ConfigError for what is no key.
  """
  if not isinstance(sampler, Sampler):
    raise SamplingError(f"sampler: found {sampler!r}, expected a value such as Greedy() or TopP(0.9)")
  if key is None and not sampler.by_chance:
    return None
  if isinstance(key, jax.Array) and key.dtype == jnp.uint32:  # PRNGKey's form
    key = jax.random.wrap_key_data(key)
  is_key = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
  if not is_key or key.shape not in ((), (B,)):
    raise ConfigError(f"key: found {key!r}, expected jax.random.key(seed), or a key for each of the {B} rows")
  if str(jax.random.key_impl(key)) != THREEFRY:  # rbg draws for all rows at once, by the first one's key
    key = jax.random.wrap_key_data(jax.random.key_data(key)[..., :2], impl=THREEFRY)
  return key


def row_keys(key: jax.Array | None, B: int) -> jax.Array:
  """One key a row, [B]: those given, or fold_in(key, row); any where there is none, as they are never read."""
  key = jax.random.key(0, impl=THREEFRY) if key is None else key
  return key if key.ndim else jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(B))


def fixed(rope: PositionTables) -> PositionTables:
  """`rope` if its one row serves every length; raises ConfigError otherwise: its rows may end too early."""
  if not isinstance(rope, PositionTables):
    raise ConfigError(f"rope: found {rope!r}, expected the tables of cfg.rope_tables()")
  rows = max((table.rows for table in rope.ropes), default=1)
  if rows > 1:
    raise ConfigError(
      f"rope: found a table of {rows} rows, expected one; leave rope out for a method whose frequencies "
      "depend on the length, or pin one length with rope_tables(seq_len=...)"
    )
  return rope


def _row(where: str, prompt: Sequence[int], vocab_size: int) -> list[int]:
  ids = prompt.tolist() if hasattr(prompt, "tolist") else prompt
  if not isinstance(ids, Sequence) or isinstance(ids, str):
    raise DataError(f"{where}: found {prompt!r}, expected a list of ids")
  if len(ids) == 0:
    raise DataError(f"{where}: found an empty prompt, expected at least one id")
  return [_checked_id(f"{where}[{i}]", token, vocab_size) for i, token in enumerate(ids)]


def _checked_id(where: str, token: Any, vocab_size: int) -> int:
  if not _is_integer(token) or not 0 <= token < vocab_size:
    raise TokenizerError(f"{where}: found {token!r}, expected an integer from 0 to {vocab_size - 1}")
  return int(token)


def _array(value: Any) -> np.ndarray:
  try:
    return np.asarray(value)
  except ValueError:  # rows of several lengths
    return np.empty(0, object)


def _is_integer(value: Any) -> bool:
  return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
