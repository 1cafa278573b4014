"""What a run was computed with, for its config.json."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import version
from pathlib import Path

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def record() -> dict:
  """Versions, source and devices."""
  import jax

  import jaxllm

  return {
    "jaxllm": jaxllm.__version__,
    "source": source_digest(),
    "python": platform.python_version(),
    "libraries": {name: version(name) for name in LIBRARIES},
    "platform": jax.default_backend(),
    "devices": [device.device_kind for device in jax.devices()],
  }


def source_digest() -> str:
  """SHA-256 of the project's own code: cells of two versions do not belong into one table."""
  import jaxllm

  roots = (Path(jaxllm.__file__).parent, Path(__file__).parent)
  files = sorted(path for root in roots for path in root.rglob("*.py"))
  return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def processor() -> str:
  """The processor's name, as far as the system tells it."""
  try:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    return platform.machine()
  names = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
  if "model name" not in names:
    return platform.machine()
  numbers = " ".join(f"{key} {names[key]}" for key in ("cpu family", "model") if key in names)
  return f"{names['model name']} ({numbers})"
