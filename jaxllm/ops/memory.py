"""How much the devices hold."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import jax


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes that a device may hold, how many such devices there are, and what they are."""

  bytes: int
  devices: int
  what: str


def memory_of(devices: Sequence[jax.Device]) -> Memory | None:
  """What one of the devices can hold: what its allocator says, or the machine's memory for CPUs, which share it.

  None where nothing tells.
  """
  if devices[0].platform != "cpu":
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    if limit is None:
      return None
    return Memory(limit, len(devices), f"each of {len(devices)} {devices[0].device_kind}")
  try:
    found = re.search(r"^MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
  except OSError:  # not Linux
    found = None
  return None if found is None else Memory(1024 * int(found[1]), 1, "this machine")
