"""The decoder."""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.config import Layer, ModelConfig
from jaxllm.errors import ConfigError, DataError, TokenizerError
from jaxllm.experts import Moe
from jaxllm.leaf import Matrix, QTensor
from jaxllm.nn.attention import Attention
from jaxllm.nn.cache import Cache, LayerCache
from jaxllm.nn.context import Context, Shared, sides
from jaxllm.nn.layers import REMATS, Norm, weight
from jaxllm.nn.mlp import FeedForward
from jaxllm.nn.moe import MoeFeedForward
from jaxllm.ops.constrain import constrain, gathered, looked_up, summed
from jaxllm.ops.einsum import einsum
from jaxllm.ops.head import Head, shrink_gradient
from jaxllm.ops.lookup import lookup
from jaxllm.position import Position
from jaxllm.position.base import Params
from jaxllm.position.tables import PositionTables

_MATRIX_INIT = nn.initializers.variance_scaling(1, "fan_in", "normal")


class Block(nn.Module):
  """Attention and feed-forward, joined to the residual stream by cfg.wiring."""

  cfg: ModelConfig
  layer: Layer
  sequence: bool = False

  @nn.compact
  def __call__(self, x_BTD, shared: Shared, number, cache: LayerCache | None = None):
    def attention(h_BTD):
      nonlocal cache
      layer = Attention(self.cfg, self.layer, self.sequence, name="attn")
      out_BTD, cache = layer(h_BTD, shared, number, cache)
      return out_BTD

    norm = lambda name, h_BTD: Norm(self.cfg.norm, name=name)(h_BTD)
    mlp = self.cfg.mlp_of(self.layer)
    kind = MoeFeedForward if isinstance(mlp, Moe) else FeedForward
    feed_forward = kind(self.cfg, mlp, self.sequence, name="mlp")
    return self.cfg.wiring(x_BTD, norm, attention, feed_forward), cache


class Layers(nn.Module):
  """`repeats` repeats of the layer pattern, named by their numbers: all of the model, or one repeat as the body of a scan.

  A program that reads a cache traces a layer of each kind once, and calls it for the others (the compiler inlines calls):
  tracing is most of what a process that finds its programs compiled waits for, and grows with the layers.
  """

  cfg: ModelConfig
  repeats: int
  remat: str = "none"
  sequence: bool = False

  @nn.compact
  def __call__(self, x_BTD, shared: Shared, caches: tuple[LayerCache, ...] | None, first: jax.Array | int):
    cfg, moved, kinds = self.cfg, [], {}
    layer = Block if self.remat == "none" else nn.remat(Block, policy=REMATS[self.remat])
    once = caches is not None and isinstance(x_BTD, jax.core.Tracer)
    once = once and not any(map(self.is_mutable_collection, ("params", "intermediates")))
    for i in range(self.repeats * len(cfg.layers)):
      kind, cache = cfg.layer(i), None if caches is None else caches[i]
      if once:
        if kind not in kinds:
          kinds[kind] = jax.jit(Block(cfg, kind, self.sequence, parent=None).apply)
        variables = {"params": self.variables["params"][str(i)]}
        x_BTD, cache = kinds[kind](variables, x_BTD, shared, first + i, cache)
      else:
        x_BTD, cache = layer(cfg, kind, self.sequence, name=str(i))(x_BTD, shared, first + i, cache)
      moved.append(cache)
    return x_BTD, None if caches is None else tuple(moved)


class PositionParams(nn.Module):
  """The parameters of one position method."""

  cfg: ModelConfig
  position: Position

  @nn.compact
  def __call__(self) -> Params:
    params = self.position.params(self.cfg)
    return {name: weight(self, name, shape, init) for name, (shape, init) in params.items()}


class LearnedPositions(nn.Module):
  """The parameters of each of cfg.learned_positions, named by their numbers: bound once, shared by the layers."""

  cfg: ModelConfig

  @nn.compact
  def __call__(self) -> tuple[Params, ...]:
    methods = self.cfg.learned_positions
    return tuple(PositionParams(self.cfg, method, name=str(i))() for i, method in enumerate(methods))


class Transformer(nn.Module):
  """A decoder: tokens_BT -> (logits_BTV float32, cache).

  `scan` runs the repeats of cfg.layers as one compiled body over stacked parameters (`tree.stack_layers`): less to compile,
  for training deep models; every checkpoint holds the unstacked layout.  `remat` is what a layer keeps for its gradient, by its
  name in `REMATS`.
  `sequence` splits the tokens of the residual stream between blocks over the mesh axis `tensor` (sequence parallelism).
  `split_table` is whether the mesh axis `fsdp` splits the embedding's width: its rows then take an all-to-all (`looked_up`).
  """

  cfg: ModelConfig
  scan: bool = False
  remat: str = "none"
  sequence: bool = False
  split_table: bool = True

  @nn.compact
  def __call__(
    self,
    tokens_BT: jax.Array,
    context: Context | None = None,
    cache: Cache | None = None,
    rope: PositionTables | None = None,
    logits: Literal["all", "last"] | None = "all",
  ) -> tuple[jax.Array, Cache | None]:
    """Logits of all tokens, of each row's last real one ("last": [B, 1, V]), or hidden states [B, T, D] for None.

    `rope` (cfg.rope_tables()) replaces everything the config says of frequencies and query scale, so that methods which
    differ only there share one compiled program.  Raises ConfigError for tables that do not fit as far as their shapes and
    static fields tell: see `cfg.rope_tables` for what they do not, to which own positions add, as they may lie beyond the
    tables' `max_len`.  Tokens must be in [0, vocab_size): TokenizerError where they are known, but a compiled program, which
    cannot look, reads the last row for what is beyond.
    """
    cfg = self.cfg
    check_tokens(tokens_BT, cfg.vocab_size)
    if logits not in ("all", "last", None):
      raise ConfigError(f'logits: found {logits!r}, expected "all", "last" or None')
    context = Context() if context is None else context
    if cache is None and context.pos is None and context.index is None:
      cfg.check_length(tokens_BT.shape[1], "tokens")
    q_side, places, moved = sides(context, cache, tokens_BT.shape)
    if q_side.block is not None and not any(position.two_dimensional for position in cfg.positions):
      raise ConfigError(
        "context.pos: found [B, T, 2], expected [B, T], as no layer has a two-dimensional RoPE"
      )
    tables = self._tables(rope, context, cache, tokens_BT.shape[1])

    embed_VD = weight(
      self, "embed", (cfg.vocab_size, cfg.token_width), nn.initializers.normal(cfg.token_width**-0.5)
    )
    # in float32 whatever the type of the table, and rounded once, when all is added
    x_BTD = lookup(embed_VD, tokens_BT)
    x_BTD = shrink_gradient(looked_up(x_BTD) if self.split_table else x_BTD, cfg.embed_gradient)
    if (
      self.sequence
    ):  # each device looks all tokens up in its rows of the table, which would be gathered for a part of them
      x_BTD = constrain(x_BTD, "BTD")
    x_BTD = x_BTD.astype(jnp.float32) * cfg.embed_scale
    if cfg.embed_width is not None:
      w = weight(self, "embed_in", (cfg.embed_width, cfg.embed_dim), _MATRIX_INIT)
      x_BTD = einsum("BTE,ED->BTD", x_BTD.astype(cfg.dtype), w.astype(cfg.dtype))
    shared = Shared(q_side, tables, LearnedPositions(cfg, name="positions")())
    for position in cfg.positions:  # an embedding is the model's, whichever layers name it
      x_BTD = position.embed(x_BTD, q_side.pos, shared.of(cfg, position)[1])
    if cfg.embed_norm:
      x_BTD = Norm(cfg.norm, name="embed_norm")(x_BTD)
    x_BTD = summed(x_BTD.astype(cfg.dtype), self.sequence)
    if self.scan:
      if cache is not None:
        raise ConfigError(
          "Transformer.scan: decoding with a cache takes the unstacked layout (tree.unstack_layers)"
        )
      body = nn.scan(
        Layers,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, nn.broadcast, 0),
        length=cfg.num_layers // len(cfg.layers),
      )
      first = jnp.arange(0, cfg.num_layers, len(cfg.layers), dtype=jnp.int32)
      blocks = body(cfg, repeats=1, remat=self.remat, sequence=self.sequence, name="blocks")
      x_BTD, _ = blocks(x_BTD, shared, None, first)
    else:
      layers = Layers(cfg, cfg.num_layers // len(cfg.layers), self.remat, self.sequence, name="layers")
      x_BTD, caches = layers(x_BTD, shared, None if cache is None else moved.of_layers(places), 0)
      moved = None if cache is None else moved.with_layers(caches)
    if cfg.wiring.final_norm:
      x_BTD = Norm(cfg.norm, name="final_norm")(x_BTD)
    x_BTD = gathered(x_BTD, self.sequence)

    to_logits = head(cfg, {"embed": embed_VD} | self._head())
    if logits is None:
      return x_BTD, moved
    if logits == "last":
      x_BTD = _last(x_BTD, context.valid)
    return to_logits(x_BTD), moved

  def _head(self) -> dict[str, jax.Array]:
    """The parameters of the head beside the embedding."""
    cfg, p = self.cfg, {}
    if not cfg.tie_embeddings:
      p["head"] = weight(self, "head", (cfg.token_width, cfg.vocab_size), _MATRIX_INIT)
    if cfg.embed_width is not None:
      p["embed_out"] = weight(self, "embed_out", (cfg.embed_dim, cfg.embed_width), _MATRIX_INIT)
    if "head" in cfg.biases:
      p["head_bias"] = weight(self, "head_bias", (cfg.vocab_size,), nn.initializers.zeros)
    return p

  def _tables(
    self, rope: PositionTables | None, context: Context, cache: Cache | None, T: int
  ) -> PositionTables:
    own_positions = context.pos is not None or context.index is not None
    longest = None if own_positions else (T if cache is None else cache.capacity)
    if rope is None:
      rope = self.cfg.rope_tables(max_len=longest)
    if len(rope.ropes) != len(self.cfg.ropes):
      raise ConfigError(
        f"rope: found tables of {len(rope.ropes)} RoPEs, expected {len(self.cfg.ropes)}, one a distinct RoPE"
      )
    for position, table in zip(self.cfg.ropes, rope.ropes, strict=True):
      if table.program not in (None, position.program):
        raise ConfigError(
          f"rope: found a table of {table.program}, which does not run in a model of {type(position).__name__}; build the "
          "model from the config that made the table"
        )
      if longest is not None and table.reach is not None and table.reach < longest:
        raise ConfigError(
          f"rope: found a table for up to {table.reach} tokens, expected {longest} ("
          f"{'the tokens given' if cache is None else 'the capacity of the cache'}); give rope_tables(max_len={longest})"
        )
      if table.rows > 1 and not position.needs_raw_keys:
        raise ConfigError(
          f"rope: a table of {table.rows} rows needs unrotated keys, which {type(position).__name__} does not keep; "
          "build the model from cfg.with_position(...), or pin one length with rope_tables(seq_len=...)"
        )
    return rope


def check_tokens(tokens_BT: jax.Array, vocab_size: int) -> None:
  """Raises DataError for what is not integers [B, T], TokenizerError for ids outside the vocabulary, unless traced."""
  dtype, shape = getattr(tokens_BT, "dtype", type(tokens_BT).__name__), np.shape(tokens_BT)
  if len(shape) != 2 or not jnp.issubdtype(getattr(tokens_BT, "dtype", None), jnp.integer):
    raise DataError(
      f"tokens: found {dtype} of shape {shape}, expected an array of integers, one row a text: [B, T]"
    )
  if isinstance(tokens_BT, jax.core.Tracer) or not getattr(tokens_BT, "is_fully_addressable", True):
    return
  ids_BT = np.asarray(tokens_BT)
  if ids_BT.size and not 0 <= ids_BT.min() <= ids_BT.max() < vocab_size:
    b, t = np.argwhere((ids_BT < 0) | (ids_BT >= vocab_size))[0]
    raise TokenizerError(f"tokens[{b}, {t}]: found {ids_BT[b, t]}, expected an id from 0 to {vocab_size - 1}")


def head(cfg: ModelConfig, params) -> Head:
  """What turns hidden states into logits, for `ops.losses.cross_entropy`; a tied one shrinks its gradient as the embedding.

  An embedding and a head of more than cfg.vocab_size rows are padded ones, of which the logits have no trace.
  """
  if not cfg.tie_embeddings:
    w_DV = params["head"]
  elif isinstance(params["embed"], QTensor):
    w_DV = params["embed"].T
  else:
    w_DV = Matrix(shrink_gradient(params["embed"], cfg.embed_gradient))
  inner = None if cfg.embed_width is None else params["embed_out"]
  bias, caps = params.get("head_bias"), (cfg.logit_softcap, cfg.logit_scale, cfg.vocab_size)
  return Head(w_DV, bias, *caps, normed=cfg.norm_head, inner=inner)


def _last(x_BTD: jax.Array, valid_BT: jax.Array | None) -> jax.Array:
  if valid_BT is None:
    return x_BTD[:, -1:]
  last_B = jnp.maximum(jnp.sum(valid_BT, axis=1) - 1, 0)
  return jnp.take_along_axis(x_BTD, last_B[:, None, None], axis=1)
