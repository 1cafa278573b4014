"""Multi-head attention (MHA, GQA and MQA by num_kv_heads) with a position method and an optional cache."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from jaxllm.config import Layer, ModelConfig
from jaxllm.nn.context import append
from jaxllm.nn.layers import Linear, weight
from jaxllm.ops.attention import Side
from jaxllm.position.base import add_bias, inner_products
from jaxllm.position.tables import QueryScale, RopeTable

LayerCache = tuple[jax.Array, jax.Array]


class Attention(nn.Module):
  """o(core(q, k, v)): queries divided by sqrt(H), scaled by position, scored by the layer's position method."""

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
    cache: LayerCache | None,
    length_B: jax.Array | None,
  ) -> tuple[jax.Array, LayerCache | None]:
    cfg, position = self.cfg, self.layer.position
    heads = {"q": cfg.num_heads, "k": cfg.num_kv_heads, "v": cfg.num_kv_heads}
    q_BTNH, k_BTKH, v_BTKH = (
      rearrange(Linear(n * cfg.head_dim, cfg.dtype, name=name)(x_BTD), "B T (N H) -> B T N H", N=n)
      for name, n in heads.items()
    )
    p = {name: weight(self, name, shape, init) for name, (shape, init) in position.params(cfg).items()}
    q_BTNH = query_scale(
      q_BTNH.astype(jnp.float32) * cfg.head_dim**-0.5, q_side.pos
    )  # one rounding, at the end

    if position.needs_raw_keys:
      q_BTNH = q_BTNH.astype(cfg.dtype)
      score = lambda q, k, q_pos, k_pos: position.scores(q, k, q_pos, k_pos, table, p)
    else:  # keys are rotated once, before they are cached
      q_BTNH = position.rotate_q(q_BTNH, q_side.pos, table).astype(cfg.dtype)
      k_BTKH = position.rotate_k(k_BTKH, q_side.pos, table)
      score = lambda q, k, q_pos, k_pos: add_bias(
        inner_products(q, k), position.bias(p, q_pos, k_pos, cfg.num_heads)
      )

    if cache is not None:
      k_BTKH, v_BTKH = cache = tuple(
        append(slots, new, length_B, q_side.valid) for slots, new in zip(cache, (k_BTKH, v_BTKH), strict=True)
      )
    out_BTNH = cfg.attention(q_BTNH, k_BTKH, v_BTKH, q_side, k_side, self.layer.window, score)
    out_BTD = rearrange(out_BTNH, "B T N H -> B T (N H)")
    return Linear(cfg.embed_dim, cfg.dtype, init_scale=(2 * cfg.num_layers) ** -0.5, name="o")(out_BTD), cache
