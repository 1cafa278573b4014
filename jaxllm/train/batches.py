"""Batches of a run: rows of text in an order, and with draws, that are functions of (seed, step)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import check_positive
from jaxllm.nn import Context
from jaxllm.train.objectives import Objective
from jaxllm.train.order import permuted, stream
from jaxllm.train.packing import Packed, Windows, documents, plan
from jaxllm.train.tokens import Text


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """What one step learns from, on the host; its structure and shapes are the same at every step.

  tokens_BT, labels_BT: int32.  weights_BT: float32, 0 on padding, at the ends of documents and on what is only read; the loss
  is sum(weights nll) / sum(weights).  A label of weight 0 may be any number, such as the -100 of others.
  context: positions, segments (0 is padding) and prefixes of the rows.
  """

  tokens: np.ndarray
  labels: np.ndarray
  weights: np.ndarray
  context: Context

  def weighed(self, nll_BT: jax.Array) -> jax.Array:
    """weights nll; 0 where a weight is, as 0 times what a label outside the vocabulary costs would be NaN."""
    return jnp.where(self.weights == 0, 0, self.weights * nll_BT)


@dataclasses.dataclass(frozen=True)
class Data:
  """Text laid out for an objective: `rows` of `length` slots, `size` of them a batch."""

  text: Text
  objective: Objective
  rows: Windows | Packed
  length: int
  size: int

  def __post_init__(self):
    check_positive(self, length=self.length, size=self.size)

  @property
  def vocab_size(self) -> int:
    """Ids that the model has to have."""
    return max(self.text.vocab_size, self.objective.vocab_size)


def lay_out(
  text: Text, objective: Objective, length: int, size: int, ranges: np.ndarray | None = None
) -> Data:
  """`text`, or those of its `packing.documents` that are in `ranges`, in rows of `length` slots, as `packing.plan` says."""
  ranges = documents(text) if ranges is None else ranges
  return Data(text, objective, plan(text, ranges, objective, length), length, size)


def batch(data: Data, seed: int, step: int, part: slice = slice(None)) -> Batch:
  """Batch `step` of a run, [size, length], or the rows of it that `part` says, for one of several processes.

  Example i of a run, i = step size + its place in the batch, is row i mod rows of epoch i div rows, each epoch in an order of
  its own: all rows once before any comes again.  A pure function of its arguments: nothing depends on devices or accumulation,
  which share out a batch, and no step on the one before it.
  """
  return take(data, rows_of(data, seed, step, part), seed, step)


def rows_of(data: Data, seed: int, step: int, part: slice = slice(None)) -> np.ndarray:
  """The rows of the text that make batch `step`, int64."""
  example = step * data.size + np.arange(data.size, dtype=np.int64)[part]
  epoch, place = np.divmod(example, len(data.rows))
  return permuted(place, len(data.rows), seed, epoch)


def take(data: Data, rows: Sequence[int] | np.ndarray, seed: int, step: int = 0) -> Batch:
  """The batch of some rows, with draws that are a function of (seed, step, row, piece); for evaluation, at one step."""
  objective, B, T = data.objective, len(rows), data.length
  tokens, labels, segment, prefix = (np.zeros((B, T), np.int32) for _ in range(4))
  weights = np.zeros((B, T), np.float32)
  pos = np.zeros((B, T, objective.axes), np.int32)
  for b, row in enumerate(rows):
    at = 0
    for number, (start, size) in enumerate(data.rows.pieces(int(row))):
      one = objective.example(data.text.read(start, size), stream(seed, step, int(row), number))
      here = slice(at, at + len(one.tokens))
      tokens[b, here], labels[b, here], weights[b, here] = one.tokens, one.labels, one.weights
      pos[b, here] = one.pos.reshape(-1, objective.axes)
      segment[b, here], prefix[b, here] = number + 1, at + one.prefix
      at = here.stop
    assert at <= T, (data.rows.pieces(int(row)), at)
  packed = isinstance(data.rows, Packed)
  context = Context(
    pos=(pos if objective.axes == 2 else pos[..., 0]) if packed or not objective.plain else None,
    segment=segment if packed else None,
    prefix=prefix if objective.prefixed else None,
  )
  return Batch(tokens, labels, weights, context)


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
  """The batches of a run over laid out text: `batch` of each step, for `loop.fit`."""

  data: Data
  seed: int

  def batch(self, step: int) -> Batch:
    """All rows of it."""
    return batch(self.data, self.seed, step)

  @property
  def identity(self) -> dict:
    """What tells the text and its layout from others."""
    data = self.data
    how = {"type": type(data.objective).__name__, **dataclasses.asdict(data.objective)}
    text = {"sha256": data.text.sha256, "tokens": len(data.text), "separator": data.text.separator}
    return {"text": text, "objective": how, "rows": len(data.rows)}

  def describe(self, step: int) -> str:
    """Which rows of the text a batch has."""
    rows = ", ".join(map(str, rows_of(self.data, self.seed, step)[:16].tolist()))
    more = ", ..." if self.data.size > 16 else ""
    return f"batch {step}, rows {rows}{more} of {self.data.text.source}"
