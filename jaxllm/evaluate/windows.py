"""Losses and hits of a model on windows of text, for many position tables in one compiled program."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.nn.transformer import Transformer, head
from jaxllm.ops.constrain import batch_shards
from jaxllm.ops.losses import cross_entropy
from jaxllm.position.tables import PositionTables

TOKENS_AT_ONCE = 2048
"""Windows go through the model in batches of about this many tokens, which a CPU's cache likes."""


def cut_windows(text: np.ndarray, length: int, longest: int, count: int) -> np.ndarray:
  """`count` windows of length + 1 bytes, int32 [count, length + 1], that end at the same places for every length.

  The places are a constant stride apart, (len(text) - longest - 1) // count, so at every length the last block holds the same
  bytes, and what differs is how much text comes before it.
  """
  stride = window_stride(text, longest, count)
  ends = longest + 1 + stride * np.arange(count)
  return text[ends[:, None] + np.arange(-length - 1, 0)].astype(np.int32)


def window_stride(text: np.ndarray, longest: int, count: int) -> int:
  """Bytes from the end of one window to the end of the next."""
  return (len(text) - longest - 1) // count


def repeat_last_block(windows: np.ndarray, block: int) -> np.ndarray:
  """Each window's last `block` bytes over and over, in the shape of the windows and ending as they do."""
  chunk, length = windows[:, -block:], windows.shape[1]
  return np.tile(chunk, (1, -(-length // block)))[:, -length:]


@functools.partial(jax.jit, static_argnames="model")
def score_windows(
  model: Transformer, params, windows: jax.Array, tables: PositionTables
) -> tuple[jax.Array, jax.Array]:
  """(loss in nats float32, hit bool), each [M, W, T], of windows [W, T + 1] under M tables stacked on a first axis."""
  count, T = windows.shape[0], windows.shape[1] - 1
  shards = batch_shards()
  if spare := -count % shards:  # the last one again, so that every device of a mesh has its part
    windows = jnp.pad(windows, ((0, spare), (0, 0)), mode="edge")
  W = windows.shape[0]
  at_once = shards * math.gcd(W // shards, max(1, TOKENS_AT_ONCE // T))

  def one_table(tokens, table):
    hidden_BTD, _ = model.apply({"params": params}, tokens[:, :-1], rope=table, logits=None)
    return cross_entropy(hidden_BTD, head(model.cfg, params), tokens[:, 1:])

  def one_batch(tokens):
    return jax.vmap(functools.partial(one_table, tokens))(tables)

  scores = jax.lax.map(one_batch, windows.reshape(W // at_once, at_once, T + 1))  # [W / b, M, b, T]
  return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0).reshape(-1, W, T)[:, :count], scores)


def bits_per_byte(nats: np.ndarray, sizes: np.ndarray | None = None) -> float:
  """Losses in bits, summed in float64, over the bytes that the tokens stand for: `sizes` of them, or one each."""
  count = nats.size if sizes is None else int(np.sum(sizes, dtype=np.int64))
  return float(np.sum(nats, dtype=np.float64) / count / math.log(2))
