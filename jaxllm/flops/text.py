"""The text of an XLA program as data: its instructions, what they call, and how often its loops run."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import NamedTuple

from jaxllm.errors import DataError

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$|(ENTRY )?%?([\w.\-]+) \{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SAME = ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done")
"""Operations whose result is the number that they are given."""


class Instruction(NamedTuple):
  """A line: name = kind op(rest, where kind is the type of the result and rest its operands and attributes."""

  name: str
  kind: str
  op: str
  rest: str

  @property
  def operands(self) -> list[str]:
    """Names of what it reads, in order."""
    inside = re.sub(r"/\*.*?\*/", "", self.rest.split(")")[0])
    if "%" in inside:
      return re.findall(r"%([\w.\-]+)", inside)
    return [words[-1] for part in inside.split(",") if (words := part.split())]

  @property
  def called(self) -> list[str]:
    """Names of the computations that it runs each time, but for the condition of a loop."""
    return _CALLED.findall(self.rest)

  @property
  def branches(self) -> list[str]:
    """Names of the computations of which it runs one."""
    found = _BRANCHES.search(self.rest)
    return re.findall(r"[\w.\-]+", found[1]) if found else []

  def attribute(self, name: str) -> str | None:
    """The word after name=, without its %."""
    found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
    return found[1] if found else None


class Linear(NamedTuple):
  """A whole number that a body of a loop may know: element `of` of what the loop carries (None: nothing) + `plus`."""

  of: int | None
  plus: int


Known = Mapping[int, int]
"""The numbers among what a loop carries that stay the same, by their place."""


@dataclasses.dataclass(frozen=True)
class Program:
  """Computations by name, each its instructions by name in order, of which the last is its result; and the one that is run."""

  computations: Mapping[str, Mapping[str, Instruction]]
  roots: Mapping[str, str]
  entry: str
  _found: dict = dataclasses.field(default_factory=dict, repr=False, compare=False)

  @staticmethod
  def of(text: str) -> Program:
    """The program of `compiled.as_text()` or `lowered.as_text("hlo")`; raises DataError for other text."""
    computations, roots, entry, inside = {}, {}, None, None
    for line in text.splitlines():
      if line[:1] not in ("", " ", "}") and (found := _COMPUTATION.match(line)):
        name = found[2] or found[4]
        inside = computations.setdefault(name, {})
        entry = name if found[1] or found[3] else entry
      elif inside is not None and (found := _INSTRUCTION.match(line)):
        inside[found[2]] = Instruction(*found.groups()[1:])
        if found[1]:
          roots[name] = found[2]
    if entry is None:
      raise DataError("program: found no ENTRY, expected the text of an XLA program")
    return Program(computations, roots, entry)

  def trips(self, name: str, loop: Instruction, known: Known) -> tuple[int | None, Known]:
    """(how often a loop of the computation `name` runs, None where the text does not tell; what its body knows).

    known: what that computation knows, if it is a loop's body itself.  The compiler says the number, or the text has it: where
    the loop goes on while a number, which begins with a constant and grows by one, is less than another.
    """
    body, condition = loop.attribute("body"), loop.attribute("condition")
    steps = self._elements(body, self.roots.get(body), {})
    starts = self._elements(name, loop.operands[0], known)
    inside = {
      k: start.plus
      for k, (step, start) in enumerate(zip(steps, starts, strict=False))
      if step == Linear(k, 0) and start is not None and start.of is None
    }
    if found := _TRIPS.search(loop.rest):
      return int(found[1]), inside
    found = self._comparison(condition, inside)
    if found is None or not (found[0].of is not None and found[1].of is None):
      return None, inside
    counter, limit = found
    step, start = (values[counter.of] if counter.of < len(values) else None for values in (steps, starts))
    if start is None or start.of is not None or step is None or step.of != counter.of or step.plus < 1:
      return None, inside
    return max(0, -(-(limit.plus - counter.plus - start.plus) // step.plus)), inside

  def _comparison(self, condition: str | None, known: Known) -> tuple[Linear, Linear] | None:
    """(a, b) of a condition a < b."""
    root = self.computations.get(condition, {}).get(self.roots.get(condition, ""))
    args = None
    if root is not None and root.op == "fusion":
      args = [self._value(condition, operand, known) for operand in root.operands]
      condition = root.attribute("calls")
      root = self.computations[condition][self.roots[condition]]
    if root is None or root.op != "compare" or root.attribute("direction") not in ("LT", "GT"):
      return None
    sides = [self._value(condition, operand, known, args) for operand in root.operands]
    if None in sides:
      return None
    return tuple(sides) if root.attribute("direction") == "LT" else tuple(reversed(sides))

  def _value(self, name: str, what: str, known: Known, args: list | None = None) -> Linear | None:
    """What an instruction of the computation `name` is, if it is a whole number that can be followed; args: of a fusion."""
    return self._once(self._new_value, name, what, known, args)

  def _elements(self, name: str, what: str | None, known: Known, args: list | None = None) -> list:
    """What the elements of a tuple are."""
    return self._once(self._new_elements, name, what, known, args)

  def _once(self, find, name: str, what: str | None, known: Known, args: list | None):
    """find(...), remembered: loops in loops ask for the same many times."""
    key = (find.__name__, name, what, tuple(known.items()), None if args is None else tuple(args))
    if key not in self._found:
      self._found[key] = find(name, what, known, args)
    return self._found[key]

  def _new_value(self, name: str, what: str, known: Known, args: list | None) -> Linear | None:
    one = self.computations[name].get(what)
    if one is None:
      return None
    if one.op == "constant":
      found = re.match(r"(-?\d+)\)", one.rest)
      return Linear(None, int(found[1])) if found else None
    if one.op == "parameter":
      number = int(one.rest.split(")")[0])
      return args[number] if args is not None and number < len(args) else None
    if one.op == "get-tuple-element":
      elements, k = self._elements(name, one.operands[0], known, args), int(one.attribute("index"))
      return elements[k] if k < len(elements) else None
    if one.op in _SAME:
      return self._value(name, one.operands[0], known, args)
    if one.op in ("add", "subtract"):
      a, b = (self._value(name, operand, known, args) for operand in one.operands)
      if a is None or b is None or (b.of is not None and (a.of is not None or one.op == "subtract")):
        return None
      return Linear(a.of if b.of is None else b.of, a.plus + (b.plus if one.op == "add" else -b.plus))
    if one.op == "fusion":
      inner = one.attribute("calls")
      given = [self._value(name, operand, known, args) for operand in one.operands]
      return self._value(inner, self.roots[inner], {}, given)
    return None

  def _new_elements(self, name: str, what: str | None, known: Known, args: list | None) -> list:
    one = self.computations.get(name, {}).get(what)
    if one is None:
      return []
    if one.op == "tuple":
      return [self._value(name, operand, known, args) for operand in one.operands]
    if one.op == "parameter" and args is None:
      return [Linear(None, known[k]) if k in known else Linear(k, 0) for k in range(_size(one.kind))]
    if one.op == "opt-barrier":
      return self._elements(name, one.operands[0], known, args)
    if one.op == "fusion":
      inner = one.attribute("calls")
      given = [self._value(name, operand, known, args) for operand in one.operands]
      return self._elements(inner, self.roots[inner], {}, given)
    if one.op == "while":  # what it does not change
      body = one.attribute("body")
      steps, starts = (
        self._elements(body, self.roots.get(body), {}),
        self._elements(name, one.operands[0], known),
      )
      return [
        start if step == Linear(k, 0) else None
        for k, (step, start) in enumerate(zip(steps, starts, strict=False))
      ]
    return []


def _size(kind: str) -> int:
  """How many elements a tuple's type has."""
  depth, count = 0, 1
  for letter in re.sub(r"/\*.*?\*/", "", kind):
    depth += (letter in "([{") - (letter in ")]}")
    count += letter == "," and depth == 1
  return count
