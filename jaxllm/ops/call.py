"""What is known of an attention call while it is traced: all that the choice of a core may depend on."""

from __future__ import annotations

import dataclasses

from jaxllm.ops.attention import Plain, Score, ScoreFn, Side
from jaxllm.ops.blockwise import Blockwise
from jaxllm.ops.device import Device, current_device

PLAIN_UP_TO = 256
"""Queries and keys up to which all scores at once are the fastest on CPUs (BENCHMARKS.md has the measurement)."""


@dataclasses.dataclass(frozen=True)
class Call:
  """The static facts of one call of a core: what a choice may depend on.

  hooks, softcap, method: those of its `attention.Score`.  queries: how many there are (None: as many as keys).
  fixed_window: the window is a Python integer, or there is none.
  """

  device: Device
  dtype: str
  head_dim: int
  keys: int
  method: str
  hooks: str | None = None
  softcap: float | None = None
  queries: int | None = None
  in_order: bool = True
  fixed_window: bool = True
  prefix: bool = False
  segments: bool = False
  sinks: bool = False


def facts(q_BTNH, k_BSKH, q_side: Side, k_side: Side, window, score: ScoreFn, sinks_N) -> Call:
  """The `Call` of a core's arguments."""
  if not isinstance(score, Score):
    score = Score(score, "this score function", "it is no attention.Score, so its scores may be anything")
  return Call(
    current_device(),
    str(q_BTNH.dtype),
    q_BTNH.shape[-1],
    k_BSKH.shape[1],
    score.method,
    score.hooks,
    score.softcap,
    q_BTNH.shape[1],
    in_order=q_side.in_order and k_side.in_order,
    fixed_window=window is None or isinstance(window, int),
    prefix=q_side.prefix is not None,
    segments=q_side.segment is not None,
    sinks=sinks_N is not None,
  )


def untiled_or_tiled(call: Call) -> Plain | Blockwise:
  """The reference core for a call: all scores at once while they are few and that is as fast, tiles beyond."""
  queries = call.keys if call.queries is None else call.queries
  return Plain() if queries * call.keys <= PLAIN_UP_TO**2 else Blockwise()
