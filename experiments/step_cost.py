"""What a step of training costs, as the loop and the compiler's report count it."""

from __future__ import annotations

from jaxllm import flops
from jaxllm.config import ModelConfig
from jaxllm.ops.losses import CHUNK
from jaxllm.train.step import TrainConfig

RECOMPUTED = {"none": "none", "full": "full", "dots": "none", "dots_no_batch": "selective"}
"""Of what `flops` counts, which is products, each of `nn.layers.REMATS` computes these again."""


def count_of(cfg: ModelConfig, config: TrainConfig, shards: int) -> flops.Count:
  """The cost of a token in a run whose batch is split in `shards` parts over devices; the head's is by the chunks of each."""
  tokens = config.batch_size // config.accumulate // shards * config.length
  return flops.count(cfg, config.length, remat=RECOMPUTED[config.remat], chunked_head=tokens > CHUNK)
