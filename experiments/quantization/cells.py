"""The cells of a run: what each scheme makes of the weights, the text, decoding, and long text."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from experiments import decoding
from experiments.extrapolation import evaluate
from experiments.quantization import schemes, weights
from experiments.quantization.schemes import NONE
from experiments.quantization.source import Source
from experiments.scoring import Scoring
from jaxllm import quant
from jaxllm.errors import JaxllmError, QuantError
from jaxllm.evaluate import strided
from jaxllm.nn import Transformer
from jaxllm.study import methods, rows
from jaxllm.study.cells import Group, Ledger
from jaxllm.study.progress import Progress
from jaxllm.study.stop import StopFlag

BLOCKS, PARTS = 100, 10
"""Stretches of text that the bootstrap draws, and into how many cells the text is cut at most."""
ASKED = (
  *("model", "run", "weights", "quantize_head", "mesh", "rules"),
  *("prompt", "new", "batch", "rounds", "seconds", "smoke"),
)
"""Flags that are recorded as they are given."""
SIDES = ("as loaded", "quantized")


@dataclasses.dataclass(frozen=True)
class Plan:
  """All cells; each group's name begins with the name of its scheme and what it is: weights, windows, decode or sweep."""

  source: Source
  chosen: Mapping[str, Any]
  rules: list[tuple[str, Any]]
  quantized: tuple[str, ...]
  scoring: Scoring
  asked: Mapping[str, Any]
  left_out: Mapping[str, str]

  @classmethod
  def of(cls, f: Any, source: Source) -> Plan:
    """The plan of the flags; ConfigError for a scheme that cannot hold the weights."""
    chosen, left_out = schemes.fitting(f, source.cfg)
    text, window = source.text, source.window
    windows = strided.cover(len(text), window, max(1, window // 2))
    edges = strided.block_edges(len(text), BLOCKS)
    at_once = strided.windows_at_once(windows.length) * source.rows
    scoring = Scoring(text, windows, edges, at_once, PARTS)
    asked = {name: f[name].value for name in ASKED}
    own_rules = schemes.rules(f, source.cfg)
    paths = schemes.chosen_paths(source.cfg, own_rules)
    return cls(source, chosen, own_rules, paths, scoring, asked, left_out)

  @property
  def names(self) -> tuple[str, ...]:
    """The schemes, `none` first."""
    return (NONE, *self.chosen)

  def record(self) -> dict:
    """For config.json."""
    windows = self.scoring.windows
    return {
      "settings": dict(self.asked) | {"dtype": self.source.cfg.dtype, "tokens": len(self.source.text)},
      "schemes": {name: repr(scheme) for name, scheme in self.chosen.items()},
      "left_out": dict(self.left_out),
      "weights": list(self.quantized),
      "windows": {"length": windows.length, "stride": max(1, self.source.window // 2), "count": len(windows)},
    }

  def cell(self, name: str) -> dict:
    """What every row of a scheme says of itself."""
    source = self.source
    return {
      **{"scheme": source.scheme, "quant": name, "method": "none", "factor": 1.0},
      **{"train_length": source.train_length, "length": self.scoring.windows.length, "seed": 0},
    }

  def groups(self) -> list[Group]:
    """In the order in which they are computed: a scheme at a time."""
    found = []
    for name in self.names:
      cell = self.cell(name)
      sizes = [{**cell, "metric": metric} for metric in (*weights.SIZES, weights.ERROR)]
      each = [{**cell, "metric": weights.EACH, "weight": path} for path in self.quantized]
      found.append(Group(f"{name}/weights", (*sizes, *each)))
      found += self.scored(name).groups()
      turns = [(turn, side) for turn in range(self.asked["rounds"]) for side in SIDES]
      found.append(
        Group(
          f"{name}/decode",
          tuple({**cell, "metric": "tokens_per_second", "turn": t, "side": s} for t, s in turns),
        )
      )
      found += self._joined(name)
    return found

  def scored(self, name: str) -> Scoring:
    """The scoring of a scheme."""
    return dataclasses.replace(self.scoring, name=name)

  def _joined(self, name: str) -> list[Group]:
    """Those of the sweep that tables are made of."""
    settings, source = self.source.settings, self.source
    if settings is None:
      return []
    planned = methods.plan(
      *([source.models.schemes[source.scheme]], settings.methods, settings.metrics, settings.factors),
      *(settings.train_length, settings.lengths, 1, settings.windows),
    )
    wanted = {*settings.metrics, methods.BY_WINDOW}
    kept = ((g, [{**c, "quant": name} for c in g.cells if c["metric"] in wanted]) for g in planned)
    return [Group(f"{name}/sweep/{g.name}", tuple(cells)) for g, cells in kept if cells]


class Work:
  """What fills the cells; the weights of the last scheme are kept beside those as loaded."""

  def __init__(self, plan: Plan, ledger: Ledger, progress: Progress, stop: StopFlag):
    self._plan, self._ledger, self._progress, self._stop = plan, ledger, progress, stop
    self._last: tuple[str, Any] = ("", None)
    self._scorers: dict[str, Callable[[Group], list[dict]]] = {}

  def compute(self, group: Group) -> list[dict]:
    """The rows of a group; where the scheme cannot hold a weight they are not applicable."""
    name, kind, *rest = group.name.split("/", 2)
    source = self._plan.source
    try:
      params = self._params(name)
    except QuantError as e:
      return [rows.not_applicable(cell, str(e)) for cell in group.cells]
    if kind == "weights":
      return self._weigh(params, group)
    if kind == "windows":
      return self._scorer(name)(group)
    if kind == "decode":
      return self._decode(params, group)
    view = copy.copy(source.models)
    view.params = lambda scheme, seed: params
    return evaluate.compute(source.settings, view, Group(rest[0], group.cells))

  def _params(self, name: str) -> Any:
    own = self._plan.source.params()
    if name == NONE:
      return own
    if self._last[0] != name:
      self._last = ("", None)  # the memory of one is free before the next is made
      self._scorers.clear()
      quantized = quant.apply(own, self._plan.chosen[name], self._plan.rules)
      self._last = name, jax.block_until_ready(quantized)
    return self._last[1]

  def _weigh(self, params: Any, group: Group) -> list[dict]:
    """Sizes and errors; what hf.save refuses has no size on disk."""
    source, quantized = self._plan.source, self._plan.quantized
    found = weights.errors(source.params(), params, quantized)
    found |= {"bits": weights.bits(params, quantized), "resident_bytes": weights.resident(params)}
    try:
      found["disk_bytes"] = source.disk_bytes(params)
    except JaxllmError as e:
      found["disk_bytes"] = str(e)
    values = [found[cell.get("weight", cell["metric"])] for cell in group.cells]
    return [
      rows.not_applicable(cell, f"hf.save: {value}") if isinstance(value, str) else rows.ok(cell, value)
      for cell, value in zip(group.cells, values, strict=True)
    ]

  def _scorer(self, name: str) -> Callable[[Group], list[dict]]:
    if name not in self._scorers:
      source, scoring = self._plan.source, self._plan.scored(name)
      score = functools.partial(
        *(strided.score_text, Transformer(source.cfg)),
        **{"ids": source.text.ids, "windows": scoring.windows, "bos": source.text.bos},
        tables=source.cfg.rope_tables(seq_len=scoring.windows.length),
      )
      self._scorers[name] = scoring.compute(
        *(self._ledger, self._params(name), score, self._progress, self._stop)
      )
    return self._scorers[name]

  def _decode(self, params: Any, group: Group) -> list[dict]:
    """Tokens a second of both, in turns, each first every other time; of `none` both are the same."""
    asked, source = self._plan.asked, self._plan.source
    length, batch = asked["prompt"], asked["batch"]
    prompts = source.text.ids[: batch * length].reshape(batch, length).tolist()
    model = Transformer(source.cfg)
    read = lambda held: decoding.timed(model, held, prompts, asked["new"])[1]
    sides = dict(zip(SIDES, (source.params(), params), strict=True))
    for held in sides.values():
      read(held)  # compiles
    times = max(1, math.ceil(asked["seconds"] / read(source.params())))
    tokens = times * batch * (asked["new"] - 1)
    rate = lambda held: tokens / math.fsum(read(held) for _ in range(times))
    found = {}
    for turn in range(asked["rounds"]):
      for side in SIDES if turn % 2 else SIDES[::-1]:
        found[turn, side] = rate(sides[side])
        self._stop.check()
    return [rows.ok(cell, found[cell["turn"], cell["side"]]) for cell in group.cells]
