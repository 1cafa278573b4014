"""EXAONE 4: norms of what is added only, and of each query and key; with windows, RoPE on the layers that have one."""

from __future__ import annotations

from jaxllm.config import Layer, ModelConfig
from jaxllm.hf import rope
from jaxllm.hf.families import olmo, relative
from jaxllm.hf.family import Family
from jaxllm.hf.settings import COUNT, Settings
from jaxllm.wiring import PostOnly

KIND = relative.Relative(kv_heads=32, eps=1e-5, qk_over="head")
PATTERN = "sliding_window_pattern"


def read(s: Settings) -> ModelConfig:
  """sliding_window: None has RoPE on all layers; else those without a window have no positions."""
  size = s.take("sliding_window", COUNT, 4096, null=None)
  if size is None or s.has("layer_types"):  # which decides; the pattern may then be letters ("LLLG"), or 0
    s.ignore(PATTERN)
  every = None if size is None or s.has("layer_types") else s.take(PATTERN, COUNT, 4)

  def layers(num_layers: int, head: rope.Head) -> list[Layer]:
    windows = relative.layer_windows(s, num_layers, size, lambda i: bool(every) and (i + 1) % every != 0)
    return [Layer(rope.read(s, head))] if size is None else relative.rope_in_windows(s, head, windows)

  return relative.read(s, KIND, layers, wiring=PostOnly())


def write(cfg: ModelConfig) -> dict:
  """The inverse of `read`."""
  return relative.write(cfg, KIND) | relative.window_settings(cfg)


EXAONE4 = Family("exaone4", "Exaone4ForCausalLM", read, write, olmo.keys, eos=2)
