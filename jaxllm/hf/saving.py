"""A model as a directory that transformers opens: config.json, safetensors, tokenizer files; whole, or not there."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxllm import tree
from jaxllm.config import ModelConfig
from jaxllm.errors import CheckpointError, ConfigError, TokenizerError
from jaxllm.hf import families, files, header, quantized, scan, writing
from jaxllm.hf.family import Family, Key
from jaxllm.hf.match import all_constants, all_keys, stored_shape
from jaxllm.hf.tokenizer import FILES, Tokenizer
from jaxllm.hf.writing import Entry
from jaxllm.leaf import LoRA, Matrix, QTensor, dense
from jaxllm.nn.shapes import expected_shapes
from jaxllm.parallel.rules import unpad

MAX_SHARD_BYTES = 5_000_000_000
"""As large as the files of transformers were for years; every reader takes it."""
_VOCABULARY = {"embed": 0, "head": 1, "head_bias": 0}
"""The axis of the vocabulary, which may be padded for a mesh."""


def save(
  path: str | os.PathLike,
  cfg: ModelConfig,
  params: Mapping[str, Any],
  tokenizer: Tokenizer | None = None,
  *,
  family: str | None = None,
  pinned: bool = False,
  max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
  """Writes the directory `path`, which `load` and transformers read as the same model, bit for bit.

  A family of remote code (baichuan, chatglm) is written where it is named; transformers opens it once its authors' code lies
  there too, and config.json names that as auto_map.

  config.json has the settings in force, those of RoPE included; family: see `families.write_config`.  Where frequencies depend
  on the length (LongRoPE, dynamic NTK) a save needs pinned=True: each query here has those of its own length, and transformers
  those of one length for a whole call, so that its decoding is not that of this model.  Tensors keep their types, a padded
  vocabulary is cut, and files hold up to max_shard_bytes.  Quantized weights are written as they are (`hf.quantized` says
  how), and then only `load` reads the directory: transformers refuses it.

  All is written under other names first; config.json, without which nothing reads the directory, is taken away before the
  rest is renamed, and comes last.  A save that is interrupted so leaves what was there, or nothing that loads and all that was
  written, under the other names.  SHA256SUMS has the sums of them all, for `load` and `sha256sum -c`.  Tokenizer files of a
  save before stay where none is given, and the log says so.  Of several processes all call it, the first one writes, and where
  one fails all do.

  Raises ConfigError for a model that transformers does not have, CheckpointError for parameters that are not cfg's or are NaN
  or infinite and for what cannot be such a directory, TokenizerError for what is no tokenizer or has a vocabulary larger than
  the embedding, OSError where the disk refuses.
  """
  row, plain = families.write_config(cfg, family=family, pinned=pinned)
  if max_shard_bytes < 1:
    raise ConfigError(f"max_shard_bytes: found {max_shard_bytes}, expected at least 1")
  if tokenizer is not None:
    if not isinstance(tokenizer, Tokenizer):
      raise TokenizerError(
        f"tokenizer: found {type(tokenizer).__name__}, expected what hf.load_tokenizer gives, or None"
      )
    tokenizer.check_fits(cfg.vocab_size, "the model")
  save_tensors(path, row, plain, cfg, params, tokenizer, max_shard_bytes)


def save_tensors(
  path: str | os.PathLike,
  family: Family,
  plain: Mapping[str, Any],
  cfg: ModelConfig,
  params: Mapping[str, Any],
  tokenizer: Tokenizer | None = None,
  max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
  """`save` with the family and the config.json given."""
  shards, quantization = _planned(family, cfg, params, max_shard_bytes)
  plain = {**plain, **quantization}
  texts = tokenizer.contents() if tokenizer is not None else {}
  stale = FILES if tokenizer is not None else ()
  if cfg.eos_ids:
    ids = list(cfg.eos_ids)
    texts[files.GENERATION_CONFIG] = _json({"eos_token_id": ids[0] if len(ids) == 1 else ids})
  if len(shards) > 1:
    total = sum(entry.nbytes for entries in shards.values() for entry in entries)
    where = {entry.name: name for name, entries in shards.items() for entry in entries}
    texts[files.INDEX] = _json({"metadata": {"total_size": total}, "weight_map": where})
  texts[files.CONFIG] = _json(plain)
  begun: set[str] = set()  # a shard is of several processes: each has to read all, whatever happens to one
  shards = {name: [_noted(entry, begun) for entry in entries] for name, entries in shards.items()}
  failed = None
  try:
    if jax.process_index() == 0:
      writing.write(Path(path), shards, texts, stale)
  except Exception as e:
    failed = e
  if jax.process_count() > 1:
    for entry in (entry for entries in shards.values() for entry in entries if entry.name not in begun):
      try:
        entry.read()
      except Exception as e:
        failed = failed or e
    others = multihost_utils.process_allgather(np.array(failed is not None))
    if failed is None and others.any():
      failed = CheckpointError(
        f"{path}: process {others.argmax()} could not save its part, and says why; nothing was saved"
      )
  if failed is not None:
    raise failed


def weight_bytes(
  cfg: ModelConfig,
  params: Mapping[str, Any],
  *,
  family: str | None = None,
  max_shard_bytes: int = MAX_SHARD_BYTES,
) -> int:
  """The bytes of the safetensors files that `save` would write, headers included; nothing is written, and no value is read.

  Raises as `save` does for what it would refuse but NaN and infinity.
  """
  row, _ = families.write_config(cfg, family=family, pinned=True)
  shards, _ = _planned(row, cfg, params, max_shard_bytes)
  return sum(len(writing.header_of(each)) + sum(entry.nbytes for entry in each) for each in shards.values())


def _planned(
  family: Family, cfg: ModelConfig, params: Mapping[str, Any], most: int
) -> tuple[dict[str, list[Entry]], dict[str, Any]]:
  """(the tensors of each file of weights, what config.json says of quantized ones)."""
  entries = _entries(all_keys(family, cfg), cfg, params)
  quantization = quantized.write(tree.flatten(params))
  entries += [_constant(*one, cfg) for one in all_constants(family, cfg).items()]
  return writing.shards_of(entries, most), quantization


def _noted(entry: Entry, begun: set[str]) -> Entry:
  """The entry, whose first read puts its name into `begun`."""

  def read() -> np.ndarray:
    begun.add(entry.name)
    return entry.read()

  return dataclasses.replace(entry, read=read)


def _entries(keys: Sequence[Key], cfg: ModelConfig, params: Mapping[str, Any]) -> list[Entry]:
  """The tensors of the parameters, once these are the model's."""
  flat, shapes = tree.flatten(params), expected_shapes(cfg)
  if "blocks" in params:
    raise CheckpointError(
      "params: found stacked layers, expected layers/<i>/...; give tree.unstack_layers(params)"
    )
  if lora := [path for path, leaf in flat.items() if isinstance(leaf, LoRA)]:
    raise CheckpointError(
      f"params: {lora[0]}: found a weight with LoRA, expected one without; give train.lora.merge(params), or "
      "unmerge(params), and keep the adapters beside it"
    )
  odd = [f"{path}: {type(leaf).__name__}" for path, leaf in flat.items() if not _is_writable(leaf)]
  if odd:
    raise CheckpointError(
      f"params: not arrays of {', '.join(map(str, scan.INFINITIES))}\n  {files.shown(odd)}"
    )
  wanted = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()}
  found = {path: jax.ShapeDtypeStruct(_cut(path, leaf.shape, cfg), leaf.dtype) for path, leaf in flat.items()}
  tree.check_same(wanted, found, "params", dtypes=False)
  held = {path: leaf for path, leaf in flat.items() if isinstance(leaf, QTensor)}
  if held:
    held = tree.flatten(unpad(tree.unflatten(held), cfg))
    for path, leaf in held.items():
      quantized.check(path, leaf, shapes[path])
    keys, shapes = quantized.opened_keys(keys, held), quantized.opened_shapes(shapes, held)
    flat = quantized.opened(flat | held)
  entries = []
  for key in keys:
    leaves = [flat[path] for path in key.ours]
    kinds = {np.dtype(leaf.dtype) for leaf in leaves}
    if len(kinds) > 1:
      raise CheckpointError(
        f"params: {', '.join(key.ours)} are {', '.join(sorted(map(str, kinds)))}, expected one type, as they are one tensor, "
        f"{key.theirs}"
      )
    read = lambda key=key, leaves=leaves: _tensor(key, leaves, cfg)
    entries.append(Entry(key.theirs, *kinds, stored_shape(key, shapes), read))
  return entries


def _constant(name: str, value: float, cfg: ModelConfig) -> Entry:
  """A number of the config as a tensor, of the type that it computes in."""
  array = np.asarray(value, cfg.dtype)
  return Entry(name, array.dtype, (), lambda: array)


def _is_writable(leaf: Any) -> bool:
  """Whether it is an array or a Matrix of a type that parameters have, or quantized, in types that files have."""
  values, types = [leaf.value if isinstance(leaf, Matrix) else leaf], scan.INFINITIES
  if isinstance(leaf, QTensor):
    values, types = leaf.parts.values(), header.DTYPES.values()
  return all(isinstance(x, (jax.Array, np.ndarray)) and np.dtype(x.dtype) in types for x in values)


def _cut(path: str, shape: tuple[int, ...], cfg: ModelConfig) -> tuple[int, ...]:
  """The shape without the padding of a vocabulary."""
  axis = _VOCABULARY.get(path)
  return tuple(min(size, cfg.vocab_size) if i == axis else size for i, size in enumerate(shape))


def _tensor(key: Key, leaves: Sequence[Any], cfg: ModelConfig) -> np.ndarray:
  """The values of one tensor of the files."""
  parts = []
  for path, leaf in zip(key.ours, leaves, strict=True):
    matrix = _host(leaf, key.part)
    if key.part is None:
      matrix = matrix[tuple(map(slice, _cut(path, leaf.shape, cfg)))]
    part, largest = scan.copy(key.to_stored(matrix), np.dtype(leaf.dtype))
    if not math.isfinite(largest):
      raise CheckpointError(
        f"params: {path}: {scan.explain(matrix, matrix.dtype)}; such a checkpoint could not be loaded again"
      )
    parts.append(part)
  return np.ascontiguousarray(key.layout.join(parts, cfg, key.axis(parts[0].ndim)))


def _host(leaf: Any, part: int | None) -> np.ndarray:
  """The logical array, or a slice of it, in the memory of this process; a view of it where it is there already."""
  value = leaf.value if isinstance(leaf, Matrix) else leaf
  value = value if part is None else value[part]
  if isinstance(value, jax.Array) and not value.is_fully_addressable:
    value = multihost_utils.process_allgather(value, tiled=True)
  return dense(
    dataclasses.replace(leaf, value=np.asarray(value)) if isinstance(leaf, Matrix) else np.asarray(value)
  )


def _json(plain: Mapping[str, Any]) -> bytes:
  return (json.dumps(plain, indent=2, allow_nan=False) + "\n").encode()
