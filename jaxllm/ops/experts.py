"""A mixture of experts on tokens, on one device or on each of a mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from jaxllm.errors import ConfigError
from jaxllm.leaf import Matrix, QTensor
from jaxllm.ops.constrain import activation_spec, compiler_axes
from jaxllm.ops.einsum import PRODUCT, einsum
from jaxllm.ops.grouped import group, grouped_dot, permute, spread

Params = Mapping[str, Mapping[str, Any]]
Route = Callable[[jax.Array], tuple[jax.Array, jax.Array]]
LETTERS = {"router": ("DE", "E"), "gate": ("EDF", "EF"), "up": ("EDF", "EF"), "down": ("EFD", "ED")}
"""Of the weight and the bias of each part."""


def experts(
  x_CD: jax.Array, p: Params, route: Route, activation: Callable[..., jax.Array], biased: Any = True
) -> jax.Array:
  """sum_k weight_k down_e(activation(gate_e(x), up_e(x))) of tokens x [C, D], with e = index_k: [C, D] float32.

  p: router {w [D, E], bias}, and each of gate (where there is one), up and down {w [E, in, out], bias}.  route(logits [C, E])
  is (weights, index), [C, k] each.  Tokens are sorted by expert, multiplied a group at a time and put back: the work is that of
  C k tokens, and the memory too.  biased: whether to add the biases of down (one of several devices that share an expert does).
  """
  logits_CE = einsum("CD,DE->CE", x_CD, p["router"]["w"].astype(x_CD.dtype))
  if "bias" in p["router"]:
    logits_CE += p["router"]["bias"][None].astype(jnp.float32)
  weights_Ck, index_Ck = route(logits_CE)
  (C, k), index_R = index_Ck.shape, index_Ck.reshape(-1)
  order_R, inverse_R, sizes_E = group(index_R, logits_CE.shape[1])
  x_RD = spread(x_CD, order_R, inverse_R, k)

  def project(name: str) -> jax.Array:
    part = p[name]
    out_RF = grouped_dot(x_RD, part["w"], sizes_E, jnp.float32 if "bias" in part else x_CD.dtype)
    if "bias" in part:
      out_RF = (out_RF + part["bias"].astype(jnp.float32)[index_R[order_R]]).astype(x_CD.dtype)
    return checkpoint_name(out_RF, PRODUCT)

  # the backward pass recomputes the activation, as in nn.mlp
  hidden_RF = jax.checkpoint(activation)(*(project(name) for name in ("gate", "up") if name in p))
  out_RD = checkpoint_name(grouped_dot(hidden_RF, p["down"]["w"], sizes_E), PRODUCT)
  out_RD = permute(out_RD, inverse_R, order_R)
  out_CD = jnp.einsum(
    "CkD,Ck->CD", out_RD.reshape(C, k, out_RD.shape[-1]), weights_Ck, preferred_element_type=jnp.float32
  )
  if "bias" in p["down"]:
    mine_CE = jnp.zeros_like(logits_CE).at[jnp.arange(C)[:, None], index_Ck].add(weights_Ck)
    out_CD += einsum("CE,ED->CD", jnp.where(biased, mine_CE, 0), p["down"]["bias"].astype(jnp.float32))
  return out_CD


def experts_on_mesh(
  x_BTD: jax.Array, p: Params, route: Route, activation: Callable[..., jax.Array]
) -> jax.Array:
  """`experts` of tokens [B, T, D], each device those of its rows of the batch, and its part of each expert's hidden width.

  Sorting and counting are so a device's own matter, and what devices of one `tensor` axis have is added up at the end: one
  all-reduce, as for a dense layer.
  """
  flat = lambda x_BTD, p, biased: experts(
    x_BTD.reshape(-1, x_BTD.shape[-1]), p, route, activation, biased
  ).reshape(x_BTD.shape)
  sizes = compiler_axes()
  if all(size == 1 for size in sizes.values()):
    return flat(x_BTD, p, True)

  def spec(leaf: Any, letters: str) -> PartitionSpec | QTensor:
    if isinstance(leaf, QTensor):
      return _part_specs(leaf, letters, sizes)
    value, letters = (leaf.value, leaf.letters(letters)) if isinstance(leaf, Matrix) else (leaf, letters)
    return activation_spec(value.shape, letters, sizes)

  letters = lambda name, kind: LETTERS[name][kind == "bias"]
  specs = {
    name: {kind: spec(leaf, letters(name, kind)) for kind, leaf in part.items()} for name, part in p.items()
  }
  rows = activation_spec(x_BTD.shape, "BTD", sizes)
  down = specs["down"]["w"]
  down = down.parts["value"] if isinstance(down, QTensor) else down
  split = jax.tree.leaves(tuple(down))  # the axes of F: no other dimension has some

  def one_device(x_BTD, p):
    first = jnp.bool_(True)
    for axis in split:
      first &= jax.lax.axis_index(axis) == 0
    return flat(x_BTD, p, first)[None]

  # a sum over an axis of its own, and not a psum inside: the transpose of that is one more all-reduce
  parts = jax.shard_map(
    one_device,
    in_specs=(rows, specs),
    out_specs=PartitionSpec(tuple(split) or None, *rows),
    axis_names=set(sizes),
    check_vma=False,
  )(x_BTD, p)
  return jnp.sum(parts, axis=0)


def _part_specs(w: QTensor, letters: str, sizes: Mapping[str, int]) -> QTensor:
  """How the parts of a quantized weight lie; raises ConfigError where its numbers are cut and what scales them is not."""
  stored = letters[:-2] + letters[:-3:-1]
  specs = {name: activation_spec(part.shape, stored, sizes) for name, part in w.parts.items()}
  for name, part in w.parts.items():
    for size, own, cut in zip(part.shape, specs[name], specs["value"], strict=True):
      if own != cut and size > 1:
        axes = ", ".join(jax.tree.leaves(own or cut))
        raise ConfigError(
          f"experts: {axes} of the mesh cuts only one of the numbers and the {size} blocks ({name}) of {w.scheme}, expected "
          "both or neither; take a smaller axis, or smaller blocks"
        )
  return dataclasses.replace(w, parts=specs)
