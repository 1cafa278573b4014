"""A text that is scored in resumable parts, and what the sums over its stretches say of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from jaxllm.evaluate.strided import Windows, block_sums
from jaxllm.evaluate.text import Text
from jaxllm.study import interval, rows
from jaxllm.study.cells import Group, Ledger
from jaxllm.study.progress import Progress
from jaxllm.study.stop import StopFlag

SUMS = ("nats", "hits")
NAMES = {"perplexity": "perplexity", "bpb": "bits per byte", "accuracy": "accuracy"}


@dataclasses.dataclass(frozen=True)
class Scoring:
  """A text in windows, `at_once` a call, in at most `most` parts that are cells of a ledger.

  edges: where the stretches begin that errors are taken over (`strided.block_edges`); a part adds to the sums of those it has.
  name: of the model, where a ledger has the parts of several.
  """

  text: Text
  windows: Windows
  edges: np.ndarray
  at_once: int
  most: int
  name: str = ""

  def groups(self) -> list[Group]:
    """The parts: whole calls of the program, and for each stretch that one meets its sums of losses and of hits."""
    calls = -(-len(self.windows) // self.at_once)
    parts = min(self.most, calls)
    starts = [calls * i // parts * self.at_once for i in range(parts)]
    return [
      self._group(first, last) for first, last in zip(starts, [*starts[1:], len(self.windows)], strict=True)
    ]

  def _group(self, first: int, last: int) -> Group:
    begin = int(self.windows.ends[first] - self.windows.counts[first]) + 1
    met = np.flatnonzero((self.edges[:-1] <= self.windows.ends[last - 1]) & (self.edges[1:] > begin))
    cells = [
      {"first": first, "last": last, "stretch": int(i), "metric": metric} for i in met for metric in SUMS
    ]
    return Group(f"{self.name}/windows/{first}/{last}".removeprefix("/"), tuple(cells))

  def compute(
    self,
    ledger: Ledger,
    params: object,
    score: Callable[..., Iterable[tuple[int, np.ndarray, np.ndarray]]],
    progress: Progress,
    stop: StopFlag,
  ) -> Callable[[Group], list[dict]]:
    """What fills a part, by score(params, at_once=, first=, last=), a `strided.score_text`."""
    done = sum(g.cells[0]["last"] - g.cells[0]["first"] for g in self.groups() if ledger.finished(g.name))
    scored = int(np.median(self.windows.counts))
    task = progress.training(f"{self.name} windows".lstrip(), len(self.windows), done, scored)
    so_far = [done, 0.0, 0]

    def part(group: Group) -> list[dict]:
      first, last = group.cells[0]["first"], group.cells[0]["last"]
      sums: dict[tuple[int, str], float] = dict.fromkeys(
        ((cell["stretch"], cell["metric"]) for cell in group.cells), 0.0
      )
      for token, *found in score(params, at_once=self.at_once, first=first, last=last):
        for metric, values in zip(SUMS, found, strict=True):
          for stretch, amount in block_sums(self.edges, token, values).items():
            sums[stretch, metric] += amount
        so_far[0] = min(so_far[0] + self.at_once, len(self.windows))
        so_far[1] += float(np.sum(found[0], dtype=np.float64))
        so_far[2] += len(found[0])
        task.update(so_far[0], so_far[1] / so_far[2])
        stop.check()
      return [rows.ok(cell, sums[cell["stretch"], cell["metric"]]) for cell in group.cells]

    return part

  def sums(self, found: Sequence[dict]) -> dict[str, np.ndarray] | str:
    """{"nats", "hits", "tokens", "bytes": a sum a stretch} of the rows of all parts, or why there are none."""
    if absent := [row["reason"] for row in found if row["status"] != "ok"]:
      return absent[0]
    sums = {metric: np.zeros(len(self.edges) - 1) for metric in SUMS}
    for row in found:
      sums[row["metric"]][row["stretch"]] += row["value"]
    sizes = np.add.reduceat(self.text.sizes.astype(np.int64), self.edges[:-1])
    return {**sums, "tokens": np.diff(self.edges), "bytes": sizes}

  def values(self, sums: dict[str, np.ndarray]) -> dict[str, tuple[float, float | None, float | None]]:
    """{metric: (value, and the ends of its 95 % interval, None of a single stretch)}.

    Each is a ratio of sums, over the stretches; the interval of perplexity is that of the mean loss.
    """

    def ratio(above: str, below: str, unit: float = 1.0) -> tuple[float, float, float]:
      r, half = interval.ratio(sums[above].tolist(), sums[below].tolist())
      return r / unit, (r - half) / unit, (r + half) / unit

    found = {
      "perplexity": tuple(map(math.exp, ratio("nats", "tokens"))),
      "bpb": ratio("nats", "bytes", math.log(2)),
      "accuracy": tuple(min(max(x, 0.0), 1.0) for x in ratio("hits", "tokens")),
    }
    if len(self.edges) > 2:
      return found
    return {metric: (value, None, None) for metric, (value, *_) in found.items()}

  def rows(self, cell: dict, sums: dict[str, np.ndarray] | str, metrics: Sequence[str]) -> list[dict]:
    """A result row a metric: `cell`, its value, and low and high, the ends of its interval."""
    cell = {**cell, "tokens": len(self.text) - 1, "bytes": int(self.text.sizes[1:].sum())}
    if isinstance(sums, str):
      return [rows.failed({**cell, "metric": m, "low": None, "high": None}, sums) for m in metrics]
    found = self.values(sums)
    return [
      rows.ok({**cell, "metric": m, "low": found[m][1], "high": found[m][2]}, found[m][0]) for m in metrics
    ]


def lines(result: Sequence[dict]) -> list[str]:
  """The rows in words, a line each."""
  shown = []
  for row in result:
    text = f"{NAMES[row['metric']]:<14}"
    if row["status"] != "ok":
      shown.append(f"{text} {row['status']}: {row['reason']}")
      continue
    ends = "" if row["low"] is None else f"  (95 %: {row['low']:.4f} to {row['high']:.4f})"
    shown.append(f"{text} {row['value']:.4f}{ends}")
  return shown
