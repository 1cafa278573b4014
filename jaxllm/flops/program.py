"""The products that a program has, read from its text: what the formulas are held against."""

from __future__ import annotations

import math
import re

from jaxllm.errors import DataError
from jaxllm.flops.text import Instruction, Program

_SHAPE = re.compile(r"\(?\w+\[([\d,]*)\]")
_OPAQUE = re.compile(r'custom_call_target="[^"]*(?:gemm|matmul|dot|conv)[^"]*"', re.IGNORECASE)


def dots(text: str, rounds: int | None = None) -> int:
  """FLOPs of the products in the text of an XLA program: 2 times the numbers of the result times what is summed, a product.

  text: `lowered.compile().as_text()` of a CPU, or `lowered.as_text("hlo")` of any platform.  What a computation has counts
  once a call, and the body of a loop as often as it runs (`text.Program.trips`).  A ragged product counts each row once.
  rounds: how often loops run of which the text does not tell; by default products in them raise DataError, as do those whose
  number is not in the text: in branches, in a library's calls.
  """
  program = Program.of(text)
  known: dict[str, int] = {}

  def total(name: str) -> int:
    if name not in known:
      instructions = program.computations[name].values()
      shapes = {one.name: _sizes(one.kind) for one in instructions}
      known[name] = sum(_flops(program, name, one, shapes, total, rounds) for one in instructions)
    return known[name]

  return total(program.entry)


def _flops(
  program: Program, name: str, one: Instruction, shapes: dict[str, list[int]], total, rounds: int | None
) -> int:
  """FLOPs of one instruction of the computation `name`, with those of what it calls."""
  _, kind, op, rest = one
  if op in ("dot", "ragged-dot"):
    return _product(op, kind, rest, shapes)
  if op == "convolution" or (op == "custom-call" and _OPAQUE.search(rest)):
    raise DataError(f"program: found a {op} ({rest[:80]}), expected dots; give the lowered program's text")
  called = sum(map(total, one.called))
  if op == "while" and called:
    trips, _ = program.trips(name, one, {})
    trips = rounds if trips is None else trips
    if trips is None:
      raise DataError(
        "program: found products in a loop of unknown length; unroll it, or give it a fixed one"
      )
    return trips * called
  if op == "conditional" and (called or any(map(total, one.branches))):
    raise DataError("program: found products in a branch, expected a program that always does the same")
  return called


def _product(op: str, kind: str, rest: str, shapes: dict[str, list[int]]) -> int:
  first = _SHAPE.match(rest)
  left = _sizes(rest) if first else shapes[re.match(r"%?([\w.\-]+)", rest)[1]]
  out = _sizes(kind)
  summed = _numbers(r"lhs_contracting_dims", rest)
  flops = 2 * math.prod(out) * math.prod(left[i] for i in summed)
  if op == "ragged-dot" and set(_numbers("lhs_ragged_dims", rest)) & set(summed):
    flops //= out[0]  # a result a group, of the rows of that group
  return flops


def _sizes(text: str) -> list[int]:
  found = _SHAPE.match(text)
  return [int(n) for n in found[1].split(",") if n] if found else []


def _numbers(name: str, text: str) -> list[int]:
  found = re.search(rf"{name}=\{{([\d,]*)\}}", text)
  return [int(n) for n in found[1].split(",") if n] if found else []
