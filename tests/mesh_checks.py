"""Sharded equals unsharded, as functions of a config and its parameters, so that every table of models can be held to it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import parallel
from jaxllm.nn import Transformer, init_cache
from jaxllm.nn.transformer import head
from jaxllm.ops.losses import cross_entropy

B, T = 8, 12

MESHES = (
  ("data", "data=8"),
  ("fsdp", "fsdp=8"),
  ("tensor", "tensor=4"),
  ("tensor", "data=2,tensor=4"),
  ("fsdp", "data=2,fsdp=4"),
  ("fsdp_tensor", "fsdp=2,tensor=4"),
)
"""Rule sets, and meshes that they fit."""


def make_mesh(axes):
  """The mesh of `axes`, over as many of the devices as it takes."""
  count = math.prod(int(part.split("=")[1]) for part in axes.split(","))
  return parallel.make_mesh(axes, jax.devices()[:count])


def tokens(cfg):
  """Random token ids [B, T + 1]: the last of a row is only a label."""
  return np.random.default_rng(0).integers(0, cfg.vocab_size, (B, T + 1), np.int32)


def forward(cfg, params, ids):
  """(loss, logits [B, T, V]) of tokens [B, T + 1]; the loss is scored in two chunks."""
  hidden, _ = Transformer(cfg).apply({"params": params}, ids[:, :-1], logits=None)
  to_logits = head(cfg, params)
  nll, _ = cross_entropy(hidden, to_logits, ids[:, 1:], chunk=B * T // 2)
  return jnp.mean(nll), to_logits(hidden)


@functools.cache
def gradient_program(cfg):
  """((loss, logits), gradient) of (params, tokens), compiled."""
  return jax.jit(jax.value_and_grad(functools.partial(forward, cfg), has_aux=True))


@functools.cache
def reference(cfg, source):
  """What `gradient_program` gives on one device; source() makes the parameters."""
  return jax.device_get(gradient_program(cfg)(source(), tokens(cfg)))


@functools.cache
def step_program(cfg):
  """(logits [B, t, V], cache) of (params, tokens [B, t], cache), compiled."""
  return jax.jit(lambda params, ids, cache: Transformer(cfg).apply({"params": params}, ids, cache=cache))


def relative_error(found, truth):
  """max |found - truth| / max |truth|; NaN anywhere is infinitely wrong."""
  found, truth = np.asarray(found, np.float64), np.asarray(truth, np.float64)
  error = np.max(np.abs(found - truth)) / np.max(np.abs(truth))
  return np.inf if np.isnan(error) else error


def gradient_error(found, truth):
  """The largest error of a gradient, relative to the largest number of its own leaf, or to a tenth of the largest of all.

  A gradient whose terms cancel has no scale of its own: that of a bias of keys that nothing turns is 0 but for rounding, and
  that of an activation's one number is a sum over all tokens and the hidden width.
  """
  found, truth = (
    jax.tree.leaves(jax.tree.map(lambda x: np.asarray(x, np.float64), tree)) for tree in (found, truth)
  )
  largest = [np.max(np.abs(x)) for x in truth]
  assert all(f.shape == t.shape for f, t in zip(found, truth, strict=True))
  errors = [
    np.max(np.abs(f - t)) / max(size, 0.1 * max(largest))
    for f, t, size in zip(found, truth, largest, strict=True)
  ]
  return np.inf if np.any(np.isnan(errors)) else max(errors)


def errors_on_mesh(cfg, source, rules, axes):
  """(error of the loss, of logits, of gradients) of the rule set on the mesh, against one device."""
  (loss, logits), grads = reference(cfg, source)
  mesh = make_mesh(axes)
  with jax.set_mesh(mesh):
    placed = parallel.shard(source(), mesh, parallel.RULES[rules], cfg)
    ids = parallel.shard_batch(tokens(cfg), mesh)
    (mesh_loss, mesh_logits), mesh_grads = gradient_program(cfg)(placed, ids)
  grads_found = parallel.unpad(mesh_grads, cfg)
  errors = (
    relative_error(mesh_loss, loss),
    relative_error(mesh_logits, logits),
    gradient_error(grads_found, grads),
  )
  return dict(zip(("loss", "logits", "gradients"), errors, strict=True))


def check_equal(cfg, source, rules, axes, tolerance=1e-5):
  """Loss, logits and gradients on the mesh are those of one device; source() makes the parameters, on the host."""
  errors = errors_on_mesh(cfg, source, rules, axes)
  assert max(errors.values()) <= tolerance, f"{rules} on {axes}: {errors}"
  return errors


def check_decode(cfg, source, rules, axes, tolerance=1e-5):
  """Prefill and single tokens through the cache, on the mesh, give the logits of a full forward pass on one device."""
  (_, truth), _ = reference(cfg, source)
  ids, mesh, step = tokens(cfg)[:, :-1], make_mesh(axes), step_program(cfg)
  with jax.set_mesh(mesh):
    placed = parallel.shard(source(), mesh, parallel.RULES[rules], cfg)
    cache, out = init_cache(cfg, B, T), []
    for part in (ids[:, :-2], ids[:, -2:-1], ids[:, -1:]):
      logits, cache = step(placed, parallel.shard_batch(part, mesh), cache)
      out.append(np.asarray(logits))
  error = relative_error(np.concatenate(out, axis=1), truth)
  assert error <= tolerance, f"{rules} on {axes}: decoding {error:.2e} > {tolerance}"
  return cache
