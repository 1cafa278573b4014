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
  """The default backend, and the mesh in scope (`jax.set_mesh`), whose devices may be TPUs that are compiled for from afar."""
  mesh = jax.sharding.get_abstract_mesh()
  split = any(size > 1 for size in mesh.shape.values())
  if getattr(mesh.abstract_device, "device_kind", "").startswith("TPU"):
    return Device("tpu", partitioned=split)
  platform, first = jax.default_backend(), jax.devices()[0]
  if platform == "gpu" and "cuda" in first.client.platform_version:
    major, minor = str(first.compute_capability).split(".")
    return Device("cuda", (int(major), int(minor)), split)
  return Device(platform, partitioned=split)
