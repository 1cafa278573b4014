"""Properties of every row, as functions of its model: logits, decoding, gradients, hidden states."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from family_cases import PINNED, T, built, call_of
from model_checks import relative_error

from jaxllm.experts import Moe
from jaxllm.hf import match
from jaxllm.nn import Context, Transformer, init_cache
from jaxllm.nn.transformer import Block
from jaxllm.tree import flatten

CHUNK = 32


@functools.cache
def program(kind, cfg):
  """The jitted function `kind` of a config: (params, ids, tables) and what else it takes."""
  return jax.jit(KINDS[kind](Transformer(cfg)))


def _forward(model):
  def forward(params, ids, rope, pos=None, prefix=None):
    return model.apply({"params": params}, ids, Context(pos=pos, prefix=prefix), rope=rope)[0]

  return forward


def _step(model):
  def step(params, ids, rope, valid, cache):
    return model.apply({"params": params}, ids, Context(valid=valid), cache=cache, rope=rope)

  return step


def _gradient(model):
  def loss(params, ids, rope):
    logits, _ = model.apply({"params": params}, ids[:, :-1], rope=rope)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, 1:, None], axis=-1)
    return jnp.mean(nll)

  return jax.value_and_grad(loss)


def _states(model):
  def states(params, ids, rope):
    is_block = lambda module, name: isinstance(module, Block) and name == "__call__"
    _, kept = model.apply(
      {"params": params}, ids, rope=rope, capture_intermediates=is_block, mutable="intermediates"
    )
    layers = kept["intermediates"]["layers"]
    return [layers[str(i)]["__call__"][0][0] for i in range(model.cfg.num_layers)]

  return states


KINDS = {"forward": _forward, "step": _step, "gradient": _gradient, "states": _states}


def tables(cfg, row=None, length=T):
  """The tables of a call on `length` tokens, pinned where transformers has one length a call."""
  if row in PINNED:
    return cfg.rope_tables(seq_len=length)
  return cfg.rope_tables(max_len=length)


def context(row, count):
  """The Context of a call on so many tokens of a row, as arguments of a `forward` program."""
  call = call_of(row, count)
  if not call:
    return {}
  return {"pos": call["pos"][None], "prefix": np.array([call["prefix"]], np.int32)}


def truth(row, ids, cfg=None):
  """The oracle's float64 logits [B, T, V] of a row's model, or of its parameters under another config."""
  model, call = built(row), call_of(row, ids.shape[1])
  cfg = model.cfg if cfg is None else cfg
  return oracle.logits(cfg, model.params, ids, call.get("pos"), prefix=call.get("prefix", 0))


def logits(row, ids, params=None):
  """Our float32 logits [B, T, V] of a row's model."""
  model = built(row)
  params = model.params if params is None else params
  given = context(row, ids.shape[1])
  return np.asarray(program("forward", model.cfg)(params, ids, tables(model.cfg, row, ids.shape[1]), **given))


def decoded(cfg, params, ids, rope, capacity=None, single=4):
  """Logits [B, T, V] through the cache, by one program for chunks of up to 32 tokens: the last `single` are alone."""
  B, length = ids.shape
  step, cache, out = program("step", cfg), init_cache(cfg, B, capacity or length), []
  full, rest = divmod(length - single, CHUNK)
  for n in [CHUNK] * full + [rest] * (rest > 0) + [1] * single:
    done = sum(x.shape[1] for x in out)
    chunk = np.zeros((B, CHUNK), np.int32)
    chunk[:, :n] = ids[:, done : done + n]
    found, cache = step(params, chunk, rope, np.arange(CHUNK)[None] < np.full((B, 1), n), cache)
    out.append(np.asarray(found)[:, :n])
  return np.concatenate(out, axis=1)


def first_bad_layer(found, expected, tolerance=1e-4):
  """What to say of two lists of states [B, T, D], one a layer: the first of them that differs, and its error."""
  for i, (one, other) in enumerate(zip(found, expected, strict=False)):
    if (error := relative_error(one, other)) > tolerance:
      return f"the first layer that differs is {i}: {error:.1e}"
  return "no layer differs: what follows the last one does"


def by_name(row, grads):
  """Gradients by the names of the files, in the layouts of the files."""
  model, flat, out = built(row), flatten(grads), {}
  for key in match.all_keys(model.family, model.cfg):
    parts = [np.asarray(flat[path]) for path in key.ours]
    parts = [key.to_stored(part if key.part is None else part[key.part]) for part in parts]
    out[key.theirs] = key.layout.join(parts, model.cfg, key.axis(parts[0].ndim))
  return out


def vanishing(row):
  """Tensors whose gradient is rounding alone.

  A bias of keys that nothing turns adds the same to all scores of a query; the renormalised weight of one expert is 1.
  """
  model = built(row)
  mlp, ends = model.cfg.mlp, () if model.cfg.ropes else ("attn/k/bias",)
  if isinstance(mlp, Moe) and mlp.top_k == 1 and mlp.router.renormalize:
    ends += ("mlp/router/w",)
  keys = match.all_keys(model.family, model.cfg)
  return {key.theirs for key in keys if len(key.ours) == 1 and key.ours[0].endswith(ends)}
