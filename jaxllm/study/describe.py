"""What is in force in a model, in words: positions, windows, caps, precision and attention cores."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from jaxllm.config import ModelConfig


def model_lines(cfg: ModelConfig, length: int | None = None) -> list[str]:
  """A line for each thing that not every decoder has; with `length`, the attention cores of a pass over so many tokens."""
  heads = f"{cfg.num_heads} heads" + (
    f" ({cfg.num_kv_heads} of keys and values)" if cfg.num_kv_heads != cfg.num_heads else ""
  )
  narrow = getattr(cfg, "embed_width", None)
  width = f"width {cfg.embed_dim}" + (f" (embeddings of {narrow})" if narrow is not None else "")
  lines = [
    f"model: {cfg.num_layers} layers, {width}, {heads} of {cfg.head_dim}, hidden width {cfg.mlp_dim}, vocabulary "
    f"{cfg.vocab_size}, head {'tied to the embedding' if cfg.tie_embeddings else 'of its own'}"
    f"{', each token normalised' if cfg.norm_head else ''}"
  ]
  lines += expert_lines(cfg)
  lines += [f"positions: {line}" for line in position_lines(cfg)]
  if any(rope.two_dimensional for rope in cfg.ropes):
    lines.append(
      "block positions: 0 throughout a text, which is read causally; those of a GLM prompt, and its prefix, are nn.Context's"
    )
  if cfg.query_scale is not None:
    lines.append(f"queries by position: {fields(cfg.query_scale)}")
  numbers = {
    "attention scale": (getattr(cfg, "attention_scale", None), None),
    "attention soft cap": (cfg.attention_softcap, None),
    "logit scale": (getattr(cfg, "logit_scale", 1.0), 1.0),
    "logit soft cap": (cfg.logit_softcap, None),
    "embedding scale": (cfg.embed_scale, 1.0),
    "q, k and v clipped to": (cfg.clip_qkv, None),
  }
  scales = [f"{name} {value:.9g}" for name, (value, usual) in numbers.items() if value != usual]
  if scales:
    lines.append(f"scales and caps: {', '.join(scales)}")
  angles = getattr(cfg, "rope_precision", "exact")
  lines.append(f"precision: {cfg.dtype} compute; {products(cfg.dtype)}angles {angles}")
  if served := getattr(cfg, "context_length", None):
    lines.append(f"context: {served} tokens, by its settings")
  if length is not None:
    from jaxllm.nn.cores import core_report

    lines.append(f"attention of {length} tokens: {core_report(cfg, length, seq_len=length)}")
  return lines


def products(dtype: str) -> str:
  """What the products of a model of this type are computed in, where that is less than the type: "products in ...; ", or ""."""
  import jax

  asked, fast = (
    jax.config.jax_default_matmul_precision,
    {"gpu": "TF32, where the GPU has it", "tpu": "bfloat16"},
  )
  backend = jax.default_backend()
  if dtype != "float32" or backend not in fast or asked in ("highest", "float32"):
    return ""
  if asked not in (None, "default"):
    return f"products in {asked} (jax_default_matmul_precision); "
  return f"products in {fast[backend]} (JAX_DEFAULT_MATMUL_PRECISION=highest for float32); "


def expert_lines(cfg: ModelConfig) -> list[str]:
  """The layers with experts: how many there are, how wide, and how many of them a token takes."""
  from jaxllm.experts import Moe

  lines = []
  for mlp in cfg.mlps:
    if isinstance(mlp, Moe):
      found = [i for i in range(cfg.num_layers) if cfg.mlp_of(cfg.layer(i)) == mlp]
      which = "all layers" if len(found) == cfg.num_layers else f"layers {runs(found)}"
      lines.append(
        f"experts: {which}: {mlp.num_experts} of hidden width {mlp.mlp_dim or cfg.mlp_dim}, {mlp.top_k} a token, "
        f"{fields(mlp.expert)}, weighted by {fields(mlp.router)}"
      )
  return lines


def position_lines(cfg: ModelConfig) -> list[str]:
  """The layers of each kind, with their position method, its fields and the keys they see."""
  places: dict[Any, list[int]] = {}
  for i in range(cfg.num_layers):
    places.setdefault((cfg.layer(i).position, cfg.layer(i).window), []).append(i)
  lines = []
  for (position, window), found in places.items():
    which = "all layers" if len(places) == 1 else f"layers {runs(found)}"
    keys = "all keys" if window is None else f"the {window} nearest keys"
    lines.append(f"{which}: {fields(position)}, {keys}")
  return lines


def replaced_line(cfg: ModelConfig, train_length: int) -> str | None:
  """What a method that changes RoPE takes the place of, where that is a scaling: by name and factor."""
  from jaxllm.position import POSITIONS, Rope

  names = {cls: name for name, cls in POSITIONS.items()} | {POSITIONS["pi"]: "linear"}
  own = [
    f"{names[type(layer.position)]} x{layer.position.factor:g}"
    if hasattr(layer.position, "factor")
    else names[type(layer.position)]
    for layer in cfg.layers
    if layer.window is None
    and isinstance(layer.position, Rope)
    and type(layer.position) is not POSITIONS["rope"]
  ]
  if not own:
    return None
  found = " and ".join(dict.fromkeys(own))
  return (
    f"methods: those that change RoPE replace the model's own {found}, and count from {train_length} tokens"
  )


def fields(value: Any) -> str:
  """A method by its name and its fields, those that are None left out: "yarn (base 10000.0, layout half, factor 8.0)"."""
  from jaxllm.position import POSITIONS

  name = next((name for name, cls in POSITIONS.items() if cls is type(value)), type(value).__name__)
  given = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
  shown = ", ".join(f"{field} {_short(item)}" for field, item in given.items() if item is not None)
  return f"{name} ({shown})" if shown else name


def runs(numbers: list[int]) -> str:
  """Ascending numbers with stretches as ranges: 0-4, 6-10."""
  found: list[list[int]] = []
  for number in numbers:
    if found and number == found[-1][-1] + 1:
      found[-1].append(number)
    else:
      found.append([number])
  return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in found)


def _short(item: Any) -> str:
  """Lists of factors are as long as a head: their ends tell them apart."""
  if isinstance(item, tuple) and len(item) > 4:
    return f"{item[0]:g} to {item[-1]:g} ({len(item)} numbers)"
  return str(item)
