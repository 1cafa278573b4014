"""Multi-head attention (MHA, GQA and MQA by num_kv_heads) with a position method and an optional cache."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from jaxllm.config import Layer, ModelConfig
from jaxllm.nn.context import append
from jaxllm.nn.layers import Linear
from jaxllm.ops.attention import Side
from jaxllm.position.base import Params, add_bias, inner_products
from jaxllm.position.tables import QueryScale, RopeTable

LayerCache = tuple[jax.Array, jax.Array]


class Attention(nn.Module):
  """o(core(q, k, v)): queries divided by sqrt(H), scaled by position, scored by the layer's position method.

  The scale by position (cfg.query_scale) acts on layers without a window only.
  """

  cfg: ModelConfig
  layer: Layer

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    q_side: Side,
    k_side: Side,
    table: RopeTable | None,
    query_scale: QueryScale,
    p: Params,
    cache: LayerCache | None,
    length_B: jax.Array | None,
  ) -> tuple[jax.Array, LayerCache | None]:
    cfg, position = self.cfg, self.layer.position
    heads = {"q": cfg.num_heads, "k": cfg.num_kv_heads, "v": cfg.num_kv_heads}
    q_BTNH, k_BTKH, v_BTKH = (
      rearrange(Linear(n * cfg.head_dim, cfg.dtype, name=name)(x_BTD), "B T (N H) -> B T N H", N=n)
      for name, n in heads.items()
    )
    q_BTNH = q_BTNH.astype(jnp.float32) * cfg.head_dim**-0.5  # one rounding, at the end
    if self.layer.window is None:  # a window bounds the number of keys, which is what the scale makes up for
      q_BTNH = query_scale(q_BTNH, q_side.pos)

    if position.needs_raw_keys:
      q_BTNH = q_BTNH.astype(cfg.dtype)
      score = lambda q, k, q_pos, k_pos: position.scores(q, k, q_pos, k_pos, table, p)
    else:  # keys are rotated once, before they are cached
      both = position.two_dimensional and q_side.block is not None
      pos = jnp.stack([q_side.pos, q_side.block], axis=-1) if both else q_side.pos
      q_BTNH = position.rotate_q(q_BTNH, pos, table).astype(cfg.dtype)
      k_BTKH = position.rotate_k(k_BTKH, pos, table)
      score = lambda q, k, q_pos, k_pos: add_bias(
        inner_products(q, k), position.bias(p, q_pos, k_pos, cfg.num_heads, cfg.head_dim)
      )

    if cache is not None:
      cache = (append(cache[0], k_BTKH, length_B), append(cache[1], v_BTKH, length_B))
      k_BTKH, v_BTKH = cache
    out_BTNH = cfg.attention(q_BTNH, k_BTKH, v_BTKH, q_side, k_side, self.layer.window, score)
    out_BTD = rearrange(out_BTNH, "B T N H -> B T (N H)")
    return Linear(cfg.embed_dim, cfg.dtype, init_scale=(2 * cfg.num_layers) ** -0.5, name="o")(out_BTD), cache
