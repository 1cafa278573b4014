"""SmolLM3: layers without positions among those with RoPE."""

from __future__ import annotations

from jaxllm.config import Layer, ModelConfig
from jaxllm.hf import rope
from jaxllm.hf.families import relative
from jaxllm.hf.family import Family
from jaxllm.hf.settings import COUNT, FLAG, Kind, Settings
from jaxllm.position import NoPE

KIND = relative.Relative(kv_heads=4, context=32768, base=2e6, attention_bias=True, mlp_bias=True)
ZEROS_AND_ONES = Kind(
  "a list of 0 (no positions) and 1 (RoPE), one a layer at least",
  lambda x: isinstance(x, list) and all(type(one) is int and one in (0, 1) for one in x),
)


def read(s: Settings) -> ModelConfig:
  """no_rope_layers has a 1 for a layer with RoPE; windows, if used at all, are by default those of the others."""
  use, size = s.take("use_sliding_window", FLAG, False), s.take("sliding_window", COUNT, None)
  every = s.take("no_rope_layer_interval", COUNT, 4)
  given = s.take("no_rope_layers", ZEROS_AND_ONES, None)

  def layers(num_layers: int, head: rope.Head) -> list[Layer]:
    turned = [(i + 1) % every != 0 for i in range(num_layers)] if given is None else given
    if len(turned) < num_layers:
      raise s.error("no_rope_layers", f"{ZEROS_AND_ONES.expected}: {num_layers}")
    windows = relative.layer_windows(
      s, num_layers, size, lambda i: use and size is not None and not turned[i]
    )
    if any(windows) and not use:
      raise s.error("use_sliding_window", "true, as layer_types has layers of sliding_attention")
    method = rope.read(s, head)
    return [Layer(method if turned[i] else NoPE(), windows[i]) for i in range(num_layers)]

  return relative.read(s, KIND, layers)


def write(cfg: ModelConfig) -> dict:
  """The inverse of `read`."""
  layers = relative.all_layers(cfg)
  turned = [int(not isinstance(layer.position, NoPE)) for layer in layers]
  plain = relative.write(cfg, KIND) | relative.window_settings(cfg) | {"no_rope_layers": turned}
  return plain | {"use_sliding_window": plain["sliding_window"] is not None}


ROW = dict(tied=True, eos=128001, ignored=("max_window_layers",))  # which no window follows
SMOLLM3 = Family("smollm3", "SmolLM3ForCausalLM", read, write, relative.keys, **ROW)
