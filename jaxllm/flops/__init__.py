"""What a model costs: parameters, floating-point operations, memory, and the share of a device that a run makes use of.

cost = flops.count(cfg, 4096, remat="full")
cost.mfu(tokens_per_second=3500, peak=flops.DEVICES["h100"].flops)
"""

from __future__ import annotations

import dataclasses
import math

from jaxllm.config import ModelConfig
from jaxllm.experts import Moe
from jaxllm.flops.devices import DEVICES, Device, known_as
from jaxllm.flops.memory import PRECISIONS, STAGES, activations, cache, layer_activations, states
from jaxllm.flops.program import dots
from jaxllm.flops.work import ATTENTION, REMAT, forward, pairs, recomputed
from jaxllm.nn.shapes import expected_shapes

__all__ = [
  "ATTENTION",
  "DEVICES",
  "PRECISIONS",
  "REMAT",
  "STAGES",
  "Count",
  "Device",
  "activations",
  "cache",
  "count",
  "dots",
  "estimated_seconds",
  "forward",
  "known_as",
  "layer_activations",
  "pairs",
  "recomputed",
  "states",
  "training_seconds",
]


@dataclasses.dataclass(frozen=True)
class Count:
  """Parameters of a model and the FLOPs of its products in training on sequences of `length` tokens.

  forward: of one sequence, by part (`work.forward`).  recomputed: of one sequence (`work.recomputed`).  active: the parameters
  that a token meets, of experts its own.  A backward pass is two forward ones: each product has two for its gradients.  step:
  of a forward and a backward pass over one sequence, where not all parameters are trained; None: three times `forward`.
  """

  length: int
  parameters: int
  active: int
  forward: dict[str, int]
  recomputed: int
  step: int | None = None

  @property
  def model(self) -> float:
    """FLOPs a token of a forward and a backward pass, without what is computed again."""
    return (3 * sum(self.forward.values()) if self.step is None else self.step) / self.length

  @property
  def hardware(self) -> float:
    """FLOPs a token that the device does: those of the model and those that are computed again."""
    return self.model + self.recomputed / self.length

  def mfu(self, tokens_per_second: float, peak: float) -> float:
    """Model FLOPs utilisation: model x tokens/s of one device over its peak.  Source: Chowdhery et al. (2022), section 4.1."""
    return self.model * tokens_per_second / peak

  def hfu(self, tokens_per_second: float, peak: float) -> float:
    """Hardware FLOPs utilisation: hardware x tokens/s of one device over its peak; never below `mfu`.  Source: same."""
    return self.hardware * tokens_per_second / peak

  def tokens_per_second(self, mfu: float, peak: float) -> float:
    """The inverse of `mfu`."""
    return mfu * peak / self.model


def count(
  cfg: ModelConfig,
  length: int,
  *,
  attention: str = "full",
  remat: str = "none",
  chunked_head: bool = False,
) -> Count:
  """What training `Transformer(cfg)` on sequences of `length` tokens costs.

  attention, remat, chunked_head: as in `work.forward` and `work.recomputed`.  Parameters are those that the program has
  (`nn.shapes`).  Raises ConfigError for a length that is no whole number of at least 1, and for an unknown convention.
  """
  parts = forward(cfg, length, attention)
  sizes = {path: math.prod(shape) for path, shape in expected_shapes(cfg).items()}
  idle = 0
  for path, size in sizes.items():
    if "/experts/" in path:
      moe = cfg.mlp_of(cfg.layer(int(path.split("/")[1])))
      assert isinstance(moe, Moe), path
      idle += size - size // moe.num_experts * moe.top_k
  total = sum(sizes.values())
  return Count(length, total, total - idle, parts, recomputed(parts, remat, chunked_head))


def training_seconds(tokens: float, devices: int, tokens_per_second: float) -> float:
  """Seconds for so many tokens at a rate a device."""
  return tokens / (devices * tokens_per_second)


def estimated_seconds(
  parameters: float, tokens: float, devices: int, achieved: float, remat: str = "none"
) -> float:
  """6 P tokens / (n X), 8 P with every layer computed again, on n devices of X achieved FLOP/s each.

  The rule of thumb: it leaves out attention's scores and counts embeddings as if they were multiplied.
  Source: Narayanan et al. (2021), section 5.1 (8 T P / (n X)); Kaplan et al. (2020), section 2.1 (6).
  """
  return (8 if remat == "full" else 6) * parameters * tokens / (devices * achieved)
