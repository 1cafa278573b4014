"""The model's configuration: one frozen, hashable value that is its whole architecture."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from jaxllm.activation import MLPS, Glu
from jaxllm.errors import ConfigError, check_choice, check_positive
from jaxllm.experts import EXPERTS, ROUTERS, Moe
from jaxllm.norm import NORMS, QkNorm, RMSNorm
from jaxllm.ops.choose import CORES, Auto
from jaxllm.position import POSITIONS, NoPE, Position, Rope, float32
from jaxllm.position.query_scale import QUERY_SCALES, Llama4Scale, LogN, query_scale_table
from jaxllm.position.tables import PositionTables, Table, make_table
from jaxllm.wiring import WIRINGS, Pre

DTYPES = ("float32", "bfloat16", "float16")
PRECISIONS = ("exact", "hf")


@dataclasses.dataclass(frozen=True)
class Layer:
  """One place of the repeating layer pattern: its position method, the nearest `window` keys it sees (None: all), and its mlp.

  mlp: a feed-forward layer of its own (None: the config's), such as the dense ones among those of experts.
  """

  position: Position = dataclasses.field(default_factory=Rope)
  window: int | None = None
  mlp: Any = None

  def __post_init__(self):
    if self.window is not None and (not isinstance(self.window, int) or self.window < 1):
      raise ConfigError(f"Layer.window: found {self.window!r}, expected an integer of at least 1, or None")


def hwfa_layers(num_layers: int, window: int, position: Position) -> tuple[Layer, ...]:
  """HWFA: num_layers - 1 layers with `position` (a RoPE) and a window, and a last one that sees all keys, without positions.

  Before the last layer a token has seen (window - 1) (num_layers - 1) + 1 tokens, itself included; the published advice is to
  keep that within 3/4 of the trained length.  With query_scale = LogN(trained length), which acts on the last layer only.
  Raises ConfigError for fewer than two layers.  Source: kexue.fm/archives/9603.
  """
  if not isinstance(num_layers, int) or num_layers < 2:
    raise ConfigError(f"hwfa_layers: found num_layers = {num_layers!r}, expected an integer of at least 2")
  return (Layer(position, window),) * (num_layers - 1) + (Layer(NoPE()),)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder.  Letters: vocab_size V, embed_dim D, num_layers L, num_heads N, num_kv_heads K, head_dim H, mlp_dim F.

  layers: kinds of layer, repeated over the depth.  wiring, norm, mlp: how a block joins its parts, and what they are.
  query_scale: queries scaled by position, as a LogN or a Llama4Scale says.
  rope_precision: "exact", or "hf" for the angles of transformers, which computes frequencies, their products with positions,
  and cosines in float32: for logits equal to its own at long positions.  Exact angles are the better ones.
  biases: which of q, k, v, o, gate, up, down, head and the router of experts have one.
  tie_embeddings: the head is the embedding, transposed.  embed_scale: multiplies the token embeddings.
  embed_width: the width E of the embedding and of what the head reads, where it is not D: x = embed[token] embed_in and
  logits = (h embed_out) head, with embed_in [E, D] and embed_out [D, E].  Source of the embedding width: Zhang et al. (2022),
  OPT-350m, and transformers' `word_embed_proj_dim`.
  embed_norm: `norm` over what enters the first layer.  Source of the embedding norm: Scao et al. (2022), BLOOM.
  embed_gradient: the share of its gradient that the embedding gets (`ops.head.shrink_gradient`), tied head included.
  attention_scale: what queries are multiplied by, None being head_dim ** -0.5.  Source of the attention scale: transformers'
  `query_pre_attn_scalar` (to the power of -1/2; Gemma 2), `attention_multiplier` (Granite), `softmax_scale` (MPT).
  qk_norm, clip_qkv: queries and keys normalised; q, k and v clipped to +-clip_qkv.  attention_softcap, logit_softcap: scores
  and logits become cap tanh(x / cap).  logit_scale: multiplies the logits, before their cap.  Source of the logit scale:
  transformers' `logit_scale` (Cohere) and 1 / `logits_scaling` (Granite).  attention_sinks: a learned logit a head that takes
  a share of each query's attention (Xiao et al., 2023, section 3.3; GPT-OSS).  layer_scaling: see `nn.attention.Attention`.
  norm_head: see `ops.head.Head`.
  attention: the core (one of ops.choose.CORES), which changes speed and memory and not the result; by default the one for the
  device and the length of each call.
  dtype: the compute type; parameters may be of any type.
  context_length: how many tokens the model is said to serve, for information only.  eos_ids: the tokens that end a text, where
  `generate` stops by default.
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
  wiring: Any = Pre()
  query_scale: LogN | Llama4Scale | None = None
  rope_precision: str = "exact"
  biases: tuple[str, ...] = ()
  tie_embeddings: bool = False
  embed_scale: float = 1.0
  embed_width: int | None = None
  embed_norm: bool = False
  embed_gradient: float = 1.0
  attention_scale: float | None = None
  qk_norm: QkNorm | None = None
  clip_qkv: float | None = None
  attention_softcap: float | None = None
  logit_softcap: float | None = None
  logit_scale: float = 1.0
  attention_sinks: bool = False
  layer_scaling: bool = False
  norm_head: bool = False
  attention: Any = Auto()
  dtype: str = "float32"
  context_length: int | None = None
  eos_ids: tuple[int, ...] = ()

  def __post_init__(self):
    sizes = ("vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim")
    given = (name for name in ("embed_width", "context_length") if getattr(self, name) is not None)
    for name in (*sizes, *given):
      if not _is_integer(value := getattr(self, name)) or value < 1:
        raise ConfigError(f"{name}: found {value!r}, expected an integer of at least 1")
    ids = self.eos_ids if isinstance(self.eos_ids, (tuple, list)) else (self.eos_ids,)  # JSON has lists
    object.__setattr__(self, "eos_ids", tuple(ids))
    for value in self.eos_ids:
      if not _is_integer(value) or not 0 <= value < self.vocab_size:
        raise ConfigError(
          f"eos_ids: found {value!r}, expected integers from 0 to vocab_size - 1 = {self.vocab_size - 1}"
        )
    if self.num_heads % self.num_kv_heads:
      raise ConfigError(
        f"num_kv_heads: found {self.num_kv_heads}, expected a divisor of num_heads = {self.num_heads}"
      )
    if not self.layers or self.num_layers % len(self.layers):
      raise ConfigError(
        f"layers: a pattern of {len(self.layers)} does not divide num_layers = {self.num_layers}"
      )
    object.__setattr__(self, "biases", tuple(self.biases))  # JSON has lists
    for name in self.biases:
      inputs = dict.fromkeys(one for mlp in self.mlps for one in mlp.inputs)
      if name not in (allowed := ("q", "k", "v", "o", *inputs, "down", "head")):
        raise ConfigError(f"biases: found {name!r}, expected some of {', '.join(allowed)}")
    check_choice(self, "embed_norm", (True, False))
    check_choice(self, "norm_head", (True, False))
    check_choice(self, "rope_precision", PRECISIONS)
    check_positive(self, embed_gradient=self.embed_gradient, logit_scale=self.logit_scale)
    if self.embed_gradient > 1:
      raise ConfigError(
        f"embed_gradient: found {self.embed_gradient!r}, expected a number above 0 and at most 1"
      )
    for name in ("attention_scale", "clip_qkv", "attention_softcap", "logit_softcap"):
      if getattr(self, name) is not None:
        check_positive(self, **{name: getattr(self, name)})
    if self.attention_scale is not None:
      for position in self.positions:
        if getattr(position, "placement", "after") == "before":
          raise ConfigError(
            f"attention_scale: found {self.attention_scale!r}, expected None with a bias that is divided by sqrt(head_dim) ("
            f"{type(position).__name__}(placement='before'))"
          )
    if self.qk_norm is not None and self.qk_norm.place == "after":
      for layer in self.layers:
        if layer.position.needs_raw_keys:
          raise ConfigError(
            f"qk_norm.place: found 'after', expected 'before' with {type(layer.position).__name__}, whose keys are "
            "rotated anew for each query"
          )
    if self.dtype not in DTYPES:
      raise ConfigError(f"dtype: found {self.dtype!r}, expected one of {', '.join(DTYPES)}")
    for rope in self.ropes:
      if self.rotary_dim(rope) % rope.rotary_multiple or self.rotary_dim(rope) > self.head_dim:
        kind = "an even number" if rope.rotary_multiple == 2 else f"a multiple of {rope.rotary_multiple}"
        raise ConfigError(
          f"rotary_dim: found {self.rotary_dim(rope)}, expected {kind} of at most head_dim = {self.head_dim}"
        )

  @property
  def token_width(self) -> int:
    """The width of the embedding and of the head's input: embed_width, or else embed_dim."""
    return self.embed_dim if self.embed_width is None else self.embed_width

  @property
  def score_scale(self) -> float:
    """What queries are multiplied by before their inner products with keys."""
    return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

  def layer(self, index: int) -> Layer:
    """The kind of layer `index`."""
    return self.layers[index % len(self.layers)]

  def mlp_of(self, layer: Layer) -> Any:
    """The feed-forward layer of a kind of layer."""
    return self.mlp if layer.mlp is None else layer.mlp

  @property
  def mlps(self) -> tuple[Any, ...]:
    """The distinct feed-forward layers, in order of appearance."""
    return tuple(dict.fromkeys(map(self.mlp_of, self.layers)))

  def rotary_dim(self, rope: Rope) -> int:
    """How many coordinates of a head this RoPE turns."""
    return rope.rotary_dim or self.head_dim

  @property
  def ropes(self) -> tuple[Rope, ...]:
    """The distinct RoPEs of the layers, in order of appearance: the order of `PositionTables.ropes`."""
    return tuple(position for position in self.positions if isinstance(position, Rope))

  @property
  def positions(self) -> tuple[Position, ...]:
    """The distinct position methods of the layers, in order of appearance."""
    return tuple(dict.fromkeys(layer.position for layer in self.layers))

  @property
  def learned_positions(self) -> tuple[Position, ...]:
    """The distinct methods with parameters, in order of appearance: number i has its own at positions/<i>/<name>."""
    return tuple(position for position in self.positions if position.params(self))

  @property
  def length_limit(self) -> int | None:
    """How many positions the model has, or None where no learned table ends."""
    limits = [position.length_limit for position in self.positions if position.length_limit is not None]
    return min(limits, default=None)

  def check_length(self, length: int, what: str) -> None:
    """Raise ConfigError if `length` positions, those of `what`, are more than the model has."""
    if self.length_limit is not None and length > self.length_limit:
      raise ConfigError(
        f"{what}: found {length}, expected at most max_length = {self.length_limit}, the learned positions of the model"
      )

  def with_position(self, name: str, **kwargs: Any) -> ModelConfig:
    """This config with method `name` on its global RoPE layers (those without a window).

    base, rotary_dim, layout and original_length stay as they are unless given.  Raises ConfigError for an unknown method and
    for a model that has no such layer: a method that would change nothing is refused.  Two-dimensional RoPE is not replaced.
    """
    if name not in POSITIONS:
      raise ConfigError(f"position method: found {name!r}, expected one of {', '.join(POSITIONS)}")
    cls = POSITIONS[name]
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(set(kwargs) - known):
      raise ConfigError(f"{name}: no field {', '.join(unknown)}; it has {', '.join(sorted(known)) or 'none'}")

    def is_global_rope(layer: Layer) -> bool:
      rope = layer.position
      return isinstance(rope, Rope) and not rope.two_dimensional and layer.window is None

    def replaced(layer: Layer) -> Layer:
      if not is_global_rope(layer):
        return layer
      kept = {
        key: getattr(layer.position, key) for key in ("base", "rotary_dim", "layout", "original_length")
      }
      return dataclasses.replace(
        layer, position=cls(**({k: v for k, v in kept.items() if k in known} | kwargs))
      )

    if not any(map(is_global_rope, self.layers)):
      raise ConfigError(f"position method {name}: the model has no global RoPE layer for it to change")
    return dataclasses.replace(self, layers=tuple(map(replaced, self.layers)))

  def rope_tables(self, max_len: int | None = None, seq_len: int | None = None) -> PositionTables:
    """Everything about positions that a compiled program takes as data.

    A method whose frequencies depend on the length has a row for each distinct length up to `max_len`, and every query uses
    the row of its own length; `seq_len` pins one length for all of a call instead.  `Transformer` refuses tables of a
    `max_len` below the length of its call, and those of a method that is no set of frequencies (ReRoPE) in a model of another;
    it cannot see that tables are of another base or factor, of another ReRoPE window, or pinned at another length.
    """

    hf = self.rope_precision == "hf"

    def table(rope: Rope) -> Table:
      frequencies = functools.partial(float32.frequencies, rope) if hf else None
      start, rows = rope.rows(self.rotary_dim(rope), max_len, seq_len, frequencies)
      reach = rope.reach(max_len) if seq_len is None else None
      return make_table(rows, start, reach, rope.program, self.rope_precision)

    return PositionTables(tuple(map(table, self.ropes)), query_scale_table(self.query_scale))

  def to_dict(self) -> dict[str, Any]:
    """Plain JSON values; `from_dict` is the inverse."""
    return _dump_fields(self)

  @classmethod
  def from_dict(cls, plain: Mapping[str, Any]) -> ModelConfig:
    """The config of `to_dict`'s output; an unknown key or name, or a missing key without a default, is a ConfigError."""
    values = _build_fields(cls, "model config", plain)
    if "layers" in plain:
      values["layers"] = tuple(map(_build_layer, plain["layers"]))
    return cls(**values)


def _is_integer(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


_KINDS: dict[str, Mapping[str, type]] = {
  "position": POSITIONS,
  "norm": NORMS,
  "mlp": MLPS | {"moe": Moe},
  "expert": EXPERTS,
  "router": ROUTERS,
  "wiring": WIRINGS,
  "query_scale": QUERY_SCALES,
  "qk_norm": {"qk_norm": QkNorm},
  "attention": CORES,
}
"""The fields whose value is one of several kinds, by name: JSON has {"name": kind, ... its fields}."""
_OPTIONAL = ("query_scale", "qk_norm")
_LAYER_FIELDS = tuple(f.name for f in dataclasses.fields(Layer))


def _dump_fields(value: Any) -> dict[str, Any]:
  return {f.name: _dump(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)}


def _dump(field: str, value: Any) -> Any:
  if field == "layers":
    return [_dump_fields(layer) for layer in value]
  if field not in _KINDS or value is None:
    return list(value) if isinstance(value, tuple) else value
  name = next(name for name, kind in _KINDS[field].items() if kind is type(value))
  return {"name": name} | _dump_fields(value)


def _build_layer(plain: Any) -> Layer:
  if not isinstance(plain, Mapping) or not {"position"} <= set(plain) <= set(_LAYER_FIELDS):
    raise ConfigError(
      f"layers: found {plain!r}, expected position, window, mlp (which may be left out) and no other"
    )
  plain = {name: value for name, value in plain.items() if name != "mlp" or value is not None}
  return Layer(**_build_fields(Layer, "layers", plain))


def _build(field: str, plain: Any) -> Any:
  if field not in _KINDS or (plain is None and field in _OPTIONAL):
    return plain
  if not isinstance(plain, Mapping):
    raise ConfigError(f"{field}: found {plain!r}, expected its name and fields")
  kinds, values = _KINDS[field], dict(plain)
  name = values.pop("name", None)
  if name not in kinds:
    raise ConfigError(f"{field}.name: found {name!r}, expected one of {', '.join(kinds)}")
  return kinds[name](**_build_fields(kinds[name], f"{field}: {name}", values))


def _build_fields(cls: type, where: str, plain: Mapping[str, Any]) -> dict[str, Any]:
  known = {f.name for f in dataclasses.fields(cls)}
  if unknown := sorted(set(plain) - known):
    raise ConfigError(
      f"{where} has no field {', '.join(unknown)}; it has {', '.join(sorted(known)) or 'none'}"
    )
  required = [
    f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING
  ]
  if missing := [name for name in required if name not in plain]:
    raise ConfigError(f"{where}: no {', '.join(missing)}; found: {', '.join(sorted(plain)) or 'nothing'}")
  return {name: _build(name, value) for name, value in plain.items()}
