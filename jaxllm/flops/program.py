"""The products that a program has, read from its text: what the formulas are held against."""

from __future__ import annotations

import math
import re

from jaxllm.errors import DataError

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$|(ENTRY )?%?([\w.\-]+) \{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"\(?\w+\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_OPAQUE = re.compile(r'custom_call_target="[^"]*(?:gemm|matmul|dot|conv)[^"]*"', re.IGNORECASE)


def dots(text: str) -> int:
  """FLOPs of the products in the text of an XLA program: 2 times the numbers of the result times what is summed, a product.

  text: `lowered.compile().as_text()` of a CPU, or `lowered.as_text("hlo")` of any platform.  What a computation has counts
  once a call, and the body of a loop as often as the compiler says it is run.  A ragged product counts each row once.
  Raises DataError for products whose number is not in the text: in loops without a count, in branches, in a library's calls.
  """
  computations, entry = {}, None
  lines = None
  for line in text.splitlines():
    if line[:1] not in ("", " ", "}") and (found := _COMPUTATION.match(line)):
      name = found[2] or found[4]
      lines = computations.setdefault(name, [])
      entry = name if found[1] or found[3] else entry
    elif lines is not None and (found := _INSTRUCTION.match(line)):
      lines.append(found.groups())
  if entry is None:
    raise DataError("program: found no ENTRY, expected the text of an XLA program")
  known: dict[str, int] = {}

  def total(name: str) -> int:
    if name not in known:
      shapes = {one: _sizes(kind) for one, kind, *_ in computations[name]}
      known[name] = sum(_flops(op, kind, rest, shapes, total) for _, kind, op, rest in computations[name])
    return known[name]

  return total(entry)


def _flops(op: str, kind: str, rest: str, shapes: dict[str, list[int]], total) -> int:
  """FLOPs of one instruction, with those of what it calls."""
  if op in ("dot", "ragged-dot"):
    return _product(op, kind, rest, shapes)
  if op == "convolution" or (op == "custom-call" and _OPAQUE.search(rest)):
    raise DataError(f"program: found a {op} ({rest[:80]}), expected dots; give the lowered program's text")
  called = sum(map(total, _CALLED.findall(rest)))
  if op == "while" and called:
    if (trips := _TRIPS.search(rest)) is None:
      raise DataError(
        "program: found products in a loop of unknown length; unroll it, or give it a fixed one"
      )
    return int(trips[1]) * called
  branches = _BRANCHES.search(rest)
  names = re.findall(r"[\w.\-]+", branches[1]) if branches else []
  if op == "conditional" and (called or any(map(total, names))):
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
