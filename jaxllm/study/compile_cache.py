"""JAX's persistent compilation cache: a second run of an experiment does not compile again."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from pathlib import Path


def turn_on() -> None:
  """Sets the cache's environment variables, where the user has not; call it before jax is imported.

  The directory is ${XDG_CACHE_HOME:-~/.cache}/jaxllm/xla-<digest of the CPU's features>, because a program
  compiled for one CPU may use instructions that another lacks, and home directories move between machines.
  A directory that cannot be found or written costs a warning, not the run.
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


def cpu_digest() -> str:
  """8 hex digits that are equal for CPUs of one kind with the same instructions."""
  try:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:  # not Linux
    lines = []
  features = [line for line in lines if line.split(":")[0].strip() in ("flags", "Features")]
  text = features[0] if features else f"{platform.machine()} {platform.processor()}"
  return hashlib.sha256(text.encode()).hexdigest()[:8]
