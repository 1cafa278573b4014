"""Scoring a long text by overlapping windows: every token but the first is scored once, with a bounded context before it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np

from jaxllm.errors import ConfigError, DataError
from jaxllm.evaluate.text import check_ids
from jaxllm.evaluate.windows import TOKENS_AT_ONCE, score_windows
from jaxllm.nn.transformer import Transformer
from jaxllm.position.tables import PositionTables


@dataclasses.dataclass(frozen=True)
class Windows:
  """Windows of `length` inputs: window i predicts tokens ends[i] - length + 1 .. ends[i], of which the last counts[i] count.

  ends, counts: int64 [W].  Every window is full, so all have one shape and one length for methods that go by it.
  """

  length: int
  ends: np.ndarray
  counts: np.ndarray

  def __len__(self) -> int:
    return len(self.ends)

  def tokens(self, ids: np.ndarray, first: int, count: int, bos: int | None = None) -> np.ndarray:
    """Windows first .. first + count - 1, int32 [count, length + 1]: inputs, and one label more; past the last it is repeated.

    `bos` takes the place of the first input, which no window counts as a label.
    """
    ends = self.ends[np.minimum(np.arange(first, first + count), len(self) - 1)]
    found = ids[ends[:, None] + np.arange(-self.length, 1)].astype(np.int32)
    if bos is not None:
      found[:, 0] = bos
    return found


def cover(tokens: int, window: int, stride: int) -> Windows:
  """Windows over a text of n = `tokens` tokens that score tokens 1 .. n - 1 once each.

  Window i ends with token e_i = min(window + i stride, n - 1), which it predicts last: the first window scores all its
  labels, the others the last `stride` of theirs, and the last one what is left.  So token t has min(t, window - stride + 1) to
  min(t, window) tokens before it.  A text shorter than the window is one window.  Raises ConfigError for a window or stride
  below 1 and a stride above the window (tokens would be left out), DataError for fewer than 2 tokens.
  """
  for name, value in (("window", window), ("stride", stride)):
    if value < 1:
      raise ConfigError(f"{name}: found {value}, expected a whole number of at least 1")
  if stride > window:
    raise ConfigError(
      f"stride: found {stride}, expected at most window = {window}, as tokens would be left out"
    )
  if tokens < 2:
    raise DataError(
      f"text: found {tokens} tokens, expected at least 2, as the first has nothing to be predicted from"
    )
  length = min(window, tokens - 1)
  more = -(-(tokens - 1 - length) // stride)
  ends = np.minimum(length + stride * np.arange(more + 1, dtype=np.int64), tokens - 1)
  return Windows(length, ends, np.diff(ends, prepend=0))


def windows_at_once(length: int, tokens_at_once: int = TOKENS_AT_ONCE) -> int:
  """How many windows a call takes: about `tokens_at_once` tokens, and at least one window."""
  return max(1, tokens_at_once // length)


def score_text(
  model: Transformer,
  params,
  ids: np.ndarray,
  windows: Windows,
  tables: PositionTables,
  at_once: int,
  bos: int | None = None,
  first: int = 0,
  last: int | None = None,
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
  """(number of the first token, losses in nats float32, hits bool) of the tokens that each `at_once` windows score, in order.

  loss_t = -ln p(token t | the tokens before it in its window); a hit is a token that is the most likely one.  One compiled
  program serves all calls.  `tables`: those of one method, pinned at windows.length.  Windows `first` to `last` - 1 are scored.
  Raises TokenizerError for an id outside the vocabulary, of which JAX would read the last row.
  """
  check_ids(ids if bos is None else np.append(ids, bos), model.cfg.vocab_size, "score_text")
  stacked = jax.tree.map(lambda leaf: np.asarray(leaf)[None], tables)
  last = len(windows) if last is None else last
  for start in range(first, last, at_once):
    nats, hits = jax.device_get(
      score_windows(model, params, windows.tokens(ids, start, at_once, bos), stacked)
    )
    counts = windows.counts[start : min(start + at_once, last)]
    counted = np.arange(windows.length) >= windows.length - counts[:, None]
    found = [x[0, : len(counts)][counted] for x in (nats, hits)]
    yield int(windows.ends[start] - counts[0]) + 1, *found


def block_edges(tokens: int, blocks: int) -> np.ndarray:
  """Where at most `blocks` equal stretches of tokens 1 .. tokens - 1 begin, and where the last one ends, int64 [b + 1].

  Losses of neighbouring tokens go together, so errors are taken over stretches of text, whatever the windows are.
  """
  return 1 + np.linspace(0, tokens - 1, min(blocks, tokens - 1) + 1).astype(np.int64)


def block_sums(edges: np.ndarray, token: int, values: np.ndarray) -> dict[int, float]:
  """{stretch: sum of the values in it, float64}, for `values` of the tokens from `token` on."""
  stretch = np.searchsorted(edges, token + np.arange(len(values)), side="right") - 1
  sums = np.bincount(stretch, weights=values.astype(np.float64))
  return {int(i): float(sums[i]) for i in np.unique(stretch)}
