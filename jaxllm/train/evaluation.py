"""The loss on rows that are not trained on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxllm import parallel
from jaxllm.nn.transformer import Transformer, head
from jaxllm.ops.losses import cross_entropy
from jaxllm.train.batches import Data, take
from jaxllm.train.step import TrainConfig


def make_evaluate(
  model: Transformer, config: TrainConfig, data: Data, rows: int, mesh: Mesh | None = None
) -> Callable[[Any], dict[str, float]]:
  """evaluate(params) -> {"loss": nats a label, "labels": how many}, of the first `rows` rows of the data, in the run's types.

  The draws of an objective are those of one seed, so that values of several steps, and of several runs, are of equal examples.
  Rows are computed as many at a time as in training (a part of a batch, config.accumulate), the last ones with rows without
  weight.
  """
  policy = config.precision
  model = policy.model(model)
  count, size = min(rows, len(data.rows)), data.size // config.accumulate

  @jax.jit
  def sums(params, batch):
    hidden_BTD, _ = model.apply({"params": params}, batch.tokens, batch.context, logits=None)
    nll_BT, _ = cross_entropy(hidden_BTD, policy.logits(head(model.cfg, params)), batch.labels)
    return jnp.sum(batch.weighed(nll_BT)), jnp.sum(batch.weights)

  def evaluate(params: Any) -> dict[str, float]:
    totals = np.zeros(2)
    for start in range(0, count, size):
      numbers = np.arange(start, start + size)
      batch = take(data, np.minimum(numbers, count - 1), 0)
      batch.weights[numbers >= count] = 0
      if mesh is not None:
        batch = parallel.shard_batch(batch, mesh)
      totals += [float(x) for x in sums(params, batch)]
    return {"loss": totals[0] / max(totals[1], 1), "labels": totals[1]}

  return evaluate
