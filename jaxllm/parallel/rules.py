"""Which dimension of each parameter lies over which mesh axis, as data; and parameters laid out by it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm import tree
from jaxllm.config import ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.leaf import LoRA, Matrix, QTensor
from jaxllm.parallel.mesh import default_rules, spell

Spec = tuple[str | tuple[str, ...] | None, ...]
Rules = Iterable[tuple[str, Spec]]

_LAYER = r"(layers|blocks)/\d+/"
PARAMETERS = (
  ("embed", "VD"),
  ("head", "DV"),
  ("embed_in", "-D"),
  ("embed_out", "D-"),
  ("head_bias", "V"),
  (r"(embed|final)_norm/(scale|bias)", "-"),
  (r"positions/\d+/\w+", "-"),
  (_LAYER + r"attn/q/w", "DN"),
  (_LAYER + r"attn/q/bias", "N"),
  (_LAYER + r"attn/[kv]/w", "DK"),
  (_LAYER + r"attn/[kv]/bias", "K"),
  (_LAYER + r"attn/o/w", "ND"),
  (_LAYER + r"attn/[qk]_norm/(scale|bias)", "-"),
  (_LAYER + r"attn/sinks", "-"),
  (_LAYER + r"mlp/(gate|up)/w", "DF"),
  (_LAYER + r"mlp/(gate|up)/bias", "F"),
  (_LAYER + r"mlp/down/w", "FD"),
  (_LAYER + r"mlp/alpha_[pn]", "-"),
  (_LAYER + r"mlp/router/w", "DE"),
  (_LAYER + r"mlp/router/bias", "-"),
  (_LAYER + r"mlp/experts/(gate|up)/w", "EDF"),
  (_LAYER + r"mlp/experts/(gate|up)/bias", "EF"),
  (_LAYER + r"mlp/experts/down/w", "EFD"),
  (_LAYER + r"(attn/o|mlp/down|mlp/experts/down)/bias", "-"),
  (_LAYER + r"(attn|mlp)(_post)?_norm/(scale|bias)", "-"),
)
"""The last dimensions of every parameter, by letter: N and K are columns of heads, E experts, "-" what no rule set splits.

Vectors as wide as the model stay whole, as do what positions and heads learn: they are small, and every device reads them.
"""


@dataclasses.dataclass(frozen=True)
class RuleSet:
  """Where parameters lie, and what training does beside: as an iterable it is the rules of its parameters.

  stage: of ZeRO, what of training's state is divided over the fsdp axis: 0 nothing but what the rules divide, 1 the optimizer's
  state, 2 gradients too, 3 parameters too.  sequence: between blocks, tokens are divided over the tensor axis.
  """

  parameters: tuple[tuple[str, Spec], ...]
  stage: int = 0
  sequence: bool = False

  def __iter__(self) -> Iterator[tuple[str, Spec]]:
    return iter(self.parameters)

  @property
  def axes(self) -> set[str]:
    """The axes of a mesh that a run with these rules divides its state over."""
    entries = [entry for _, spec in self.parameters for entry in spec if entry is not None]
    named = {axis for entry in entries for axis in ((entry,) if isinstance(entry, str) else entry)}
    return named | ({"fsdp"} if self.stage else set())


def _rules(stage: int = 0, sequence: bool = False, **axes: str) -> RuleSet:
  """The rule set that splits the dimensions of these letters."""
  specs = tuple((path, tuple(axes.get(letter) for letter in letters)) for path, letters in PARAMETERS)
  return RuleSet(specs, stage, sequence)


_TENSOR = dict.fromkeys("VNKF", "tensor")
RULES: dict[str, RuleSet] = {
  "data": _rules(),
  "zero1": _rules(1),
  "zero2": _rules(2),
  "fsdp": _rules(3, D="fsdp"),
  "tensor": _rules(**_TENSOR),
  "sequence": _rules(sequence=True, **_TENSOR),
  "fsdp_tensor": _rules(3, D="fsdp", **_TENSOR),
}
"""Rule sets by name: (regular expression of a path, mesh axis or None of each of its last dimensions), the first match counts.

data: every device has all parameters.  fsdp: the model's width is split, and gathered where it is used.  tensor: heads, the
MLP's hidden width and the vocabulary are split, which takes two sums over the axis a layer.  fsdp_tensor: both.
In training fsdp is ZeRO's stage 3.  zero1, zero2: every device has all parameters, and its part of the optimizer's state, and
with zero2 of the gradients.  sequence: as tensor, but between blocks each device has its part of the tokens, so that norms and
the residual stream are split too, and each of the sums is a reduce-scatter, and an all-gather before the next product.
Source: Rajbhandari et al. (2019), ZeRO, section 5; Shoeybi et al. (2019), Megatron-LM, section 3; Korthikanti et al. (2022),
Reducing Activation Recomputation, section 4.2.2.
"""


_NAMES = dict(D="embed_dim", N="num_heads x head_dim", K="num_kv_heads x head_dim", F="mlp_dim")


@dataclasses.dataclass(frozen=True)
class Place:
  """Where one parameter lies: its logical shape with any padding, and its PartitionSpec over the logical dimensions."""

  shape: tuple[int, ...]
  spec: PartitionSpec


def place(path: str, shape: Sequence[int], mesh: Mesh, rules: Rules, cfg: ModelConfig | None = None) -> Place:
  """Where the parameter of a '/'-joined path and a logical shape lies.

  A spec is aligned to the right end of the shape, so stacked layers have one dimension more.  The vocabulary is padded to a
  multiple of its axes, and k and v stay whole on axes that do not divide num_kv_heads (which takes cfg).  Raises ConfigError
  for an axis that the mesh lacks, and for any other dimension that its axes do not divide: with cfg, heads are never cut.
  With cfg, what of the vocabulary is past cfg.vocab_size is padding of another mesh, and not in the shape.
  """
  spec, ndim = tree.first_match(rules, path), len(shape)
  if len(spec) > ndim:
    raise ConfigError(
      f"{path}: found the shape {tuple(shape)}, expected {len(spec)} dimensions at least, as the rule has {spec}"
    )
  letters, padded = _letters(path, ndim), _unpadded(path, shape, cfg)
  entries = [None] * (ndim - len(spec)) + list(spec)
  for i, entry in enumerate(entries):
    if entry is None:
      continue
    axes = (entry,) if isinstance(entry, str) else entry
    if missing := [axis for axis in axes if axis not in mesh.shape]:
      raise ConfigError(
        f"{path}: the rules split dimension {i} over {missing[0]!r}, which the mesh {spell(mesh)} does not have; "
        f"add {missing[0]}=1 to it, or take other rules, as {default_rules(mesh)}"
      )
    shards = math.prod(mesh.shape[axis] for axis in axes)
    if letters[i] == "V":
      padded[i] = math.ceil(padded[i] / shards) * shards
    elif letters[i] == "K" and cfg is not None and cfg.num_kv_heads % shards:
      entries[i] = None
    else:
      of_heads = letters[i] == "N" and cfg is not None
      size = cfg.num_heads if of_heads else shape[i]
      of_tokens = path in ("embed", "head") and cfg is not None and cfg.embed_width is not None
      name = "num_heads" if of_heads else "embed_width" if of_tokens else _NAMES.get(letters[i], "the size")
      if size % shards:
        hint = "; given cfg, k and v stay whole instead" if letters[i] == "K" else ""
        raise ConfigError(f"{path}: dimension {i}, {_indivisible(name, size, axes, shards)}{hint}")
  return Place(tuple(padded), _spec(entries))


def layout(params: Any, mesh: Mesh, rules: Rules, cfg: ModelConfig | None = None) -> dict[str, Any]:
  """The tree of params (arrays or abstract values) with a jax.ShapeDtypeStruct for each: its padded shape, and its sharding.

  Both are of the array as it is stored: a `leaf.Matrix` holds those of its value, and a `leaf.QTensor` those of its parts, of
  which "value" lies as the weight would, and others too where their own dimensions divide.  Errors are those of `place`, and
  ConfigError for numbers of a `QTensor` in blocks or bytes that the mesh would cut.  Factors of a `leaf.LoRA` lie as the
  dimension that they share with it does.
  """

  def laid_out(path: str, leaf: Any) -> Any:
    at = place(path, leaf.shape, mesh, rules, cfg)
    shape, spec = at.shape, at.spec
    if isinstance(leaf, LoRA):
      sharding = lambda *entries: NamedSharding(mesh, _spec(entries))
      *leading, rows, columns = tuple(spec) + (None,) * (len(shape) - len(spec))
      a, b = _factor_shapes(leaf, shape)
      return dataclasses.replace(
        leaf,
        base=laid_out(path, leaf.base),
        a=jax.ShapeDtypeStruct(a, leaf.a.dtype, sharding=sharding(*leading, rows, None)),
        b=jax.ShapeDtypeStruct(b, leaf.b.dtype, sharding=sharding(*leading, None, columns)),
      )
    if isinstance(leaf, QTensor):
      return _quantized(path, leaf, at, mesh)
    if isinstance(leaf, Matrix):
      entries = tuple(spec) + (None,) * (len(shape) - len(spec))
      shape, spec = _stored(leaf, shape), _spec(_stored(leaf, entries))
    struct = jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
    return dataclasses.replace(leaf, value=struct) if isinstance(leaf, Matrix) else struct

  return tree.unflatten({path: laid_out(path, leaf) for path, leaf in tree.flatten(params).items()})


def shardings(params: Any, mesh: Mesh, rules: Rules, cfg: ModelConfig | None = None) -> dict[str, Any]:
  """The tree of params (arrays or abstract values) with a NamedSharding for each array, for jax.jit and jax.device_put."""
  return jax.tree.map(lambda struct: struct.sharding, layout(params, mesh, rules, cfg))


def shard(params: Any, mesh: Mesh, rules: Rules, cfg: ModelConfig | None = None) -> dict[str, Any]:
  """The parameters on the mesh: NumPy or JAX arrays in, whole in every process, and arrays laid out by the rules out.

  The vocabulary's padding is 0, and never read: the model cuts its logits to cfg.vocab_size.  Errors are those of `place`.
  """
  return jax.tree.map(_put, params, layout(params, mesh, rules, cfg))


def unpad(params: Any, cfg: ModelConfig) -> dict[str, Any]:
  """The parameters with the vocabulary cut back to cfg.vocab_size, as a checkpoint holds them."""

  def cut(path: str, leaf: Any) -> Any:
    shape = tuple(_unpadded(path, leaf.shape, cfg))
    if shape == tuple(leaf.shape):
      return leaf
    if isinstance(leaf, LoRA):
      a, b = map(_cut, (leaf.a, leaf.b), _factor_shapes(leaf, shape))
      return dataclasses.replace(leaf, base=cut(path, leaf.base), a=a, b=b)
    if isinstance(leaf, Matrix):
      return dataclasses.replace(leaf, value=_cut(leaf.value, _stored(leaf, shape)))
    if isinstance(leaf, QTensor):
      return dataclasses.replace(leaf, parts=jax.tree.map(_cut, leaf.parts, _part_shapes(leaf, shape)))
    return _cut(leaf, shape)

  return tree.unflatten({path: cut(path, leaf) for path, leaf in tree.flatten(params).items()})


def bytes_per_device(params: Any, mesh: Mesh, rules: Rules, cfg: ModelConfig | None = None) -> int:
  """sum over parameters of itemsize * prod(padded shape) / prod(sizes of the mesh axes in its spec): what each device holds."""
  structs = jax.tree.leaves(layout(params, mesh, rules, cfg))
  return sum(np.dtype(x.dtype).itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in structs)


def _put(x: Any, target: jax.ShapeDtypeStruct) -> jax.Array:
  """x on target's mesh in target's shape: what is past the end of x is 0."""
  if isinstance(x, jax.Array) and (jax.process_count() == 1 or not x.is_fully_addressable):
    if x.shape != target.shape:
      x = x[tuple(map(slice, target.shape))]
      x = jax.numpy.pad(x, [(0, n - have) for n, have in zip(target.shape, x.shape, strict=True)])
    return jax.device_put(x, target.sharding)
  host = np.asarray(x)

  def read(index: tuple[slice, ...]) -> np.ndarray:
    piece = host[index]  # shorter where the index reaches into the padding
    want = tuple(len(range(*part.indices(n))) for part, n in zip(index, target.shape, strict=True))
    if piece.shape == want:
      return piece
    full = np.zeros(want, host.dtype)
    full[tuple(map(slice, piece.shape))] = piece
    return full

  return jax.make_array_from_callback(target.shape, target.sharding, read)


def _letters(path: str, ndim: int) -> str:
  """The letter of each dimension of a parameter, "-" for those that have none."""
  known = next((letters for pattern, letters in PARAMETERS if re.fullmatch(pattern, path)), "")
  return known[len(known) - ndim :] if len(known) > ndim else known.rjust(ndim, "-")


def _unpadded(path: str, shape: Sequence[int], cfg: ModelConfig | None) -> list[int]:
  """The shape of a parameter without padding of the vocabulary, where cfg says how large that is."""
  if cfg is None:
    return list(shape)
  sizes = [
    cfg.vocab_size if letter == "V" else n
    for n, letter in zip(shape, _letters(path, len(shape)), strict=True)
  ]
  if any(size > n for size, n in zip(sizes, shape, strict=True)):
    raise ConfigError(
      f"{path}: found the shape {tuple(shape)}, expected {tuple(sizes)}, as vocab_size is {cfg.vocab_size}"
    )
  return sizes


def _stored(leaf: Matrix | QTensor, dims: Sequence[Any]) -> tuple:
  """The dimensions of the value that holds a matrix, from those of the matrix."""
  as_it_is = leaf.table if isinstance(leaf, QTensor) else leaf.stored == "io"
  return tuple(dims) if as_it_is else (*dims[:-2], dims[-1], dims[-2])


def _quantized(path: str, leaf: QTensor, at: Place, mesh: Mesh) -> QTensor:
  """Where the parts of a quantized weight lie, from where the weight would."""
  entries = _stored(leaf, tuple(at.spec) + (None,) * (len(at.shape) - len(at.spec)))

  def laid_out(name: str, part: Any, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    spec = []
    for size, entry in zip(shape, entries, strict=True):
      axes = () if entry is None else (entry,) if isinstance(entry, str) else entry
      shards = math.prod(mesh.shape[axis] for axis in axes)
      if size % shards and name == "value":
        raise ConfigError(
          f"{path}: found {size} blocks or bytes of {leaf.scheme} in a dimension, expected a multiple of {shards}, the size of "
          f"{', '.join(axes)} on the mesh; take a smaller axis, or leave the weight out of quant.apply by a rule"
        )
      spec.append(None if size % shards else entry)
    return jax.ShapeDtypeStruct(shape, part.dtype, sharding=NamedSharding(mesh, _spec(spec)))

  shapes = _part_shapes(leaf, at.shape)
  parts = {name: laid_out(name, part, shapes[name]) for name, part in leaf.parts.items()}
  return dataclasses.replace(leaf, parts=parts)


def _part_shapes(leaf: QTensor, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
  """The shapes of the parts of a quantized weight that is padded or cut to a shape."""
  sizes = list(zip(_stored(leaf, leaf.shape), _stored(leaf, shape), strict=True))
  return {
    name: tuple(
      have if have == 1 else have * size // old for have, (old, size) in zip(part.shape, sizes, strict=True)
    )
    for name, part in leaf.parts.items()
  }


def _factor_shapes(leaf: LoRA, shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """The shapes of the factors of a weight that is padded or cut to a shape [..., in, out]."""
  return (*shape[:-1], leaf.a.shape[-1]), (*shape[:-2], leaf.b.shape[-2], shape[-1])


def _cut(x: Any, shape: tuple[int, ...]) -> Any:
  return x[tuple(map(slice, shape))]


def _spec(entries: Sequence[Any]) -> PartitionSpec:
  """Without the None at its end, so that equal layouts have equal specs."""
  entries = list(entries)
  while entries and entries[-1] is None:
    entries.pop()
  return PartitionSpec(*entries)


def _indivisible(name: str, size: int, axes: Sequence[str], shards: int) -> str:
  near = max(1, math.floor(size / shards + 0.5)) * shards
  most = math.gcd(size, shards)  # of these devices the rest can then be copies
  over = " x ".join(axes)
  return (
    f"found {name} = {size} over {over} = {shards}, which does not divide it; the nearest {name} that it divides is {near}, "
    f"and {over} = {most} divides {size}"
  )
