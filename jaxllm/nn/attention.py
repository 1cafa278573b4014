"""Multi-head attention (MHA, GQA and MQA by num_kv_heads) with a position method and an optional cache."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from jaxllm.config import Layer, ModelConfig
from jaxllm.nn.cache import LayerCache
from jaxllm.nn.context import Shared
from jaxllm.nn.layers import HeadNorm, Linear, weight
from jaxllm.ops.attention import MASKED, Score
from jaxllm.ops.constrain import constrain, summed
from jaxllm.ops.head import soft_cap
from jaxllm.ops.sequence import Fan, fan
from jaxllm.position import Position, Rope
from jaxllm.position.base import add_bias, inner_products


def rotates_once(position: Position, rows: int) -> bool:
  """Whether all queries of a call see a key turned alike: not where frequencies depend on the query (rows of a table above 1).

  A method that keeps unrotated keys for the sake of its frequencies only (dynamic NTK) does so where one row is pinned.
  """
  return not position.needs_raw_keys or (type(position).scores is Rope.scores and rows == 1)


def hooks(cfg: ModelConfig, position: Position, rows: int = 1) -> str | None:
  """What makes a layer's scores more than inner products (`ops.attention.Score.hooks`), or None."""
  if not rotates_once(position, rows):
    return "it scores unrotated keys itself"
  if type(position).bias is not Position.bias:
    return "it adds a bias to the scores"
  return "layer_scaling multiplies the scores" if cfg.layer_scaling else None


class Attention(nn.Module):
  """o(core(q, k, v)): queries times cfg.score_scale, scaled by position, scored by the layer's position method.

  The scale by position is cfg.query_scale, which says on which layers it acts.

  With cfg.layer_scaling the layer of number l (from 0) has its queries divided by l + 1 and its float32 scores multiplied by
  it: nothing changes but that q k^T stays within a half type's range.
  Source of the layer scaling: Zeng et al. (2022), GLM-130B, section 2.1; CogView's PB-Relax.

  cfg.clip_qkv clips the projections.  Source of the clipping: transformers' `clip_qkv` (MPT, OLMo).
  cfg.attention_sinks adds a key without a value for each head.  Source of the sinks: Xiao et al. (2023), section 3.3; GPT-OSS.
  """

  cfg: ModelConfig
  layer: Layer
  sequence: bool = False

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    shared: Shared,
    number: jax.Array | int,
    cache: LayerCache | None,
  ) -> tuple[jax.Array, LayerCache | None]:
    cfg, position, q_side, k_side = self.cfg, self.layer.position, shared.q_side, shared.q_side
    table, p = shared.of(cfg, position)
    rows = 1 if table is None else table.rows
    x = fan(x_BTD, self.sequence)
    scores_keys = not rotates_once(position, rows)
    q_BTNH, k_BTKH, v_BTKH = (
      self._heads(x, name, n, letters)
      for name, n, letters in (
        ("q", cfg.num_heads, "BTNH"),
        ("k", cfg.num_kv_heads, "BTKH"),
        ("v", cfg.num_kv_heads, "BTKH"),
      )
    )

    q_BTNH = q_BTNH.astype(jnp.float32)  # one rounding, at the end
    if not position.needs_raw_keys:  # keys are rotated once, before they are cached
      both = position.two_dimensional and q_side.block is not None
      pos = jnp.stack([q_side.pos, q_side.block], axis=-1) if both else q_side.pos
      q_BTNH = position.rotate_q(q_BTNH, pos, table)
      k_BTKH = position.rotate_k(k_BTKH, pos, table)
    q_BTNH, k_BTKH = self._normed("after", "q", q_BTNH), self._normed("after", "k", k_BTKH)
    q_BTNH = q_BTNH * cfg.score_scale
    q_BTNH = shared.tables.query_scale(q_BTNH, q_side.pos, self.layer.window)
    layer_scale = number + 1 if cfg.layer_scaling else 1
    q_BTNH = (q_BTNH / layer_scale).astype(cfg.dtype)

    def score(q, k, q_pos, k_pos):
      if scores_keys:
        scores = position.scores(q, k, q_pos, k_pos, table, p) * layer_scale
      else:
        bias = position.bias(p, q_pos, k_pos, cfg.num_heads, cfg.head_dim)
        scores = add_bias(inner_products(q, k) * layer_scale, bias)
      if cfg.attention_softcap is None:
        return scores
      # a method may mask by its scores (Streaming), and a cap would show again what it hides
      return jnp.where(scores > MASKED / 2, soft_cap(scores, cfg.attention_softcap), MASKED)

    if cache is not None:
      cache = cache.add(k_BTKH, v_BTKH)
      if not cache.fresh:
        k_BTKH, v_BTKH = cache.read(cfg.dtype)
        k_side = cache.place.side
    if (
      position.needs_raw_keys and not scores_keys
    ):  # cached unrotated, as other calls may have other frequencies
      q_BTNH = position.rotate_q(q_BTNH, q_side.pos, table)
      k_BTKH = position.rotate_k(k_BTKH, k_side.pos, table)
    sinks_N = weight(self, "sinks", (cfg.num_heads,), nn.initializers.zeros) if cfg.attention_sinks else None
    scoring = Score(score, type(position).__name__, hooks(cfg, position, rows), cfg.attention_softcap)
    out_BTNH = cfg.attention(q_BTNH, k_BTKH, v_BTKH, q_side, k_side, self.layer.window, scoring, sinks_N)
    out_BTNH = constrain(out_BTNH, "BTNH")
    out_BTD = Linear(cfg, cfg.embed_dim, self.sequence, name="o")(rearrange(out_BTNH, "B T N H -> B T (N H)"))
    return summed(out_BTD, self.sequence), cache

  def _heads(self, x: jax.Array | Fan, name: str, heads: int, letters: str) -> jax.Array:
    """The projection `name`, clipped and normalised where the config says so, [B, T, heads, H]."""
    cfg = self.cfg
    x = Linear(cfg, heads * cfg.head_dim, name=name)(x)
    if cfg.clip_qkv is not None:
      x = jnp.clip(x, -cfg.clip_qkv, cfg.clip_qkv)
    x_BTNH = constrain(rearrange(x, "B T (N H) -> B T N H", N=heads), letters)
    return x_BTNH if name == "v" else self._normed("before", name, x_BTNH)

  def _normed(self, place: str, name: str, x_BTNH: jax.Array) -> jax.Array:
    kind = self.cfg.qk_norm
    return x_BTNH if kind is None or kind.place != place else HeadNorm(kind, name=f"{name}_norm")(x_BTNH)
