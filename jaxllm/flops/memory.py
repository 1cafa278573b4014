"""Bytes that training holds on a device, and those of a cache of keys and values."""

from __future__ import annotations

import dataclasses
import math

import jax

from jaxllm.config import Layer, ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.experts import Moe
from jaxllm.flops.work import REMAT, check
from jaxllm.nn.cache import init_cache
from jaxllm.nn.store import STORES

STAGES = (0, 1, 2, 3)
"""Of ZeRO: what is divided over the devices, nothing, the optimizer's state, gradients too, parameters too."""


@dataclasses.dataclass(frozen=True)
class Held:
  """Bytes a parameter: of the parameters that are computed with, of gradients, and of what the optimizer has."""

  parameters: int
  gradients: int
  optimizer: int


PRECISIONS = {"mixed": Held(2, 2, 12), "megatron": Held(2, 4, 12), "float32": Held(4, 4, 8)}
"""Adam: in 16 bits with float32 master weights and moments (ZeRO's K = 12), with float32 gradients too, and all float32.

Source: Rajbhandari et al. (2019), section 3.1; Narayanan et al. (2021); Kingma and Ba (2014).
"""


def states(parameters: int, devices: int = 1, stage: int = 0, precision: str = "mixed") -> dict[str, float]:
  """Bytes a device of parameters, gradients and optimizer, of which a stage of ZeRO divides some over the devices.

  With 2, 2 and 12 bytes and P parameters on n devices: 16 P; 4 P + 12 P / n; 2 P + 14 P / n; 16 P / n.
  Raises ConfigError for another stage or precision.  Source: Rajbhandari et al. (2019), figure 1 and section 5.
  """
  if stage not in STAGES:
    raise ConfigError(f"stage: found {stage!r}, expected one of {', '.join(map(str, STAGES))}")
  check("precision", precision, tuple(PRECISIONS))
  held = dataclasses.asdict(PRECISIONS[precision])
  first = {"optimizer": 1, "gradients": 2, "parameters": 3}
  return {name: parameters * size / (devices if stage >= first[name] else 1) for name, size in held.items()}


def layer_activations(
  cfg: ModelConfig, layer: Layer, length: int, *, width: int = 2, remat: str = "none", dropout: bool = False
) -> int:
  """Bytes that one layer keeps of one sequence of T tokens for its backward pass, numbers being `width` bytes.

  A token: D for the input of each norm and D for what attention and mlp read (one where they read the same); queries, keys and
  values, (N + 2 K) H, and those of query-key norms; N T probabilities; N H for the output projection; the inputs and the hidden
  layer of mlp, F each; of k experts their inputs, hidden layers and outputs, and float32 logits of the router.  dropout: N T
  more and masks of a byte.  In 16 bits, with K = N, F = 4 D and dropout: 34 D + 5 N T a token.  selective: without N T;
  full: the layer's input alone.

  It is the count of the literature.  A program may hold more: this one's statistics and scores are float32, and on a CPU in
  float32 the compiler's own count is up to 1.4 times this one, with 16-bit numbers, which a CPU widens, two to three times.
  Source: Korthikanti et al. (2022), section 4.1, equations 1 to 6.
  """
  check("remat", remat, REMAT)
  D, NH, KH = cfg.embed_dim, cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
  if remat == "full":
    return length * D * width
  norms, mlp = len(cfg.wiring.norms), cfg.mlp_of(layer)
  numbers = D * (norms + min(norms, 2)) + 2 * NH + 2 * KH + (NH + KH if cfg.qk_norm is not None else 0)
  masks = 0
  if isinstance(mlp, Moe):
    hidden = (mlp.mlp_dim or cfg.mlp_dim) * (len(mlp.expert.inputs) + 1)
    numbers += mlp.top_k * (2 * D + hidden)
    masks += 4 * mlp.num_experts
  else:
    numbers += cfg.mlp_dim * (len(mlp.inputs) + 1)
  if dropout:
    masks += 2 * D
  if remat == "none":
    numbers += cfg.num_heads * length * (1 + dropout)
    masks += cfg.num_heads * length * dropout
  return length * (numbers * width + masks)


def activations(
  cfg: ModelConfig,
  length: int,
  batch: int = 1,
  *,
  width: int = 2,
  remat: str = "none",
  dropout: bool = False,
  chunk: int = 8192,
) -> int:
  """Bytes a device keeps of `batch` sequences for the backward pass, and holds at once on the way.

  All layers, the last norm's and the head's input, float32 logits of `chunk` tokens and their gradient, and, where layers are
  computed again, one of them as it is without that.
  """
  layer = lambda one, policy: layer_activations(cfg, one, length, width=width, remat=policy, dropout=dropout)
  kept = cfg.num_layers // len(cfg.layers) * sum(layer(one, remat) for one in cfg.layers)
  again = max(layer(one, "none") - layer(one, remat) for one in cfg.layers)
  ends = width * length * (cfg.embed_dim + cfg.token_width)
  return batch * (kept + again + ends) + 2 * 4 * cfg.vocab_size * min(batch * length, chunk)


def cache(cfg: ModelConfig, length: int, batch: int = 1, store: str = "full", call: int | None = 512) -> int:
  """Bytes of the keys and values of `batch` rows of `length` tokens: 2 K H a token and layer, in cfg.dtype.

  call: the most tokens that are read at once; layers with a window hold no more than it and so many.  Raises ConfigError for a
  store that is none of `nn.STORES`.
  """
  check("store", store, tuple(STORES))
  made = jax.eval_shape(lambda: init_cache(cfg, batch, length, call=call, store=STORES[store]))
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves((made.k, made.v)))
