"""Meshes of devices: making one, laying parameters and batches out over it, and saying what lies where."""

from jaxllm.parallel.mesh import batch_shards, default_rules, make_mesh, shard_batch, spell
from jaxllm.parallel.report import report
from jaxllm.parallel.rules import RULES, RuleSet, bytes_per_device, layout, place, shard, shardings, unpad

__all__ = [
  "RULES",
  "RuleSet",
  "batch_shards",
  "bytes_per_device",
  "default_rules",
  "layout",
  "make_mesh",
  "place",
  "report",
  "shard",
  "shard_batch",
  "shardings",
  "spell",
  "unpad",
]
