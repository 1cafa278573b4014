"""Which weights of a tree a scheme holds, and what that costs and saves."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import tree
from jaxllm.errors import ConfigError, QuantError
from jaxllm.leaf import LoRA, QTensor, dense

DEFAULT = (
  (r"(layers|blocks)/\d+/attn/[qkvo]/w", True),
  (r"(layers|blocks)/\d+/mlp/(experts/)?(gate|up|down)/w", True),
)
"""What is quantized unless rules say otherwise: the matrices of layers, but not embeddings, head, routers and norms."""

MATRICES, TABLES = r".+/w|head|embed_in|embed_out", "embed"
"""What can be quantized: matrices that rows are multiplied with, and tables of rows, of which a tied head is the transpose."""

MOST = 2.0**126
"""The largest weight, 8.5e37: the reciprocal of one above it is no normal number, and what a scheme rounds up may be none."""

VOCABULARY = ("embed", "head")
"""Those that a mesh may pad with tokens of zeros."""


def apply(params: Any, scheme: Any, rules: Sequence[tuple[str, Any]] = ()) -> dict[str, Any]:
  """The tree with a `leaf.QTensor` in place of each weight that the rules choose.

  rules: (regular expression of a whole path, True: `scheme` holds the weight, False: it stays as it is, or a scheme of its
  own); the first that matches counts, and `DEFAULT` follows them.  A weight at a time is quantized, where it lies on a mesh.
  Of a tree of jax.ShapeDtypeStructs nothing is computed: it gives the structs of the parts, and raises what shapes can.
  Raises ConfigError for what is no scheme, a value that is none of these, and a rule that matches no parameter; QuantError for
  a weight that is quantized already, is traced (in jax.jit or jax.eval_shape), is no matrix of floats, has NaN, infinity or
  numbers beyond 2^126, a shape that the scheme's groups do not divide, or padding of a mesh that a scheme of one mean for all
  (double_quant) would count.
  """
  flat = tree.flatten(params)
  if not _is_scheme(scheme):
    raise ConfigError(
      f"scheme: found {scheme!r}, expected a value such as quant.SCHEMES[name](), with the parentheses"
    )
  is_value = lambda value: value is True or value is False or _is_scheme(value)
  tree.check_rules(rules, flat, is_value, "True, False or a scheme (quant.SCHEMES[name]())")
  chosen = {}
  for path in flat:
    value = tree.first_match([*rules, *DEFAULT, (".+", False)], path)
    if value is not False:
      chosen[path] = scheme if value is True else value
  if not chosen:
    raise ConfigError("rules: no parameter is to be quantized; leave apply out, or give a rule with True")
  return tree.unflatten({p: _held(p, x, chosen[p]) if p in chosen else x for p, x in flat.items()})


def _is_scheme(value: Any) -> bool:
  return hasattr(value, "quantize") and not isinstance(value, type)


def _held(path: str, leaf: Any, scheme: Any) -> QTensor:
  if isinstance(leaf, QTensor):
    raise QuantError(f"{path}: found a weight of {leaf.scheme}, expected one that is not quantized yet")
  if isinstance(leaf, LoRA):
    raise QuantError(
      f"{path}: found a weight with LoRA, expected one without; quantize it before lora.apply, or merge it first"
    )
  table = re.fullmatch(TABLES, path) is not None
  if not (table or re.fullmatch(MATRICES, path)) or leaf.ndim < 2 or 0 in leaf.shape:
    raise QuantError(
      f"{path}: found {tuple(leaf.shape)}, expected a matrix that rows are multiplied with ({MATRICES}), or a table of rows "
      f"({TABLES}); leave it out by a rule"
    )
  if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(leaf)):
    raise QuantError(
      f"{path}: found a weight of a program that is traced, expected an array, whose numbers are looked at; call quant.apply "
      "outside of jax.jit and jax.eval_shape: of jax.ShapeDtypeStructs it gives structs"
    )
  if not jnp.issubdtype(leaf.dtype, jnp.floating):
    raise QuantError(
      f"{path}: found a weight of {leaf.dtype}, expected floats; it is quantized already, or leave it out by a rule"
    )
  abstract = _abstract(leaf)
  if getattr(scheme, "double_quant", False) and path in VOCABULARY and not abstract and _padded(leaf, table):
    raise QuantError(
      f"{path}: found padding of a mesh at the end of the vocabulary, which the mean of {scheme} would count, expected none; "
      "take parallel.unpad(params, cfg) first, or quantize before parallel.shard"
    )
  try:
    if abstract:
      (parts, _), finite = jax.eval_shape(lambda x: _quantize(x, scheme, table), leaf), True
    else:
      parts, finite = _quantize(leaf, scheme, table)
  except QuantError as e:
    raise QuantError(f"{path}: {e}") from None
  if not bool(finite):
    raise QuantError(
      f"{path}: found NaN or infinity, or a scale that is, or a weight beyond {MOST:.2g}, expected finite weights in the "
      "scheme's range; the checkpoint is damaged, or leave it out by a rule"
    )
  held = QTensor(parts, scheme, table)
  if table and any(part.shape[0] * held.step % leaf.shape[0] for part in parts.values() if part.shape[0] > 1):
    raise QuantError(
      f"{path}: found a table of {leaf.shape[0]} rows, expected a number that parts of {scheme} divide; leave it out by a rule"
    )
  return held


def _abstract(leaf: Any) -> bool:
  """Whether it has shapes and types alone."""
  return all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(leaf))


def _padded(leaf: Any, table: bool) -> bool:
  """Whether a weight on several devices ends with a token of nothing but zeros, as `parallel.shard` pads the vocabulary."""
  w = dense(leaf)
  on = len(w.sharding.device_set) if isinstance(w, jax.Array) else 1
  return on > 1 and not bool(jnp.any(w[-1] if table else w[:, -1]))


@functools.partial(jax.jit, static_argnames=("scheme", "table"))
def _quantize(leaf: Any, scheme: Any, table: bool) -> tuple[dict[str, jax.Array], jax.Array]:
  w = dense(leaf).T if table else dense(leaf)
  parts = scheme.quantize(w)
  checks = [jnp.abs(w.astype(jnp.float32)) <= MOST]
  checks += [jnp.isfinite(x) for x in parts.values() if jnp.issubdtype(x.dtype, jnp.floating)]
  return parts, functools.reduce(jnp.logical_and, map(jnp.all, checks))


def report(params: Any, before: Any = None) -> list[dict[str, Any]]:
  """A row a quantized weight: its path, scheme, bits an element with scales counted, bytes, and with the tree as it was
  `before` its relative error, ||w - w'|| / ||w||.  Of jax.ShapeDtypeStructs it is the same, but that QuantError is raised where
  there is a tree before, as they have no numbers.
  """
  flat, old = tree.flatten(params), None if before is None else tree.flatten(before)
  rows = []
  for path, leaf in flat.items():
    leaf = leaf.base if isinstance(leaf, LoRA) else leaf
    if not isinstance(leaf, QTensor):
      continue
    row = {"path": path, "scheme": leaf.scheme, "bits": 8 * leaf.nbytes / leaf.size, "bytes": leaf.nbytes}
    if old is not None:
      if _abstract(leaf) or _abstract(old[path]):
        raise QuantError(
          f"{path}: found jax.ShapeDtypeStructs, expected arrays, for errors are of numbers; leave `before` out"
        )
      w = np.asarray(dense(old[path]), np.float64)
      row["error"] = float(np.linalg.norm(np.asarray(dense(leaf)) - w) / max(np.linalg.norm(w), 1e-300))
    rows.append(row)
  return rows
