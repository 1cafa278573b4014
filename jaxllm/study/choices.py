"""Values of flags that are lists or numbers, read with errors that say what is allowed."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence

from jaxllm.errors import ConfigError

CORES = ("auto", "plain", "blockwise", "cudnn", "splash", "by_head")
"""Names of attention cores (`ops.choose.CORES`), which a flag lists without importing jax."""

RULES = ("data", "zero1", "zero2", "fsdp", "tensor", "sequence", "fsdp_tensor")
"""Names of rule sets (`parallel.RULES`), likewise."""

STORES = ("full", "int8", "int4")
"""Forms of the cache (`nn.STORES`), likewise."""

DEVICES = ("t4", "l4", "v100", "a100", "a100-40gb", "h100", "h200", "tpu-v3", "tpu-v4", "v5e", "v5p", "v6e")
"""Chips by name (`flops.DEVICES`), likewise."""

RULES_HELP = (
  f"with --mesh: the rule set, one of {', '.join(RULES)}; default the one that uses all axes of the mesh"
)

VERIFY_HELP = "compare the files with the SHA-256 that were kept of them, where there are any"


def choice_list(name: str, text: str, allowed: Sequence[str]) -> tuple[str, ...]:
  """The names in a comma-separated flag, in the order given; "all" is every allowed one.

  Raises ConfigError for a name that is not in `allowed`, one given twice, and an empty list.
  """
  names = _split(name, text)
  if names == ["all"]:
    return tuple(allowed)
  for item in names:
    if item not in allowed:
      near = nearest(item, allowed)
      raise ConfigError(f"--{name}={text}: {item!r} is not known{near}; allowed: all, {', '.join(allowed)}")
  return tuple(names)


def number_list(
  name: str, text: str, kind: type = int, minimum: float | None = 1
) -> tuple[int, ...] | tuple[float, ...]:
  """The numbers in a comma-separated flag, in the order given.

  Raises ConfigError for one that is not a finite `kind`, is below `minimum` or is given twice, and for an
  empty list.
  """
  wanted = "a whole number" if kind is int else "a number"
  if minimum is not None:
    wanted += f" of at least {minimum}"
  numbers = []
  for item in _split(name, text):
    try:
      number = kind(item)
    except ValueError:
      number = math.nan
    if not math.isfinite(number) or (minimum is not None and number < minimum):
      raise ConfigError(f"--{name}={text}: found {item!r}, expected {wanted}")
    if number in numbers:
      raise ConfigError(f"--{name}={text}: {item!r} is there twice; give each number once")
    numbers.append(number)
  return tuple(numbers)


def positive(name: str, value: float) -> float:
  """`value`, if it is a finite number above 0; else ConfigError."""
  if not (math.isfinite(value) and value > 0):
    raise ConfigError(f"--{name}={value}: found {value}, expected a number above 0")
  return value


def nearest(name: str, allowed: Sequence[str], prefix: str = "") -> str:
  """`; did you mean x or y?` for the allowed names most like `name`, each after `prefix`; or nothing."""
  close = difflib.get_close_matches(name, allowed, n=3, cutoff=0.6)
  return f"; did you mean {' or '.join(prefix + item for item in close)}?" if close else ""


def _split(name: str, text: str) -> list[str]:
  items = [item.strip() for item in text.split(",")]
  if "" in items:
    raise ConfigError(f"--{name}={text}: an empty item; give values separated by commas, as in a,b,c")
  twice = [item for item in items if items.count(item) > 1]
  if twice:
    raise ConfigError(f"--{name}={text}: {twice[0]!r} is there twice; give each once")
  return items
