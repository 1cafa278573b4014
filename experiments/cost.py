"""What training a model costs, in numbers, rows and tables."""

from __future__ import annotations

from pathlib import Path

from experiments.shapes import SHAPES
from jaxllm import flops, hf
from jaxllm.config import ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.study import choices
from jaxllm.study.report import Table

ACTIVATIONS = {"mixed": 2, "megatron": 2, "float32": 4}
"""Bytes of a number of the activations, by `flops.PRECISIONS`."""
GB = 1e9
PER_PARAMETER = 20
"""Tokens of training where --tokens does not say.  Source: Hoffmann et al. (2022), section 3.4."""


def config_of(name: str) -> ModelConfig:
  """The settings of a directory, or a shape by name."""
  if name in SHAPES:
    return SHAPES[name]
  if not Path(name).is_dir():
    near = choices.nearest(name, list(SHAPES))
    raise ConfigError(
      f"--model={name}: no such directory{near}; expected one with a config.json, or one of {', '.join(SHAPES)}"
    )
  return hf.load_config(Path(name))[1]


class Cost:
  """All numbers of a call."""

  def __init__(self, f):  # the flags of experiments.flops
    self.flags, self.name = f, f.model
    self.cfg = config_of(self.name)
    self.length = f.length or min(self.cfg.context_length or self.cfg.length_limit or 2048, 4096)
    self.cfg.check_length(self.length, "--length")
    options = dict(remat=f.remat, chunked_head=f.chunked_head)
    self.counts = {
      one: flops.count(self.cfg, self.length, attention=one, **options) for one in flops.ATTENTION
    }
    self.count, self.device = self.counts[f.attention], flops.DEVICES[f.device]
    self.tokens = f.tokens or PER_PARAMETER * self.count.parameters
    self.rate = f.tokens_per_second or self.count.tokens_per_second(f.mfu or 0.4, self.device.flops)
    self.mfu, self.hfu = (rate(self.rate, self.device.flops) for rate in (self.count.mfu, self.count.hfu))
    if self.hfu > 1:
      raise ConfigError(
        f"{'--tokens_per_second' if f.tokens_per_second else '--mfu'}: {self.rate:,.0f} tokens/s of a device are "
        f"{self.hfu:.0%} of what {f.device} can do (--remat={f.remat}, --attention={f.attention}); expected at most 100 %"
      )
    width = ACTIVATIONS[f.precision]
    self.activations = flops.activations(self.cfg, self.length, f.batch, width=width, remat=f.remat)
    self.cache = flops.cache(self.cfg, self.length, f.batch, f.cache_type)
    self.stages = flops.STAGES

  def days(self, devices: int) -> float:
    """Of training, at the same rate a device however many there are."""
    return flops.training_seconds(self.tokens, devices, self.rate) / 86400

  def memory(self, devices: int, stage: int) -> dict[str, float]:
    """Bytes a device."""
    held = flops.states(self.count.parameters, devices, stage, self.flags.precision)
    return held | {"activations": self.activations}

  def rows(self) -> list[dict]:
    """The lines of results.jsonl."""
    f, one = self.flags, self.count
    total = sum(one.forward.values())
    found = [("parameters", "", one.parameters), ("active parameters", "", one.active)]
    found += [(f"forward, {part}", "FLOP/token", value / self.length) for part, value in one.forward.items()]
    found += [
      ("forward", "FLOP/token", total / self.length),
      ("backward", "FLOP/token", 2 * total / self.length),
    ]
    found += [
      ("computed again", "FLOP/token", one.recomputed / self.length),
      ("model", "FLOP/token", one.model),
    ]
    found += [("hardware", "FLOP/token", one.hardware), ("tokens", "", self.tokens)]
    found += [("speed", "tokens/s/device", self.rate), ("MFU", "", self.mfu), ("HFU", "", self.hfu)]
    found += [("cache", "B", self.cache)]
    rows = [(*row, f.devices, f.zero) for row in found]
    for devices in self.axis():
      rows.append(("time", "days", self.days(devices), devices, f.zero))
      for stage in self.stages:
        rows += [
          (what, "B/device", size, devices, stage) for what, size in self.memory(devices, stage).items()
        ]
    return [
      dict(
        model=self.name,
        quantity=what,
        unit=unit,
        devices=devices,
        zero=stage,
        value=value,
        status="ok",
        reason=None,
      )
      for what, unit, value, devices, stage in rows
    ]

  def axis(self) -> list[int]:
    """Numbers of devices, each four times the one before: down to one and up to 1024, and four times those asked for."""
    found = [self.flags.devices]
    while found[0] > 1:
      found.insert(0, found[0] // 4 or 1)
    while found[-1] < max(1024, 4 * self.flags.devices):
      found.append(4 * found[-1])
    return found


def tables(cost: Cost) -> dict[str, Table]:
  """The tables by title."""
  f, one = cost.flags, cost.count
  total = sum(one.forward.values())
  line = lambda name, value: (name, f"{value / 1e9:,.4g}", f"{value / one.model:.1%}")
  work = [line(f"forward, {part}", value / cost.length) for part, value in one.forward.items()]
  work += [line("backward", 2 * total / cost.length), line("model", one.model)]
  work += [line("computed again", one.recomputed / cost.length), line("hardware", one.hardware)]
  other = "causal" if f.attention == "full" else "full"
  work += [line(f"model, {other} attention", cost.counts[other].model), line("6 a parameter", 6 * one.active)]
  stages = {stage: cost.memory(f.devices, stage) for stage in cost.stages}
  gb = lambda size: f"{size / GB:,.2f}"
  memory = [(what, *(gb(held[what]) for held in stages.values())) for what in stages[0]]
  sums = [sum(held.values()) for held in stages.values()]
  memory += [("all", *map(gb, sums))]
  memory += [
    (
      f"fits in {cost.device.memory / GB:,.0f} GB",
      *("yes" if x <= cost.device.memory else "no" for x in sums),
    )
  ]
  days = cost.days(f.devices)
  time = [
    (
      f"{cost.tokens:,.4g}",
      f"{f.devices:,} {f.device}",
      f"{cost.rate:,.1f}",
      f"{cost.mfu:.2%}",
      f"{cost.hfu:.2%}",
    )
  ]
  time = [(*time[0], f"{days:,.4g}", f"{24 * days * f.devices:,.4g}")]
  speed = "measured" if f.tokens_per_second else "by the MFU assumed"
  notes = (f"tokens/s of a device {speed}; peak {cost.device.flops / 1e12:g} TFLOP/s: {cost.device.source}",)
  cached = f"cache of {cost.length:,} tokens, batch {f.batch}, {f.cache_type}: {gb(cost.cache)} GB"
  columns = ("memory, GB a device", *(f"ZeRO {stage}" for stage in stages))
  return {
    f"FLOPs of a token, {f.attention} attention, sequences of {cost.length:,}, remat {f.remat}": Table(
      ("part", "GFLOP", "of the model's"), tuple(work), 1, ()
    ),
    f"Memory, {f.devices:,} devices, batch {f.batch} each, {f.precision}": Table(
      columns, tuple(memory), 1, (cached,)
    ),
    "Time": Table(
      ("tokens", "devices", "tokens/s", "MFU", "HFU", "days", "device hours"), tuple(time), 0, notes
    ),
  }
