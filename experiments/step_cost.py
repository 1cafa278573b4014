"""What a step of training costs, as the loop and the compiler's report count it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm import flops
from jaxllm.config import ModelConfig
from jaxllm.leaf import QTensor
from jaxllm.nn import Transformer
from jaxllm.ops.attention import Plain
from jaxllm.ops.losses import CHUNK
from jaxllm.train import lora
from jaxllm.train.step import TrainConfig, make_gradient

RECOMPUTED = {"none": "none", "full": "full", "dots": "none", "dots_no_batch": "selective"}
"""Of what `flops` counts, which is products, each of `nn.layers.REMATS` computes these again."""


def count_of(cfg: ModelConfig, config: TrainConfig, shards: int, params: Any = None) -> flops.Count:
  """The cost of a token in a run whose batch is split in `shards` parts over devices; the head's is by the chunks of each.

  params: jax.ShapeDtypeStructs of what the run begins with.  Where a part of them is trained, the products of a step are those
  of the program, by the plain attention core: gradients of what is frozen, and of what nothing that is trained comes before,
  are not in it.  Raises DataError where that program has a loop of unknown length, as experts are on CPUs and GPUs.
  """
  tokens = config.batch_size // config.accumulate // shards * config.length
  cost = flops.count(cfg, config.length, remat=RECOMPUTED[config.remat], chunked_head=tokens > CHUNK)
  if params is None or (config.trained is None and not lora.has(params)):
    return cost
  one = dataclasses.replace(config, batch_size=1, accumulate=1, remat="none")
  model = Transformer(dataclasses.replace(cfg, attention=Plain()), scan="blocks" in params)
  held = lambda x: isinstance(x, QTensor)
  params = jax.tree.map(  # multiplied in pieces and loops
    lambda x: jax.ShapeDtypeStruct(x.shape, cfg.dtype) if held(x) else x, params, is_leaf=held
  )
  row = jax.ShapeDtypeStruct((1, config.length + 1), jnp.int32)
  products = flops.dots(jax.jit(make_gradient(model, one)).lower(params, row).as_text("hlo"))
  again = cost.forward["head"] if config.length > CHUNK else 0
  return dataclasses.replace(cost, step=products - again)
