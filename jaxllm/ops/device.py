"""What a program is traced for."""

from __future__ import annotations

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Device:
  """What a program is traced for: "cpu", "tpu", "cuda" or another platform's name, and a GPU's compute capability.

  partitioned: whether a mesh of several devices is in scope, over which the compiler splits arrays by itself.
  """

  platform: str
  capability: tuple[int, int] = (0, 0)
  partitioned: bool = False

  def __str__(self) -> str:
    major, minor = self.capability
    return self.platform + (f" of compute capability {major}.{minor}" if self.platform == "cuda" else "")


def current_device() -> Device:
  """That of the mesh in scope (`jax.set_mesh`), whose devices may be TPUs that are compiled for from afar, or the default one.

  The default one is that of `jax.default_device`, or of the default backend.  Of arguments that lie on another device, as
  `jax.device_put` may have them, nothing is known while a program is traced.
  """
  mesh = jax.sharding.get_abstract_mesh()
  split = any(size > 1 for size in mesh.shape.values())
  kind = getattr(mesh.abstract_device, "device_kind", "")
  if kind == "cpu" or kind.startswith("TPU"):
    return Device(kind[:3].lower(), partitioned=split)
  default = jax.config.jax_default_device
  first = default if isinstance(default, jax.Device) else jax.devices(default)[0]
  if first.platform == "gpu" and "cuda" in first.client.platform_version:
    major, minor = str(first.compute_capability).split(".")
    return Device("cuda", (int(major), int(minor)), split)
  return Device(first.platform, partitioned=split)
