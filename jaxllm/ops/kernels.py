"""Attention cores that hand the work to a library's fused kernel: cuDNN on NVIDIA GPUs, splash attention on TPUs.

A kernel computes soft_cap(q . k) itself, so it serves methods that rotate queries and keys beforehand, or do nothing to
them.  Which calls it serves is decided by `refusal` from what is known while tracing, a `Call`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxllm.errors import ConfigError
from jaxllm.ops.attention import ScoreFn, Side, zero_unused
from jaxllm.ops.call import Call, facts, untiled_or_tiled

LANES = 128
"""The width of a TPU's vector registers: splash attention's tiles and head sizes are multiples of it."""


@dataclasses.dataclass(frozen=True)
class Kernel:
  """What the kernel cores share: they serve calls in order, and leave those with a cache to the reference cores.

  In order means that query i and key i are token i, which a kernel's causal mask takes for granted; with a cache the order is
  data.  A call that `refusal` speaks against is a ConfigError.
  """

  name: ClassVar[str]

  def refusal(self, call: Call) -> str | None:
    """Why this kernel cannot serve a call, or None: what the method or the config has that every kernel lacks."""
    if call.hooks is not None:
      return call.hooks
    if call.prefix:
      return "its causal mask cannot show a prefix to all queries"
    if not call.fixed_window:
      return "the window is not known while tracing"
    return None

  def check(self, call: Call) -> None:
    """Raise ConfigError, naming the method and the reason, for a call that is refused."""
    if reason := self.refusal(call):
      raise ConfigError(
        f"attention: found {self.name!r} with {call.method}, which it cannot serve: {reason}; "
        "expected auto, blockwise or plain"
      )

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
    call = facts(q_BTNH, k_BSKH, q_side, k_side, window, score, sinks_N)
    self.check(call)
    if not call.in_order:
      core = untiled_or_tiled(call)
      return core(q_BTNH, k_BSKH, v_BSKH, q_side, k_side, window, score, sinks_N)
    k_BSKH, v_BSKH = k_BSKH.astype(q_BTNH.dtype), zero_unused(v_BSKH, k_side.valid).astype(q_BTNH.dtype)
    return self.attend(q_BTNH, k_BSKH, v_BSKH, q_side, k_side, window, call.softcap, sinks_N)

  def attend(self, q_BTNH, k_BSKH, v_BSKH, q_side, k_side, window, softcap, sinks_N) -> jax.Array:
    """The kernel itself, on scaled queries; what it puts out for padding is finite and otherwise anything."""
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Cudnn(Kernel):
  """cuDNN's flash attention by `jax.nn.dot_product_attention`: bfloat16 or float16 on an NVIDIA GPU since Ampere.

  Head sizes are multiples of 8 up to 128, or up to 256 since Hopper.  No packed sequences, soft caps or sinks.
  Source: Dao et al. (2022).
  """

  name: ClassVar[str] = "cudnn"

  def refusal(self, call: Call) -> str | None:
    largest = 256 if call.device.capability >= (9, 0) else 128
    if reason := super().refusal(call):
      return reason
    if call.softcap is not None or call.sinks:
      return f"it has no {'attention sinks' if call.sinks else 'soft cap of scores'}"
    if call.segments:
      return "packed sequences would need a dense mask"
    if call.device.platform != "cuda" or call.device.capability < (8, 0):
      return f"it needs an NVIDIA GPU of compute capability 8.0, found {call.device}"
    if call.dtype not in ("bfloat16", "float16"):
      return f"it computes in bfloat16 or float16, found dtype {call.dtype}"
    if call.head_dim % 8 or call.head_dim > largest:
      return f"it takes a head_dim that is a multiple of 8 of at most {largest}, found {call.head_dim}"
    return None

  def attend(self, q_BTNH, k_BSKH, v_BSKH, q_side, k_side, window, softcap, sinks_N) -> jax.Array:
    N, K = q_BTNH.shape[2], k_BSKH.shape[2]
    # one array, cut again: its rule for vmap takes all operands batched or none, and values know no position
    qkv = jnp.concatenate([q_BTNH, k_BSKH, v_BSKH], axis=2)
    q_BTNH, k_BSKH, v_BSKH = jnp.split(qkv, (N, N + K), axis=2)
    lengths_B = None
    if k_side.valid is not None:  # right padding; a row of padding only keeps a key, whose value is 0
      count = jnp.maximum(jnp.sum(k_side.valid, axis=1, dtype=jnp.int32), 1)
      lengths_B = count + 0 * qkv[:, 0, 0, 0].astype(jnp.int32)
    return jax.nn.dot_product_attention(
      q_BTNH,
      k_BSKH,
      v_BSKH,
      scale=1.0,
      is_causal=True,
      key_value_seq_lengths=lengths_B,
      local_window_size=None if window is None else (window - 1, 0),
      implementation="cudnn",
    )


@dataclasses.dataclass(frozen=True)
class Splash(Kernel):
  """Splash attention, JAX's Pallas kernel for TPUs: windows, packed sequences, soft caps and sinks, without a dense mask.

  block: queries and keys of a tile, a multiple of 128.  interpret: None compiles for the TPU this process has; False compiles
  for a TPU whatever the default backend is (ahead of time); True runs the kernel's Python on any machine, slowly.
  Tokens are padded to whole tiles and heads to 128 coordinates, which a TPU's registers do anyway.
  Source: jax.experimental.pallas.ops.tpu.splash_attention.
  """

  name: ClassVar[str] = "splash"

  block: int = 512
  interpret: bool | None = None

  def __post_init__(self):
    if not isinstance(self.block, int) or self.block < LANES or self.block % LANES:
      raise ConfigError(f"Splash.block: found {self.block!r}, expected a multiple of {LANES}")
    if self.interpret not in (None, True, False):
      raise ConfigError(f"Splash.interpret: found {self.interpret!r}, expected None, true or false")

  def refusal(self, call: Call) -> str | None:
    if reason := super().refusal(call):
      return reason
    if self.interpret is None and call.device.platform != "tpu":
      return f"it needs a TPU, found {call.device}"
    if self.interpret is not True and call.device.partitioned:
      return "the compiler cannot split it over the mesh in scope"
    if call.dtype == "float16":
      return "TPUs compute in bfloat16 or float32, found dtype float16"
    if call.sinks and "sinks" not in inspect.signature(_splash().attention_reference).parameters:
      return "attention sinks need a newer jax"
    return None

  def attend(self, q_BTNH, k_BSKH, v_BSKH, q_side, k_side, window, softcap, sinks_N) -> jax.Array:
    B, T, N, H = q_BTNH.shape
    block = min(self.block, -(-T // LANES) * LANES)
    rows = T + -T % block
    head_first = lambda x: jnp.pad(
      jnp.moveaxis(x, 2, 1), [(0, 0), (0, 0), (0, rows - T), (0, -H % LANES)]
    )  # keys that pad the end come after every query
    segments_BT = (
      None if q_side.segment is None and k_side.valid is None else _segments(q_side, k_side, (B, T), rows)
    )
    run = jax.vmap(
      lambda q, k, v, segments: _kernel(N, rows, window, softcap, block, self.interpret is True)(
        q, k, v, segments, **({} if sinks_N is None else {"sinks": sinks_N.astype(jnp.float32)})
      )
    )
    out = run(head_first(q_BTNH), head_first(k_BSKH), head_first(v_BSKH), segments_BT)
    return jnp.moveaxis(out, 1, 2)[:, :T, :, :H]


def _splash():
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

  return splash_attention_kernel


def _segments(q_side: Side, k_side: Side, shape: tuple[int, int], rows: int):
  """Segment ids of both sides, a key that is no token in a segment of its own: int32 [B, rows] each."""
  zeros = jnp.zeros((1, 1), jnp.int32)
  q, k = (zeros if side.segment is None else side.segment for side in (q_side, k_side))
  if k_side.valid is not None:
    k = jnp.where(k_side.valid, k, -1)
  pad = lambda x: jnp.pad(jnp.broadcast_to(x, shape), ((0, 0), (0, rows - shape[1])))
  return _splash().SegmentIds(pad(q), pad(k))


def _kernel(heads: int, rows: int, window: int | None, softcap: float | None, block: int, interpret: bool):
  """The kernel for one row of a batch, [N, rows, H] queries; its backward pass has the same tiles."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  one = (
    masks.CausalMask((rows, rows)) if window is None else masks.LocalMask((rows, rows), (window - 1, 0), 0)
  )
  names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
  sizes = dict.fromkeys((*names, "block_q_dq", "block_kv_dq"), block)
  make = functools.partial(_splash().make_splash_mha, head_shards=1, q_seq_shards=1, interpret=interpret)
  return make(
    mask=masks.MultiHeadMask([one] * heads),
    block_sizes=_splash().BlockSizes(**sizes),
    attn_logits_soft_cap=softcap,
  )
