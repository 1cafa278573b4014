"""Which attention core serves a call, and why."""

from __future__ import annotations

import dataclasses

import jax

from jaxllm.ops.attention import Plain, ScoreFn, Side
from jaxllm.ops.blockwise import Blockwise
from jaxllm.ops.by_head import ByHead
from jaxllm.ops.call import PLAIN_UP_TO, Call, facts, untiled_or_tiled
from jaxllm.ops.kernels import Cudnn, Kernel, Splash

BY_HEAD_UP_TO = 1024
"""The most keys that a CPU takes a head at a time, whose program grows with them."""


@dataclasses.dataclass(frozen=True)
class Choice:
  """A core and the reason it was taken, a clause for reports."""

  core: Plain | Blockwise | Kernel
  why: str


def choose(call: Call) -> Choice:
  """The core for a call: the device's kernel where it serves it, else plain for PLAIN_UP_TO ** 2 scores and blockwise beyond.

  NVIDIA GPUs have cuDNN and TPUs splash attention; CPUs take inner products of whole blocks a head at a time.  A call on a
  cache that holds tokens goes to plain or blockwise.
  """
  kernel = {"cuda": Cudnn(), "tpu": Splash()}.get(call.device.platform)
  if kernel is None:
    reason = f"no kernel for {call.device.platform}"
  elif not call.in_order:
    reason = "a call with a cache or an order of its own"
  elif reason := kernel.refusal(call):
    reason = f"not {kernel.name}: {reason}"
  else:
    return Choice(kernel, f"{call.device}, {call.dtype}, and {call.method} is plain inner products")
  core = untiled_or_tiled(call)
  if call.device.platform == "cpu" and isinstance(core, Blockwise) and _blocks(call):
    return Choice(ByHead(), f"{call.keys} keys in order, up to {BY_HEAD_UP_TO}")
  side = "up to" if isinstance(core, Plain) else "more than"
  keys = (
    f"{call.keys} keys" if call.queries in (None, call.keys) else f"{call.queries} queries, {call.keys} keys"
  )
  return Choice(core, f"{reason}; {keys}, {side} {PLAIN_UP_TO}")


def _blocks(call: Call) -> bool:
  """Whether it is whole blocks of `ByHead`, in order, and few enough to be unrolled."""
  in_order = call.in_order and call.queries in (None, call.keys) and not call.device.partitioned
  whole = call.keys <= BY_HEAD_UP_TO and call.keys % ByHead().block == 0
  return in_order and whole and ByHead().refusal(call) is None


@dataclasses.dataclass(frozen=True)
class Auto:
  """The core that `choose` takes for each call, while it is traced.  Source: the measurements in BENCHMARKS.md."""

  def __call__(
    self,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_side: Side,
    k_side: Side,
    window: int | None,
    score: ScoreFn,
    sinks_N: jax.Array | None = None,
  ) -> jax.Array:
    core = choose(facts(q_BTNH, k_BSKH, q_side, k_side, window, score, sinks_N)).core
    return core(q_BTNH, k_BSKH, v_BSKH, q_side, k_side, window, score, sinks_N)


CORES = {
  "auto": Auto,
  "plain": Plain,
  "blockwise": Blockwise,
  "cudnn": Cudnn,
  "splash": Splash,
  "by_head": ByHead,
}
"""Attention cores by name."""
