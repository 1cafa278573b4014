"""The model's configuration: one frozen, hashable value that is its whole architecture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxllm.activation import MLPS, Glu
from jaxllm.errors import ConfigError
from jaxllm.norm import NORMS, RMSNorm
from jaxllm.ops.attention import Plain
from jaxllm.ops.blockwise import Blockwise
from jaxllm.position import POSITIONS, LogN, Position, Rope
from jaxllm.position.query_scale import query_scale_table
from jaxllm.position.tables import PositionTables, RopeTable, make_table

ATTENTIONS = {"plain": Plain, "blockwise": Blockwise}
QUERY_SCALES = {"log_n": LogN}
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Layer:
  """One place of the repeating layer pattern: its position method, and the nearest `window` keys it sees (None: all)."""

  position: Position = dataclasses.field(default_factory=Rope)
  window: int | None = None

  def __post_init__(self):
    if self.window is not None and (not isinstance(self.window, int) or self.window < 1):
      raise ConfigError(f"Layer.window: found {self.window!r}, expected an integer of at least 1, or None")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A pre-norm decoder.  Letters: vocab_size V, embed_dim D, num_layers L, num_heads N, num_kv_heads K, head_dim H, mlp_dim F.

  `layers` repeats over the depth; `dtype` is the compute type, parameters being float32; `embed_scale` multiplies the
  token embeddings; `attention` is the core (Plain or Blockwise), which changes speed and memory and not the result.
  """

  vocab_size: int
  embed_dim: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_dim: int
  layers: tuple[Layer, ...] = (Layer(),)
  norm: Any = RMSNorm()
  mlp: Any = Glu()
  query_scale: LogN | None = None
  tie_embeddings: bool = False
  embed_scale: float = 1.0
  attention: Any = Plain()
  dtype: str = "float32"

  def __post_init__(self):
    for name in ("vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim"):
      value = getattr(self, name)
      if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name}: found {value!r}, expected an integer of at least 1")
    if self.num_heads % self.num_kv_heads:
      raise ConfigError(
        f"num_kv_heads: found {self.num_kv_heads}, expected a divisor of num_heads = {self.num_heads}"
      )
    if not self.layers or self.num_layers % len(self.layers):
      raise ConfigError(
        f"layers: a pattern of {len(self.layers)} does not divide num_layers = {self.num_layers}"
      )
    if self.dtype not in DTYPES:
      raise ConfigError(f"dtype: found {self.dtype!r}, expected one of {', '.join(DTYPES)}")
    for rope in self.ropes:
      if self.rotary_dim(rope) % 2 or self.rotary_dim(rope) > self.head_dim:
        raise ConfigError(
          f"rotary_dim: found {self.rotary_dim(rope)}, expected an even number of at most head_dim = {self.head_dim}"
        )

  def layer(self, index: int) -> Layer:
    """The kind of layer `index`."""
    return self.layers[index % len(self.layers)]

  def rotary_dim(self, rope: Rope) -> int:
    """How many coordinates of a head this RoPE turns."""
    return rope.rotary_dim or self.head_dim

  @property
  def ropes(self) -> tuple[Rope, ...]:
    """The distinct RoPEs of the layers, in order of appearance: the order of `PositionTables.ropes`."""
    return tuple(dict.fromkeys(layer.position for layer in self.layers if isinstance(layer.position, Rope)))

  def with_position(self, name: str, **kwargs: Any) -> ModelConfig:
    """This config with method `name` on its global RoPE layers (those without a window).

    base, rotary_dim, layout and original_length stay as they are unless given.  Raises ConfigError for an unknown method and
    for a model that has no such layer: a method that would change nothing is refused.
    """
    if name not in POSITIONS:
      raise ConfigError(f"position method: found {name!r}, expected one of {', '.join(POSITIONS)}")
    cls = POSITIONS[name]
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(set(kwargs) - known):
      raise ConfigError(f"{name}: no field {', '.join(unknown)}; it has {', '.join(sorted(known)) or 'none'}")

    def replaced(layer: Layer) -> Layer:
      if not isinstance(layer.position, Rope) or layer.window is not None:
        return layer
      kept = {
        key: getattr(layer.position, key) for key in ("base", "rotary_dim", "layout", "original_length")
      }
      return dataclasses.replace(
        layer, position=cls(**({k: v for k, v in kept.items() if k in known} | kwargs))
      )

    if not any(isinstance(layer.position, Rope) and layer.window is None for layer in self.layers):
      raise ConfigError(f"position method {name}: the model has no global RoPE layer for it to change")
    return dataclasses.replace(self, layers=tuple(map(replaced, self.layers)))

  def rope_tables(self, max_len: int | None = None, seq_len: int | None = None) -> PositionTables:
    """Everything about positions that a compiled program takes as data.

    A method whose frequencies depend on the length has a row for each distinct length up to `max_len`, and every query uses
    the row of its own length; `seq_len` pins one length for all of a call instead.  `Transformer` refuses tables of a
    `max_len` below the length of its call, and those of a method that is no set of frequencies (ReRoPE) in a model of another;
    it cannot see that tables are of another base or factor, of another ReRoPE window, or pinned at another length.
    """

    def table(rope: Rope) -> RopeTable:
      rotary_dim = self.rotary_dim(rope)
      if seq_len is not None:
        return make_table([rope.frequencies(rotary_dim, seq_len)], program=rope.program)
      start, lengths = rope.seq_lens(max_len)
      rows = [rope.frequencies(rotary_dim, length) for length in lengths]
      return make_table(rows, start, rope.reach(max_len), rope.program)

    return PositionTables(tuple(map(table, self.ropes)), query_scale_table(self.query_scale))

  def to_dict(self) -> dict[str, Any]:
    """Plain JSON values; `from_dict` is the inverse."""
    plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    plain |= {key: _dump(kinds, plain[key]) for key, kinds in _VALUES.items()}
    plain["layers"] = [
      {"position": _dump(POSITIONS, layer.position), "window": layer.window} for layer in self.layers
    ]
    return plain

  @classmethod
  def from_dict(cls, plain: Mapping[str, Any]) -> ModelConfig:
    """The config of `to_dict`'s output; an unknown key or name, or a missing key without a default, is a ConfigError."""
    known = {f.name: f.default is dataclasses.MISSING for f in dataclasses.fields(cls)}
    if unknown := sorted(set(plain) - set(known)):
      raise ConfigError(f"model config: unknown key {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    if missing := [name for name, required in known.items() if required and name not in plain]:
      raise ConfigError(
        f"model config: no {', '.join(missing)}; found: {', '.join(sorted(plain)) or 'nothing'}"
      )
    values = dict(plain)
    values |= {key: _build(kinds, key, plain[key]) for key, kinds in _VALUES.items() if key in plain}
    if "layers" in plain:
      values["layers"] = tuple(map(_build_layer, plain["layers"]))
    return cls(**values)


_VALUES = {"norm": NORMS, "mlp": MLPS, "query_scale": QUERY_SCALES, "attention": ATTENTIONS}


def _dump(kinds: Mapping[str, type], value: Any) -> dict[str, Any] | None:
  if value is None:
    return None
  name = next(name for name, kind in kinds.items() if kind is type(value))
  return {"name": name} | dataclasses.asdict(value)


def _build_layer(plain: Mapping[str, Any]) -> Layer:
  if not isinstance(plain, Mapping) or not {"position"} <= set(plain) <= {"position", "window"}:
    raise ConfigError(
      f"layers: found {plain!r}, expected position, window (which may be left out) and no other"
    )
  return Layer(_build(POSITIONS, "layers.position", plain["position"]), plain.get("window"))


def _build(kinds: Mapping[str, type], key: str, plain: Mapping[str, Any] | None) -> Any:
  if plain is None and key == "query_scale":
    return None
  if not isinstance(plain, Mapping):
    raise ConfigError(f"{key}: found {plain!r}, expected its name and fields")
  fields = dict(plain)
  name = fields.pop("name", None)
  if name not in kinds:
    raise ConfigError(f"{key}.name: found {name!r}, expected one of {', '.join(kinds)}")
  known = {f.name for f in dataclasses.fields(kinds[name])}
  if unknown := sorted(set(fields) - known):
    raise ConfigError(
      f"{key}: {name} has no field {', '.join(unknown)}; it has {', '.join(sorted(known)) or 'none'}"
    )
  return kinds[name](**fields)
