"""What accelerators can do at most, each number beside where it is from."""

from __future__ import annotations

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Device:
  """A chip: dense products of 16-bit numbers, FLOP/s (a multiplication and an addition are two), and its memory in bytes.

  Of a chip, not of a core (a TPU v3 has two), and without the factor of two for sparse weights that data sheets like to show.
  """

  flops: float
  memory: float
  source: str


DEVICES = {
  "t4": Device(65e12, 16e9, "NVIDIA T4 data sheet (float16; the chip has no bfloat16)"),
  "l4": Device(121e12, 24e9, "NVIDIA L4 data sheet (242 with sparsity)"),
  "v100": Device(125e12, 32e9, "NVIDIA V100 data sheet, SXM2, 32 GB (float16; the chip has no bfloat16)"),
  "a100": Device(312e12, 80e9, "NVIDIA A100 data sheet, SXM, 80 GB (624 with sparsity)"),
  "a100-40gb": Device(312e12, 40e9, "NVIDIA A100 data sheet, SXM, 40 GB (624 with sparsity)"),
  "h100": Device(
    989.4e12, 80e9, "NVIDIA H100 architecture paper, table 2, SXM5 (data sheet: 1,979 with sparsity)"
  ),
  "h200": Device(989.4e12, 141e9, "NVIDIA H200 data sheet, SXM (1,979 with sparsity)"),
  "tpu-v3": Device(123e12, 32 * 2**30, "Google Cloud TPU documentation, v3"),
  "tpu-v4": Device(275e12, 32 * 2**30, "Google Cloud TPU documentation, v4"),
  "v5e": Device(197e12, 16e9, "Google Cloud TPU documentation, v5e"),
  "v5p": Device(459e12, 95e9, "Google Cloud TPU documentation, v5p"),
  "v6e": Device(918e12, 32e9, "Google Cloud TPU documentation, v6e"),
}
"""Chips by name."""

_KINDS = (
  (r"T4", "t4"),
  (r"L4", "l4"),
  (r"V100", "v100"),
  (r"A100.*40GB", "a100-40gb"),
  (r"A100", "a100"),
  (r"H100", "h100"),
  (r"H200", "h200"),
  (r"TPU v3", "tpu-v3"),
  (r"TPU v4", "tpu-v4"),
  (r"TPU v5 ?(lite|e)", "v5e"),
  (r"TPU v5p?$", "v5p"),
  (r"TPU v6 ?(lite|e)", "v6e"),
)
"""Patterns in what jax calls a device (`jax.Device.device_kind`), and the chip; the first that is found counts."""


def known_as(device_kind: str) -> str | None:
  """The name in DEVICES of what jax calls a device, or None."""
  return next((name for pattern, name in _KINDS if re.search(rf"\b{pattern}", device_kind)), None)
