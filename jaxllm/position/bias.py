"""Position methods that add a bias to the attention scores."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import ConfigError, check_positive
from jaxllm.position.base import Params, Position

SLOPE_DTYPES = (None, "bfloat16")
PLACEMENTS = ("after", "before")


def alibi_slopes(num_heads: int, bias_max: float = 8.0) -> np.ndarray:
  """Slopes of ALiBi for any head count, float64 [N].

  n a power of two: m_h = 2 ** (-bias_max h / n), h = 1..n.  Otherwise, with c the largest power of two below n: the slopes
  of c, then every other slope of 2c from its first, n - c of them.  The paper has bias_max = 8; MPT's code, which takes
  the slopes of 2c and sorts them otherwise, comes to the same list.  Source: Press, Smith and Lewis (2021), authors' code.
  """
  closest = 2 ** (num_heads.bit_length() - 1)
  slopes = 2.0 ** (-bias_max * np.arange(1, closest + 1) / closest)
  extra = 2.0 ** (-bias_max * np.arange(1, 2 * closest + 1, 2) / (2 * closest))
  return np.concatenate([slopes, extra[: num_heads - closest]])


@dataclasses.dataclass(frozen=True)
class Alibi(Position):
  """ALiBi: softmax(q k^T / sqrt(H) + m_h (j - i)), fixed slopes m_h, no other position encoding.

  By default the bias is not divided by sqrt(H) (paper, BLOOM, MPT).  It is relative to the query (0 on the diagonal): in
  the form m_h * j the nearest keys carry the largest numbers, where low precision cannot tell them apart.

  bias_max: the paper's and BLOOM's 8, and MPT's `alibi_bias_max`.  slope_dtype: None for float32, or "bfloat16", in which
  Falcon computes m_h j: slopes, positions j and their products are rounded to 8 bits each, so that from j = 256 on
  neighbours share a bias, which depends on more than j - i: it is m_h j rounded, less m_h i rounded.  placement: "after" the
  division of the scores, or "before" it, softmax((q k^T + m_h (j - i)) / sqrt(H)), as in Falcon-RW.
  Source: Press, Smith and Lewis (2021); transformers for what BLOOM, MPT and Falcon do.
  """

  bias_max: float = 8.0
  slope_dtype: str | None = None
  placement: str = "after"

  def __post_init__(self):
    check_positive(self, bias_max=self.bias_max)
    if self.slope_dtype not in SLOPE_DTYPES:
      raise ConfigError(f"Alibi.slope_dtype: found {self.slope_dtype!r}, expected bfloat16, or None")
    if self.placement not in PLACEMENTS:
      raise ConfigError(
        f"Alibi.placement: found {self.placement!r}, expected one of {', '.join(PLACEMENTS)} (the division by sqrt(H))"
      )

  def slopes(self, num_heads: int) -> np.ndarray:
    """The slopes that this variant uses, float32 [N]."""
    slopes = alibi_slopes(num_heads, self.bias_max).astype(np.float32)
    return slopes.astype(jnp.bfloat16).astype(np.float32) if self.slope_dtype == "bfloat16" else slopes

  def bias(
    self, p: Params, q_pos_BT: jax.Array, k_pos_BS: jax.Array, num_heads: int, head_dim: int
  ) -> jax.Array:
    slopes_N = self.slopes(num_heads)
    if self.slope_dtype == "bfloat16":
      k_BNS, q_BNT = (
        _rounded(slopes_N[None, :, None] * _rounded(pos)[:, None]) for pos in (k_pos_BS, q_pos_BT)
      )
      bias_BNTS = k_BNS[:, :, None] - q_BNT[..., None]
      return bias_BNTS * head_dim**-0.5 if self.placement == "before" else bias_BNTS
    if self.placement == "before":
      slopes_N = (slopes_N * head_dim**-0.5).astype(np.float32)
    distance_BTS = k_pos_BS[:, None, :] - q_pos_BT[:, :, None]
    return jnp.asarray(slopes_N)[None, :, None, None] * distance_BTS[:, None].astype(jnp.float32)


def _rounded(x: jax.Array) -> jax.Array:
  """Numbers of bfloat16, as float32; a cast there and back would be dropped by XLA."""
  return jax.lax.reduce_precision(jnp.asarray(x, jnp.float32), 8, 7)


def t5_thresholds(num_buckets: int, max_distance: int) -> list[int]:
  """The smallest distance of each bucket but the first, integers [num_buckets - 1].

  With e = num_buckets // 2 and n = num_buckets - e: bucket b <= e starts at distance b, and bucket e + k at the smallest
  d with (d / e)^n >= (max_distance / e)^k, which is d^n e^k >= max_distance^k e^n in integers: no logarithm is rounded.
  """
  e, n = num_buckets // 2, num_buckets - num_buckets // 2
  starts = list(range(1, e + 1))
  d = e
  for k in range(1, n):
    while d**n * e**k < max_distance**k * e**n:
      d += 1
    starts.append(d)
  return starts


@dataclasses.dataclass(frozen=True)
class T5Bias(Position):
  """T5's relative bias for a decoder: score_ij + table[bucket(i - j), head], one table for all layers.

  bucket(d) = d for d < e, else min(e + floor(n ln(d / e) / ln(max_distance / e)), num_buckets - 1), with e = num_buckets // 2
  and n = num_buckets - e: half of the buckets hold one distance each, the others grow up to max_distance, and the last
  has all beyond.  The thresholds are exact integers (`t5_thresholds`).  The table is [num_buckets, N].  T5 does not divide
  its scores by sqrt(H); here they are divided, as everywhere.  Source: Raffel et al. (2020), section 2.1, authors' code.
  """

  num_buckets: int = 32
  max_distance: int = 128

  def __post_init__(self):
    for name, least in (("num_buckets", 2), ("max_distance", 2)):
      value = getattr(self, name)
      if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"T5Bias.{name}: found {value!r}, expected an integer of at least {least}")
    if self.max_distance <= self.num_buckets // 2:
      raise ConfigError(
        f"T5Bias.max_distance: found {self.max_distance}, expected more than num_buckets // 2 = {self.num_buckets // 2}"
      )

  def params(self, cfg):
    initial = jax.nn.initializers.normal(cfg.embed_dim**-0.5)
    return {"table": ((self.num_buckets, cfg.num_heads), initial)}

  def buckets(self, distance: jax.Array) -> jax.Array:
    """The bucket of each distance i - j, int32 of the same shape; what comes after the query is in bucket 0."""
    starts = t5_thresholds(self.num_buckets, self.max_distance)
    e = self.num_buckets // 2
    bucket = jnp.clip(distance, 0, e)
    for start in starts[e:]:
      bucket += distance >= start
    return bucket

  def bias(
    self, p: Params, q_pos_BT: jax.Array, k_pos_BS: jax.Array, num_heads: int, head_dim: int
  ) -> jax.Array:
    bucket_BTS = self.buckets(q_pos_BT[:, :, None] - k_pos_BS[:, None, :])
    return jnp.moveaxis(p["table"].astype(jnp.float32)[bucket_BTS], -1, 1)
