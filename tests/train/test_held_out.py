"""train.evaluation: the mean over the labels of rows, whatever the size of a batch and the number of rows."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxllm.config import ModelConfig
from jaxllm.nn import Transformer
from jaxllm.train import evaluation
from jaxllm.train.batches import lay_out, take
from jaxllm.train.evaluation import make_evaluate
from jaxllm.train.objectives import OBJECTIVES
from jaxllm.train.precision import POLICIES
from jaxllm.train.step import TrainConfig
from jaxllm.train.tokens import Text

CFG = ModelConfig(
  vocab_size=16, embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=16
)


@pytest.mark.parametrize(("rows", "size", "accumulate"), [(1, 4, 1), (5, 4, 1), (8, 4, 2), (99, 4, 1)])
def test_each_label_counts_once(rows, size, accumulate):
  """Packed documents, whose rows have other numbers of labels; beside log softmax, a row at a time, in NumPy."""
  rng = np.random.default_rng(3)
  ids = rng.integers(1, 16, 150).astype(np.uint8)
  ids[rng.integers(0, 150, 25)] = 0
  data = lay_out(Text(ids, 16, separator=0), OBJECTIVES["causal"](), 12, size)
  assert len(data.rows) % size
  model = Transformer(CFG)
  params = model.init(jax.random.key(0), np.zeros((1, 12), np.int32))["params"]
  params["head"] = 20 * params["head"]  # rows differ
  losses, counts = [], []
  for row in range(min(rows, len(data.rows))):
    one = take(data, [row], 0)
    logits = np.asarray(model.apply({"params": params}, one.tokens, one.context)[0], np.float64)[0]
    nll = np.log(np.exp(logits).sum(-1)) - logits[np.arange(12), one.labels[0]]
    losses.append(np.sum(nll * one.weights[0]))
    counts.append(one.weights.sum())
  assert len(set(counts)) > 1 or rows == 1
  found = make_evaluate(model, TrainConfig(1, size, 12, accumulate=accumulate), data, rows)(params)
  assert found["labels"] == sum(counts)
  assert found["loss"] == pytest.approx(sum(losses) / sum(counts), rel=1e-5)


def test_it_is_computed_in_the_types_and_the_parts_of_training(monkeypatch):
  """A model of bfloat16 gives the very loss that its policy has; two of four rows at a time, as gradients are."""
  data = lay_out(Text(np.arange(160) % 13, 16), OBJECTIVES["causal"](), 12, 4)
  params = Transformer(CFG).init(jax.random.key(0), np.zeros((1, 12), np.int32))["params"]
  found = lambda model, policy: make_evaluate(
    model, TrainConfig(1, 4, 12, accumulate=2, precision=POLICIES[policy]), data, 8
  )(params)["loss"]
  wide, narrow = found(Transformer(CFG), "model"), found(Transformer(CFG), "bf16")
  assert narrow == found(Transformer(dataclasses.replace(CFG, dtype="bfloat16")), "model")
  assert 1e-6 < abs(narrow / wide - 1) < 1e-2
  shapes = []
  whole = evaluation.take
  monkeypatch.setattr(
    evaluation, "take", lambda data, rows, seed: shapes.append(len(rows)) or whole(data, rows, seed)
  )
  found(Transformer(CFG), "model")
  assert shapes == [2] * 4
