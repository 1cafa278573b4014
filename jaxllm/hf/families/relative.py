"""Llama and its relatives: what they share, so that a family is what sets it apart.

RMSNorm, a gated feed-forward layer, RoPE on the layers, and the names of Llama's tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxllm.activation import Glu, Mlp
from jaxllm.config import Layer, ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.hf import rope
from jaxllm.hf.family import Blocks, Key, linear, norm
from jaxllm.hf.settings import COUNT, DEPTH, FLAG, NUMBER, POSITIVE, Kind, Settings, list_of, one_of
from jaxllm.norm import QkNorm, RMSNorm
from jaxllm.position import NoPE, Rope

ACTIVATIONS = {
  "silu": "silu",
  "swish": "silu",
  "gelu": "gelu",
  "gelu_python": "gelu",
  "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_python_tanh": "gelu_tanh",
  "gelu_new": "gelu_tanh",
  "gelu_fast": "gelu_tanh",
  "gelu_accurate": "gelu_tanh",
  "quick_gelu": "gelu_sigmoid",
  "relu": "relu",
  "relu2": "relu2",
  "sigmoid": "sigmoid",
  "linear": "identity",
}
"""transformers' names of activations, ours; the first of equal ones is what we write."""
ACTIVATION = one_of(ACTIVATIONS)
NOT_NEGATIVE = Kind("a finite number of at least 0", lambda x: NUMBER.fits(x) and x >= 0)
INDEX = Kind("an integer from 0 to 2147483647", lambda x: type(x) is int and 0 <= x < 2**31)


def activation_name(mlp: Glu | Mlp) -> str:
  """transformers' name of a feed-forward layer's activation."""
  ours = getattr(mlp, "activation", None)
  name = next((theirs for theirs, one in ACTIVATIONS.items() if one == ours), None)
  if name is None or mlp.beta is not None:
    raise ConfigError(
      f"mlp: found {mlp}, expected an activation that transformers has: {', '.join(ACTIVATIONS)}"
    )
  return name


@dataclasses.dataclass(frozen=True)
class Relative:
  """How one of Llama's relatives is set apart.

  kv_heads, head_dim, context, base, eps, activation: num_key_value_heads (None: as many as heads), head_dim (None:
  hidden_size / num_attention_heads), max_position_embeddings, rope_theta, the eps of norms and the activation where missing.
  activations: what their names mean.  activation_key: the setting that has one; unread: one that only earlier versions read.
  mlp: the feed-forward layer of an activation.
  attention_bias, mlp_bias: whether there are such settings.  attention_biases: which ones attention_bias brings;
  attention_biased: its value where it is missing.
  biases: those that all models of the family have.  divides: transformers refuses heads that do not divide hidden_size.
  norm: its norm, but for eps, which the setting eps_key has (None: there is none, and norm has it); qk_over: what its norm of
  queries and keys covers (None: no such norm).  head: fields of rope.Head beside these.
  """

  kv_heads: int | None = None
  head_dim: int | None = None
  context: int = 2048
  base: float = 10000.0
  eps: float = 1e-6
  activation: str = "silu"
  activations: Mapping[str, str] = dataclasses.field(default_factory=lambda: ACTIVATIONS)
  activation_key: str = "hidden_act"
  unread: str | None = None
  mlp: Callable[[str], Any] = Glu
  attention_bias: bool = False
  attention_biases: str = "qkvo"
  attention_biased: bool = False
  mlp_bias: bool = False
  biases: tuple[str, ...] = ()
  divides: bool = False
  norm: Any = RMSNorm(multiply_in="input")
  eps_key: str | None = "rms_norm_eps"
  qk_over: str | None = None
  head: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def read(
  s: Settings,
  kind: Relative,
  layers: Callable[[int, rope.Head], Iterable[Layer]] | None = None,
  **fields: Any,
) -> ModelConfig:
  """The ModelConfig of a relative's settings; `layers(num_layers, head)` where they are not all RoPE without a window."""
  D, N = s.take("hidden_size", COUNT), s.take("num_attention_heads", COUNT)
  L = s.take("num_hidden_layers", DEPTH)
  K = s.take("num_key_value_heads", COUNT, kind.kv_heads or N, null=N)
  if N % K:
    raise s.error("num_key_value_heads", f"a divisor of num_attention_heads = {N}")
  H = s.take("head_dim", COUNT, kind.head_dim, null=None)
  if D % N and (H is None or kind.divides):
    raise s.error("num_attention_heads", f"a divisor of hidden_size = {D}")
  head = _head(kind, H or D // N, s.take("max_position_embeddings", COUNT, kind.context))
  scale = kind.norm
  if kind.eps_key is not None:
    scale = dataclasses.replace(scale, eps=float(s.take(kind.eps_key, POSITIVE, kind.eps)))
  mlp = kind.mlp(_activation(s, kind))
  return ModelConfig(
    vocab_size=s.take("vocab_size", COUNT),
    embed_dim=D,
    num_layers=L,
    num_heads=N,
    num_kv_heads=K,
    head_dim=head.head_dim,
    mlp_dim=s.take("intermediate_size", COUNT),
    layers=pattern(layers(L, head) if layers else [Layer(rope.read(s, head))]),
    mlp=mlp,
    biases=_biases(s, kind, (*mlp.inputs, "down")),
    context_length=head.context,
    norm=scale,
    qk_norm=None if kind.qk_over is None else QkNorm(scale, kind.qk_over),
    **fields,
  )


MLP = ("gate", "up", "down")


def _activation(s: Settings, kind: Relative) -> str:
  ours = kind.activations[s.take(kind.activation_key, one_of(kind.activations), kind.activation)]
  if kind.unread is not None:
    same = [theirs for theirs, one in (ACTIVATIONS | {"gelu": "gelu_tanh"}).items() if one == ours]
    s.settle(kind.unread, *same, why=f"as {kind.activation_key}, which is what counts")
  return ours


def _biases(s: Settings, kind: Relative, mlp: tuple[str, ...]) -> tuple[str, ...]:
  biases = list(kind.biases)
  for name, there, which, default in (
    ("attention_bias", kind.attention_bias, kind.attention_biases, kind.attention_biased),
    ("mlp_bias", kind.mlp_bias, mlp, False),
  ):
    if not there:
      s.settle(name, False, why="this family has no such biases")
    elif s.take(name, FLAG, default):
      biases += which
  return tuple(biases)


def _head(kind: Relative, head_dim: int, context: int) -> rope.Head:
  return rope.Head(head_dim, context, kind.base, **kind.head)


def write(cfg: ModelConfig, kind: Relative) -> dict[str, Any]:
  """The settings that `read` takes, those of the first RoPE among them."""
  head = head_of(cfg, kind)
  biases = set(cfg.biases) - set(kind.biases)
  return {
    "vocab_size": cfg.vocab_size,
    "hidden_size": cfg.embed_dim,
    "intermediate_size": cfg.mlp_dim,
    "num_hidden_layers": cfg.num_layers,
    "num_attention_heads": cfg.num_heads,
    "num_key_value_heads": cfg.num_kv_heads,
    "head_dim": cfg.head_dim,
    kind.activation_key: activation_name(cfg.mlp),
    "max_position_embeddings": head.context,
    **({kind.eps_key: cfg.norm.eps} if kind.eps_key else {}),
    **({"attention_bias": bool(biases & {*kind.attention_biases})} if kind.attention_bias else {}),
    **({"mlp_bias": bool(biases & {*MLP})} if kind.mlp_bias else {}),
    **rope.write(rope_of(cfg), head),
  }


def head_of(cfg: ModelConfig, kind: Relative) -> rope.Head:
  """The Head that reading back what is written will have."""
  return _head(kind, cfg.head_dim, rope.context_of(cfg.ropes, cfg.context_length))


def rope_of(cfg: ModelConfig) -> Rope:
  """The first RoPE of the layers; raises ConfigError where there is none."""
  if not cfg.ropes:
    raise ConfigError(
      f"layers: found {type(cfg.layers[0].position).__name__}, expected a RoPE, which this family has"
    )
  return cfg.ropes[0]


def attention_scale(value: float, head_dim: int) -> float | None:
  """cfg.attention_scale of a multiplier: None where it is the usual one."""
  return None if value == head_dim**-0.5 else float(value)


def pattern(layers: Iterable[Layer]) -> tuple[Layer, ...]:
  """The shortest tuple that repeats to these layers."""
  layers = tuple(layers)
  return next(
    layers[:n]
    for n in range(1, len(layers) + 1)
    if len(layers) % n == 0 and layers == layers[:n] * (len(layers) // n)
  )


def all_layers(cfg: ModelConfig) -> list[Layer]:
  """The kind of each layer."""
  return [cfg.layer(i) for i in range(cfg.num_layers)]


LAYER_TYPES = ("full_attention", "sliding_attention")


def layer_windows(
  s: Settings, num_layers: int, window: int | None, slides: Callable[[int], bool]
) -> list[int | None]:
  """The window of each layer by layer_types, or where it is missing by `slides(number)`."""
  given = s.take("layer_types", list_of(one_of(LAYER_TYPES), num_layers, "layer"), None)
  slide = [name == LAYER_TYPES[1] for name in given] if given else [slides(i) for i in range(num_layers)]
  if any(slide) and window is None:
    raise s.error("sliding_window", "the window of the layers of sliding_attention")
  return [window if one else None for one in slide]


def one_window(s: Settings, default: int | None, method: Callable[[rope.Head], Rope]):
  """`layers` of `read` for a family with sliding_window on all layers, and a layer_types that says the same or nothing."""

  def layers(num_layers: int, head: rope.Head) -> list[Layer]:
    size = s.take("sliding_window", COUNT, default, null=None)
    windows = layer_windows(s, num_layers, size, lambda i: size is not None)
    if set(windows) != {size}:
      raise s.error(
        "layer_types", "the type that sliding_window gives all layers: transformers reads nothing else here"
      )
    return [Layer(method(head), size)]

  return layers


def window_settings(cfg: ModelConfig) -> dict[str, Any]:
  """sliding_window and layer_types; of several windows the first, which the reading then finds wrong."""
  windows = [layer.window for layer in all_layers(cfg)]
  return {
    "sliding_window": next((window for window in windows if window is not None), None),
    "layer_types": [LAYER_TYPES[window is not None] for window in windows],
  }


def ropes_by_type(s: Settings, full: rope.Head, sliding: rope.Head) -> tuple[Rope, Rope]:
  """The RoPE of layers without and with a window: rope_parameters by type of layer, or rope_scaling, that of the former."""
  groups, scaling = s.group("rope_parameters"), s.group("rope_scaling")
  if groups and scaling:
    raise s.error("rope_scaling", "no such key beside rope_parameters")
  by_type = list(map(groups.group, LAYER_TYPES))
  groups.finish()
  return (
    rope.read_group(s, scaling or by_type[0], full, nested=True),
    rope.read_group(s, by_type[1], sliding, nested=True),
  )


def write_ropes_by_type(cfg: ModelConfig, head: rope.Head) -> dict[str, Any]:
  """The rope_parameters that `ropes_by_type` reads, of the types of layer that there are."""
  methods = methods_by_type(cfg)
  return {
    name: {"rope_theta": method.base} | rope.write_group(method, head)
    for name, method in zip(LAYER_TYPES, methods, strict=True)
    if method is not None
  }


def methods_by_type(cfg: ModelConfig) -> tuple[Rope | None, Rope | None]:
  """The RoPE of the first layer without a window and of the first with one; None for a type that there is not."""
  methods = {}
  for layer in cfg.layers:
    if not isinstance(layer.position, Rope):
      raise ConfigError(
        f"layers: found {type(layer.position).__name__}, expected a RoPE, which this family has"
      )
    methods.setdefault(layer.window is not None, layer.position)
  return methods.get(False), methods.get(True)


def rope_in_windows(s: Settings, head: rope.Head, windows: Iterable[int | None]) -> list[Layer]:
  """RoPE on layers with a window, and no positions on those without."""
  method = rope.read(s, head)
  return [Layer(NoPE() if window is None else method, window) for window in windows]


NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
QK_NORMS = {"q": "q_norm", "k": "k_norm"}
QKV = Blocks(lambda cfg: [n * cfg.head_dim for n in (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads)])
GATE_UP = Blocks(lambda cfg: [cfg.mlp_dim] * 2)
"""Fused projections, one after the other."""


def keys(
  cfg: ModelConfig,
  norms: Mapping[str, str] = NORMS,
  qk_norms: Mapping[str, str] = QK_NORMS,
  gate_up: str | None = None,
) -> list[Key]:
  """Llama's tensors; `norms`, `qk_norms`: ours and theirs of a block's; gate_up: the name of what gate and up are fused to."""
  at, ours = "model.layers.{i}.", "layers/{i}/"
  out = [Key("model.embed_tokens.weight", ("embed",))]
  for name in "qkvo":
    out += linear(cfg, f"{at}self_attn.{name}_proj", f"{ours}attn/{name}")
  if cfg.qk_norm is not None:
    for name, theirs in qk_norms.items():
      out += norm(cfg.qk_norm.norm, f"{at}self_attn.{theirs}", f"{ours}attn/{name}_norm")
  return out + feed_forward(cfg, at, gate_up) + ends(cfg, at, norms)


def feed_forward(cfg: ModelConfig, at: str, gate_up: str | None = None) -> list[Key]:
  """The matrices of the feed-forward layer, gate and up as two tensors or as the one named."""
  ours = "layers/{i}/mlp/"
  if gate_up is None:
    return [key for x in (*cfg.mlp.inputs, "down") for key in linear(cfg, f"{at}mlp.{x}_proj", f"{ours}{x}")]
  fused = linear(cfg, f"{at}mlp.{gate_up}", f"{ours}gate", f"{ours}up", layout=GATE_UP)
  return fused + linear(cfg, f"{at}mlp.down_proj", f"{ours}down")


def ends(cfg: ModelConfig, at: str, norms: Mapping[str, str]) -> list[Key]:
  """A block's norms, the last one, and the head where it is not the embedding."""
  out = [
    key for mine, theirs in norms.items() for key in norm(cfg.norm, f"{at}{theirs}", f"layers/{{i}}/{mine}")
  ]
  out += norm(cfg.norm, "model.norm", "final_norm")
  return out + ([] if cfg.tie_embeddings else [Key("lm_head.weight", ("head",), "oi")])


ROTARY = (r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
"""What old files hold beside the parameters."""
