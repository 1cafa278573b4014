"""What one model family of Hugging Face's is: its config.json as a ModelConfig both ways, and the names of its tensors.

A family is settings and names only; everything that reads or writes files is shared by all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jaxllm.config import ModelConfig
from jaxllm.hf.settings import Settings
from jaxllm.position import Rope


@dataclasses.dataclass(frozen=True)
class Whole:
  """A tensor that is one parameter."""

  def split(self, x: np.ndarray, cfg: ModelConfig, axis: int) -> Sequence[np.ndarray]:
    """The parameters that a stored tensor holds, in the order of `Key.ours`: views of it where NumPy can have them."""
    return (x,)

  def join(self, parts: Sequence[np.ndarray], cfg: ModelConfig, axis: int) -> np.ndarray:
    """The inverse of `split`."""
    return parts[0]


@dataclasses.dataclass(frozen=True)
class Blocks(Whole):
  """Parameters one after the other along the output axis, `sizes(cfg)` long: Phi-3's [q; k; v] and [gate; up], MPT, GPT-2."""

  sizes: Callable[[ModelConfig], Sequence[int]]

  def split(self, x, cfg, axis):
    return np.split(x, np.cumsum(self.sizes(cfg))[:-1], axis)

  def join(self, parts, cfg, axis):
    return np.concatenate(parts, axis)


@dataclasses.dataclass(frozen=True)
class Grouped(Whole):
  """q, k and v a key/value head at a time: [K, G + 2, H] rows, of which G are queries, then one key, one value.

  With G = 1 it is BLOOM's and GPT-NeoX's [N, 3, H]; Falcon-40B has more queries, Falcon-7B one group.
  """

  def split(self, x, cfg, axis):
    x = np.moveaxis(x, axis, 0)
    rest = x.shape[1:]
    groups = x.reshape(cfg.num_kv_heads, -1, cfg.head_dim, *rest)
    parts = groups[:, :-2], groups[:, -2], groups[:, -1]
    return [np.moveaxis(part.reshape(-1, *rest), 0, axis) for part in parts]

  def join(self, parts, cfg, axis):
    moved = [np.moveaxis(part, axis, 0) for part in parts]
    rest = moved[0].shape[1:]
    heads = [part.reshape(cfg.num_kv_heads, -1, cfg.head_dim, *rest) for part in moved]
    return np.moveaxis(np.concatenate(heads, axis=1).reshape(-1, *rest), 0, axis)


@dataclasses.dataclass(frozen=True)
class Interleaved(Whole):
  """Two parameters in turn along the output axis: GPT-OSS's gate and up, in the even and the odd columns."""

  def split(self, x, cfg, axis):
    x = np.moveaxis(x, axis, 0)
    return [np.moveaxis(x[i::2], 0, axis) for i in range(2)]

  def join(self, parts, cfg, axis):
    first, second = (np.moveaxis(part, axis, 0) for part in parts)
    both = np.stack([first, second], axis=1).reshape(-1, *first.shape[1:])
    return np.moveaxis(both, 0, axis)


@dataclasses.dataclass(frozen=True)
class Key:
  """One tensor of the files and the parameters it holds.

  theirs: its name, with {i} for the number of the layer (a key with {i} stands for one a layer).  ours: paths of parameters,
  with {i} too.  stored: "oi" for a matrix [..., out, in] (torch's Linear), "io" for [..., in, out] (GPT-2's Conv1D), None for
  what is taken as it is (vectors, embeddings).  layout: how several parameters share the tensor, along its output axis, which
  of vectors is their last one.  stack: for parameters [stack, ...] of which the files have each slice as a tensor of its own,
  with {j} in its name (experts); 0 for all others.  part: of such a key, which slice it is.  dtype: the type of a tensor
  that is a part of a quantized parameter; None for all others, which may have any that parameters have.
  """

  theirs: str
  ours: tuple[str, ...]
  stored: Literal["oi", "io"] | None = None
  layout: Whole = Whole()
  stack: int = 0
  part: int | None = None
  dtype: np.dtype | None = None

  def axis(self, ndim: int) -> int:
    """The output axis of the stored tensor, which has `ndim`."""
    return ndim - (2 if self.stored == "oi" else 1)

  def numbered(self, letter: str, number: int, **fields: Any) -> Key:
    """The key with a number for {letter} in its names."""
    name = lambda text: text.replace(f"{{{letter}}}", str(number))
    return dataclasses.replace(self, theirs=name(self.theirs), ours=tuple(map(name, self.ours)), **fields)

  def to_stored(self, x: Any) -> Any:
    """A parameter [..., in, out], or an array like it, as files have it; its own inverse."""
    return x.swapaxes(-1, -2) if self.stored == "oi" else x


def linear(
  cfg: ModelConfig, theirs: str, *ours: str, stored: Literal["oi", "io"] = "oi", layout: Whole = Whole()
) -> list[Key]:
  """The keys of a matrix of theirs, and of its bias where cfg.biases has ours: one of our modules, or several by `layout`."""
  keys = [Key(f"{theirs}.weight", tuple(f"{path}/w" for path in ours), stored, layout)]
  if ours[0].rpartition("/")[2] in cfg.biases:
    keys.append(Key(f"{theirs}.bias", tuple(f"{path}/bias" for path in ours), None, layout))
  return keys


def linears(cfg: ModelConfig, at: str, names: Mapping[str, str]) -> list[Key]:
  """The keys of a block's matrices, one of ours a matrix of theirs: {"attn/q": "self_attn.q_proj"}."""
  return [key for ours, theirs in names.items() for key in linear(cfg, at + theirs, f"layers/{{i}}/{ours}")]


def lm_head(cfg: ModelConfig, theirs: str = "lm_head") -> list[Key]:
  """The keys of the head: its matrix where it is not the embedding, and its bias if it has one."""
  keys = [] if cfg.tie_embeddings else [Key(f"{theirs}.weight", ("head",), "oi")]
  return keys + ([Key(f"{theirs}.bias", ("head_bias",))] if "head" in cfg.biases else [])


def norm(kind: Any, theirs: str, ours: str) -> list[Key]:
  """The keys of a normalisation's weight and bias, as far as it has them."""
  names = {"scale": "weight", "bias": "bias"}
  return [Key(f"{theirs}.{names[name]}", (f"{ours}/{name}",)) for name in kind.params(1)]


def qk_norms(cfg: ModelConfig, at: str, names: Mapping[str, str]) -> list[Key]:
  """The keys of the norms of queries and keys, if there are any, {"q": theirs}: with {j} in theirs, a tensor a head."""
  heads, out = {"q": cfg.num_heads, "k": cfg.num_kv_heads}, []
  for name, theirs in names.items() if cfg.qk_norm is not None else ():
    keys = norm(cfg.qk_norm.norm, at + theirs, f"layers/{{i}}/attn/{name}_norm")
    out += [dataclasses.replace(key, stack=heads[name] if "{j}" in theirs else 0) for key in keys]
  return out


@dataclasses.dataclass(frozen=True)
class Share:
  """How tensor-parallel ranks share a tensor: equal parts along `axis`, of each of `blocks` that follow one another there.

  A rank's part of a fused [x1; x2] is [its x1; its x2]: two blocks.
  """

  axis: int
  blocks: int = 1


@dataclasses.dataclass(frozen=True)
class Family:
  """A row of FAMILIES.

  model_type, architecture: as in config.json.  read: a ModelConfig from the settings, every one of which it takes or the
  family ignores (`ignored`, besides settings.IGNORED), but for those that all families have (`families.read_config`).  write:
  the family's settings of a ModelConfig; what it does not say the reading refuses, as `write_config` reads back what it
  writes.  keys: all tensors of a model.  tied, eos: tie_word_embeddings and eos_token_id where config.json has none; a tuple of
  eos is where it is null, too.  constants: the names of tensors that hold a number of the config, and that number: files may
  lack them, but have no other.  ropes: RoPEs that this family alone has.
  prefix: what the names of `keys` start with and files of the bare model leave out.  unused: regular expressions of
  tensors that hold no parameters (masks, inverse frequencies).

  name: what FAMILIES calls it, model_type unless another family has the same one; fits: whether settings are of it and not of
  a later one of that model_type.  remote: transformers has no such family, and opens it with its authors' code only, if at
  all: it is written where it is asked for by name.  also: other architectures that are the same model.  ranks: the tensors of
  a family whose files may be those of tensor-parallel ranks, and how these share them, by regular expressions.
  """

  model_type: str
  architecture: str
  read: Callable[[Settings], ModelConfig]
  write: Callable[[ModelConfig], dict[str, Any]]
  keys: Callable[[ModelConfig], list[Key]]
  tied: bool = False
  eos: int | tuple[int, ...] | None = None
  prefix: str = "model."
  ignored: tuple[str, ...] = ()
  unused: tuple[str, ...] = ()
  constants: Callable[[ModelConfig], dict[str, float]] = lambda cfg: {}
  ropes: tuple[type[Rope], ...] = ()
  name: str = ""
  fits: Callable[[Settings], bool] = lambda s: True
  remote: bool = False
  also: tuple[str, ...] = ()
  ranks: tuple[tuple[str, Share], ...] = ()

  def __post_init__(self):
    object.__setattr__(self, "name", self.name or self.model_type)
