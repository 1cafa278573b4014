"""JAX's persistent compilation cache: a second run of an experiment does not compile again."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import platform
import re
import sys
import warnings
from pathlib import Path

LARGEST = 4 << 30
"""Bytes beyond which the entries that were not used for longest are removed; a run of the default sweep adds some megabytes."""


def turn_on() -> None:
  """Sets the cache's environment variables, where the user has not; call it before jax is imported.

  The directory is ${XDG_CACHE_HOME:-~/.cache}/jaxllm/xla-<digest of the CPU's features>, because a program
  compiled for one CPU may use instructions that another lacks, and home directories move between machines.
  A directory that cannot be found or written costs a warning, not the run.  An entry that a kill left torn is removed when
  jax meets it, and the cache is kept below LARGEST bytes; jax does neither (its own bound needs another package).
  """
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
  if "JAX_COMPILATION_CACHE_DIR" in os.environ:
    return
  root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  directory = Path(root) / "jaxllm" / f"xla-{cpu_digest()}"
  try:
    directory = directory.expanduser()
    directory.mkdir(parents=True, exist_ok=True)
    if not os.access(directory, os.W_OK | os.X_OK):
      raise PermissionError("it is not writable")
  except (OSError, RuntimeError) as e:  # RuntimeError: the user has no home directory
    print(
      f"warning: no compilation cache in {directory}: {getattr(e, 'strerror', None) or e}", file=sys.stderr
    )
    return
  os.environ["JAX_COMPILATION_CACHE_DIR"] = str(directory)
  _bound(directory, LARGEST)
  _heal(directory)


def _bound(directory: Path, largest: int) -> None:
  """Remove the oldest entries, by last use, until half of `largest` is left; nothing while the cache is below it."""
  found = []
  for entry in directory.glob("*-cache"):
    with contextlib.suppress(OSError):  # another run removes entries too
      stat = entry.stat()
      found.append((stat.st_atime_ns, stat.st_size, entry))
  total = sum(size for _, size, _ in found)
  if total <= largest:
    return
  for _, size, entry in sorted(found):
    if total <= largest // 2:
      return
    with contextlib.suppress(OSError):
      entry.unlink()
    total -= size


def _heal(directory: Path) -> None:
  """When jax warns that it cannot read an entry, remove it, as jax compiles again but never writes over what is there.

  The warning tells the program's name only: its other entries go too, and come back when they are next compiled.
  """
  show = warnings.showwarning

  def remove_and_show(message, *args, **kwargs):
    if found := re.match(r"Error reading persistent compilation cache entry for '([^']+)'", str(message)):
      for entry in directory.glob(f"{glob.escape(found[1])}-*-cache"):
        with contextlib.suppress(OSError):
          entry.unlink()
    show(message, *args, **kwargs)

  warnings.showwarning = remove_and_show


def cpu_digest() -> str:
  """8 hex digits that are equal for CPUs of one kind with the same instructions."""
  try:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:  # not Linux
    lines = []
  features = [line for line in lines if line.split(":")[0].strip() in ("flags", "Features")]
  text = features[0] if features else f"{platform.machine()} {platform.processor()}"
  return hashlib.sha256(text.encode()).hexdigest()[:8]
