"""Which attention core each layer of a model takes, before anything is computed."""

from __future__ import annotations

import dataclasses

from jaxllm.config import Layer, ModelConfig
from jaxllm.nn.attention import hooks
from jaxllm.ops import call as calls
from jaxllm.ops.choose import CORES, Auto, Choice, choose
from jaxllm.ops.kernels import Kernel
from jaxllm.position import Rope


def core_choice(
  cfg: ModelConfig,
  layer: Layer,
  length: int,
  *,
  seq_len: int | None = None,
) -> Choice:
  """The core of a layer for a call on `length` tokens in order, and why: what the program does when it is traced.

  seq_len: as in cfg.rope_tables (a pinned length makes dynamic NTK plain inner products).  Raises ConfigError, naming the
  method and the reason, where cfg.attention is a kernel that cannot serve the layer.
  """
  position, rows = layer.position, 1
  if isinstance(position, Rope):
    rows = len(position.rows(cfg.rotary_dim(position), length, seq_len)[1])
  call = calls.Call(
    calls.current_device(),
    cfg.dtype,
    cfg.head_dim,
    length,
    type(position).__name__,
    hooks(cfg, position, rows),
    cfg.attention_softcap,
    sinks=cfg.attention_sinks,
  )
  if isinstance(cfg.attention, Auto):
    return choose(call)
  if isinstance(cfg.attention, Kernel):
    cfg.attention.check(call)
  return Choice(cfg.attention, "as the config says")


def core_report(cfg: ModelConfig, length: int, *, seq_len: int | None = None) -> str:
  """One clause a distinct kind of layer: its core and the reason, such as "Rope: plain (no kernel for cpu; ...)"."""
  names = {kind: name for name, kind in CORES.items()}
  lines = []
  for layer in dict.fromkeys(dataclasses.replace(layer, mlp=None) for layer in cfg.layers):
    choice = core_choice(cfg, layer, length, seq_len=seq_len)
    window = "" if layer.window is None else f", window {layer.window}"
    name = names.get(type(choice.core), type(choice.core).__name__)
    lines.append(f"{type(layer.position).__name__}{window}: {name} ({choice.why})")
  return "; ".join(lines)
