"""GPT-OSS: experts with a clamped GLU and biases, a sink a head, windows on every other layer."""

from __future__ import annotations

import dataclasses

from jaxllm.activation import ClampedGlu, Glu
from jaxllm.config import Layer, ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.hf import rope
from jaxllm.hf.families import mixture, relative
from jaxllm.hf.family import Family, Interleaved, Key, Whole
from jaxllm.hf.settings import COUNT, POSITIVE, Settings
from jaxllm.norm import RMSNorm

KIND = relative.Relative(
  kv_heads=8,
  head_dim=64,
  context=131072,
  base=150000.0,
  eps=1e-5,
  attention_bias=True,
  attention_biased=True,
  norm=RMSNorm(),
)
YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
YARN[rope.LENGTH] = 4096
"""rope_parameters where config.json has none."""
COUNTS = ("num_local_experts", "num_experts")
BIASES = ("router", *relative.MLP)


def read(s: Settings) -> ModelConfig:
  """A window on the even layers where layer_types says nothing; hidden_act and the authors' own names are not read."""
  s.settle("hidden_act", "silu", why="transformers does not read it in this family")
  s.settle("experts_per_token", s.plain.get(mixture.TOP_K, 4), why=f"as {mixture.TOP_K}")
  size = s.take("sliding_window", COUNT, 128, null=None)
  group = rope.group_of(s) or Settings(YARN, s.source, "rope_parameters")

  def layers(num_layers: int, head: rope.Head) -> list[Layer]:
    method = rope.read_group(s, group, head)
    windows = relative.layer_windows(s, num_layers, size, lambda i: size is not None and i % 2 == 0)
    return [Layer(method, window) for window in windows]

  cfg = relative.read(s, KIND, layers, attention_sinks=True)
  glu = ClampedGlu(
    float(s.take("swiglu_alpha", POSITIVE, 1.702)), float(s.take("swiglu_limit", POSITIVE, 7.0))
  )
  cfg = mixture.read(s, dataclasses.replace(cfg, mlp=glu), COUNTS, experts=128, top_k=4)
  return dataclasses.replace(cfg, biases=(*cfg.biases, *BIASES))


def write(cfg: ModelConfig) -> dict:
  """The inverse of `read`."""
  moe = mixture.of(cfg)
  glu = moe.expert
  if not isinstance(glu, ClampedGlu):
    raise ConfigError(f"mlp.expert: found {glu}, expected a ClampedGlu, which this family has")
  plain = dataclasses.replace(cfg, mlp=dataclasses.replace(moe, expert=Glu()))  # of which is no setting
  out = mixture.write(plain, KIND, COUNTS[0]) | relative.window_settings(cfg)
  del out["hidden_act"]
  return out | {"swiglu_alpha": glu.alpha, "swiglu_limit": glu.limit}


def keys(cfg: ModelConfig) -> list[Key]:
  """The experts of a layer in one tensor each, [E, in, out], gate and up in turn."""
  at, ours = "model.layers.{i}.", "layers/{i}/"
  out = [*mixture.rest(cfg), Key(f"{at}self_attn.sinks", (f"{ours}attn/sinks",))]
  out.append(Key(f"{at}mlp.router.weight", (f"{ours}mlp/router/w",), "oi"))
  out.append(Key(f"{at}mlp.router.bias", (f"{ours}mlp/router/bias",)))
  parts = {"gate_up_proj": (("gate", "up"), Interleaved()), "down_proj": (("down",), Whole())}
  for name, (mine, layout) in parts.items():
    paths = lambda kind, mine=mine: tuple(f"{ours}mlp/experts/{one}/{kind}" for one in mine)
    out.append(Key(f"{at}mlp.experts.{name}", paths("w"), "io", layout))
    out.append(Key(f"{at}mlp.experts.{name}_bias", paths("bias"), None, layout))
  return out


ROW = dict(unused=relative.ROTARY, ignored=("initial_context_length", *mixture.TRAINING))
GPT_OSS = Family("gpt_oss", "GptOssForCausalLM", read, write, keys, **ROW)
