"""What a compiled program sends between devices, read from its text."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

from jaxllm.flops.text import Instruction, Known, Program

KINDS = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)
"""The operations that are counted."""

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_BITS = re.compile(r"\d+")


@dataclasses.dataclass(frozen=True)
class Collective:
  """An operation of a program that devices do together.

  kind: of KINDS.  arrays: (type, shape) of its results on a device.  count: how often it is done each time the program is run.
  once: whether it is in a loop whose length the text does not tell, or in a branch; count is then of one round.  source: the
  operation of the traced function that it is from, as XLA names it, or "".
  """

  kind: str
  arrays: tuple[tuple[str, tuple[int, ...]], ...]
  count: int = 1
  once: bool = False
  source: str = ""

  @property
  def bytes(self) -> int:
    """Of its results on a device, each time."""
    return sum(math.ceil(_bits(dtype) * math.prod(shape) / 8) for dtype, shape in self.arrays)


def collectives(text: str) -> list[Collective]:
  """The collectives of `compiled.as_text()`, in the order of the text.

  An asynchronous one, which a -start and a -done stand for, is one, and so is one of a TPU that goes on in several fusions,
  some of them in loops: those of one channel.  What loops have counts as often as they run.  Raises DataError for what is no
  program.
  """
  program = Program.of(text)
  whole, parts = [], {}
  for channel, one in _of(program, program.entry, {}, 1, False):
    if channel is None:
      whole.append(one)
    elif channel not in parts:
      parts[channel] = len(whole)
      whole.append(one)
    elif one.count < whole[parts[channel]].count:
      whole[parts[channel]] = one
  return whole


@dataclasses.dataclass(frozen=True)
class Sum:
  """All collectives of one kind: how many are done each time the program is run, and the bytes of their results on a device."""

  count: int
  bytes: int


def totals(found: list[Collective]) -> dict[str, Sum]:
  """Sums by kind, in the order of KINDS, without the kinds that there are none of."""
  counts, sizes = collections.Counter(), collections.Counter()
  for one in found:
    counts[one.kind] += one.count
    sizes[one.kind] += one.count * one.bytes
  return {kind: Sum(counts[kind], sizes[kind]) for kind in KINDS if counts[kind]}


def _of(
  program: Program, name: str, known: Known, times: int, once: bool, fused: str | None = None
) -> Iterator[tuple[str | None, Collective]]:
  """(channel, collective) of those of one call of a computation; no channel outside of fusions.  fused: the fusion's result."""
  for one in program.computations[name].values():
    if (found := _read(one, times, once)) is not None:
      if fused is not None and "all-reduce-scatter" in name and found.kind == "all-reduce":
        found = dataclasses.replace(found, kind="reduce-scatter", arrays=_arrays(fused))
      yield None if fused is None else one.attribute("channel_id"), found
    elif one.op == "while":
      trips, inside = program.trips(name, one, known)
      if trips != 0:
        yield from _of(program, one.attribute("body"), inside, times * (trips or 1), once or trips is None)
    elif not one.op.endswith(("-done", "-update")):  # they name again what their start has called
      result = one.kind if one.op == "fusion" else None
      for inner in (*one.called, *one.branches):
        yield from _of(program, inner, {}, times, once or one.op == "conditional", result)


def _read(one: Instruction, times: int, once: bool) -> Collective | None:
  kind = one.op.removesuffix("-start")
  if kind not in KINDS:
    return None
  arrays = _arrays(one.kind)
  if one.op != kind and kind in ("all-gather", "collective-permute"):  # (what it reads, what it gives, flags)
    arrays = arrays[len(one.operands) : 2 * len(one.operands)]
  found = re.search(r'op_name="([^"]*)"', one.rest)
  return Collective(kind, arrays, times, once, found[1] if found else "")


def _arrays(kind: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
  without_layouts = re.sub(r"\{[^{}]*\}", "", kind)
  return tuple(
    (dtype, tuple(int(n) for n in sizes.split(",") if n)) for dtype, sizes in _ARRAY.findall(without_layouts)
  )


def _bits(dtype: str) -> int:
  """Of a number: the first digits of the type's name, as in bf16, f8e4m3fn, s4; a pred has eight."""
  return 8 if dtype == "pred" else int(_BITS.search(dtype)[0])
