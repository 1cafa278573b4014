"""Position methods that add a bias to the attention scores."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.position.base import Params, Position


def alibi_slopes(num_heads: int) -> np.ndarray:
  """Slopes of ALiBi for any head count, float64 [N].

  n a power of two: m_h = 2 ** (-8 h / n), h = 1..n.  Otherwise, with c the largest power of two below n: the slopes of c,
  then every other slope of 2c from its first, n - c of them.  Source: Press, Smith and Lewis (2021), authors' code.
  """
  closest = 2 ** (num_heads.bit_length() - 1)
  slopes = 2.0 ** (-8.0 * np.arange(1, closest + 1) / closest)
  extra = 2.0 ** (-8.0 * np.arange(1, 2 * closest + 1, 2) / (2 * closest))
  return np.concatenate([slopes, extra[: num_heads - closest]])


@dataclasses.dataclass(frozen=True)
class Alibi(Position):
  """ALiBi: softmax(q k^T / sqrt(H) + m_h (j - i)), fixed slopes m_h, no other position encoding.

  The bias is not divided by sqrt(H), and it is relative to the query (0 on the diagonal): in the form m_h * j the nearest
  keys carry the largest numbers, where low precision cannot tell them apart.  Source: Press, Smith and Lewis (2021).
  """

  def bias(self, p: Params, q_pos_BT: jax.Array, k_pos_BS: jax.Array, num_heads: int) -> jax.Array:
    distance_BTS = k_pos_BS[:, None, :] - q_pos_BT[:, :, None]
    slopes_N = jnp.asarray(alibi_slopes(num_heads), jnp.float32)
    return slopes_N[None, :, None, None] * distance_BTS[:, None].astype(jnp.float32)
