"""Qwen 2 and 2.5: biases of queries, keys and values; Qwen 3: queries and keys normalised; windows from a layer on."""

from __future__ import annotations

import functools

from jaxllm.config import Layer, ModelConfig
from jaxllm.hf import rope
from jaxllm.hf.families import relative
from jaxllm.hf.family import Family
from jaxllm.hf.settings import COUNT, FLAG, Settings

QWEN2_KIND = relative.Relative(kv_heads=32, context=32768, biases=("q", "k", "v"))
QWEN3_KIND = relative.Relative(kv_heads=32, head_dim=128, context=32768, attention_bias=True, qk_over="head")


def read(s: Settings, kind: relative.Relative) -> ModelConfig:
  """A window only if use_sliding_window, on the layers that layer_types says, or else on those from max_window_layers on."""
  size = s.take("sliding_window", COUNT, 4096, null=None)
  if not s.take("use_sliding_window", FLAG, False):
    size = None
  first = s.take("max_window_layers", relative.INDEX, 28)

  def layers(num_layers, head):
    method = rope.read(s, head)
    windows = relative.layer_windows(s, num_layers, size, lambda i: size is not None and i >= first)
    return [Layer(method, window) for window in windows]

  return relative.read(s, kind, layers)


def write(cfg: ModelConfig, kind: relative.Relative) -> dict:
  """The inverse of `read`."""
  windows = [layer.window is not None for layer in relative.all_layers(cfg)]
  first = windows.index(True) if any(windows) else cfg.num_layers
  plain = relative.write(cfg, kind) | relative.window_settings(cfg)
  return plain | {"use_sliding_window": any(windows), "max_window_layers": first}


def _family(model_type: str, architecture: str, kind: relative.Relative) -> Family:
  reader, writer = (functools.partial(function, kind=kind) for function in (read, write))
  return Family(model_type, architecture, reader, writer, relative.keys, unused=relative.ROTARY)


QWEN2 = _family("qwen2", "Qwen2ForCausalLM", QWEN2_KIND)
QWEN3 = _family("qwen3", "Qwen3ForCausalLM", QWEN3_KIND)
