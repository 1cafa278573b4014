"""A model as a directory that transformers opens: config.json, safetensors, tokenizer files; whole, or not there."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxllm import tree
from jaxllm.config import ModelConfig
from jaxllm.errors import CheckpointError, ConfigError, TokenizerError
from jaxllm.hf import families, files, header, quantized, scan, sums
from jaxllm.hf.family import Family, Key
from jaxllm.hf.match import all_constants, all_keys, stored_shape
from jaxllm.hf.tokenizer import FILES, Tokenizer
from jaxllm.leaf import LoRA, Matrix, QTensor, dense
from jaxllm.nn.shapes import expected_shapes
from jaxllm.parallel.rules import unpad

MAX_SHARD_BYTES = 5_000_000_000
"""As large as the files of transformers were for years; every reader takes it."""
_SHARD = re.compile(r"model(-[0-9]{5}-of-[0-9]{5})?\.safetensors(\.index\.json)?")
_NAMES = {dtype: name for name, dtype in header.DTYPES.items()}
_log = logging.getLogger(__name__)
_VOCABULARY = {"embed": 0, "head": 1, "head_bias": 0}
"""The axis of the vocabulary, which may be padded for a mesh."""


@dataclasses.dataclass(frozen=True)
class Entry:
  """A tensor to be written; `read` gives its values, in memory of their own."""

  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  read: Callable[[], np.ndarray]

  @property
  def nbytes(self) -> int:
    """Its bytes in the file."""
    return math.prod(self.shape) * self.dtype.itemsize


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
      _write(Path(path), shards, texts, stale)
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
  return sum(len(_header(each)) + sum(entry.nbytes for entry in each) for each in shards.values())


def _planned(
  family: Family, cfg: ModelConfig, params: Mapping[str, Any], most: int
) -> tuple[dict[str, list[Entry]], dict[str, Any]]:
  """(the tensors of each file of weights, what config.json says of quantized ones)."""
  entries = _entries(all_keys(family, cfg), cfg, params)
  quantization = quantized.write(tree.flatten(params))
  entries += [_constant(*one, cfg) for one in all_constants(family, cfg).items()]
  return _shards(entries, most), quantization


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
    values, types = leaf.parts.values(), _NAMES
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


def _shards(entries: Sequence[Entry], most: int) -> dict[str, list[Entry]]:
  """{file name: its tensors}: as many to a file as fit; inside a file wider types first, as they are written."""
  shards: list[list[Entry]] = [[]]
  room = most
  for entry in entries:
    if shards[-1] and entry.nbytes > room:
      shards.append([])
      room = most
    shards[-1].append(entry)
    room -= entry.nbytes
  ordered = [sorted(shard, key=lambda entry: (-entry.dtype.itemsize, entry.name)) for shard in shards]
  if len(ordered) == 1:
    return {files.SINGLE: ordered[0]}
  return {f"model-{i:05}-of-{len(ordered):05}.safetensors": shard for i, shard in enumerate(ordered, 1)}


def _write(
  directory: Path, shards: Mapping[str, Sequence[Entry]], texts: Mapping[str, bytes], stale: Sequence[str]
) -> None:
  names = [sums.NAME, *shards, *texts]
  pieces = {name: _safetensors(entries) for name, entries in shards.items()}
  pieces |= {name: [data] for name, data in texts.items()}
  with _locked(directory):
    _check_targets(directory, names)
    kept = sorted(name for name in FILES if not stale and os.path.lexists(directory / name))
    if kept:
      _log.warning(
        "%s: keeps %s, which are not of this save: no tokenizer was given", directory, ", ".join(kept)
      )
    begun = False
    try:
      digests = {name: _write_file(_temporary(directory, name), each) for name, each in pieces.items()}
      _write_file(_temporary(directory, sums.NAME), [sums.text(digests)])
      begun = True
      (directory / files.CONFIG).unlink(missing_ok=True)
      _sync(directory)
      for name in names[:-1]:
        os.replace(_temporary(directory, name), directory / name)
      for old in directory.iterdir():
        name = old.name.removeprefix(".").removesuffix(".tmp")  # of a save before that was killed, too
        if old.name not in names and (_SHARD.fullmatch(name) or name in (*stale, files.GENERATION_CONFIG)):
          old.unlink()
      _sync(directory)
      os.replace(_temporary(directory, files.CONFIG), directory / files.CONFIG)  # the last
      _sync(directory)
    except BaseException:
      if begun:
        _log.error(
          "%s: the save was interrupted while its files got their names; those that have not are complete under .<name>.tmp: "
          "rename them, %s the last, or save again",
          *(directory, files.CONFIG),
        )
      else:
        for name in names:
          _temporary(directory, name).unlink(missing_ok=True)
      raise


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
  """The directory, made where it is missing, is this save's alone; a file system without locks has none."""
  try:
    directory.mkdir(parents=True, exist_ok=True)
  except (FileExistsError, NotADirectoryError):
    raise CheckpointError(
      f"{directory}: a file, or in one, expected a directory to write to; give another"
    ) from None
  fd = os.open(directory, os.O_RDONLY)
  try:
    try:
      fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise CheckpointError(
        f"{directory}: another save is writing to it; wait for its end, or give another"
      ) from None
    except OSError as e:
      _log.info("%s: no lock (%s); two saves at once would be in each other's way", directory, e)
    yield
  finally:
    os.close(fd)


def _check_targets(directory: Path, names: Collection[str]) -> None:
  """Raises CheckpointError for a directory under the name of a file that is to be written, or of an older one to be removed."""
  for path in directory.iterdir():
    if (path.name in names or _SHARD.fullmatch(path.name)) and path.is_dir():
      raise CheckpointError(f"{path}: found a directory, expected a file or nothing; remove it")


def _temporary(directory: Path, name: str) -> Path:
  return directory / f".{name}.tmp"


def _header(entries: Sequence[Entry]) -> bytes:
  """What a safetensors file begins with, as long as a multiple of 64 bytes."""
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
  place = 0
  for entry in entries:
    offsets = [place, place + entry.nbytes]
    header[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
    place += entry.nbytes
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-(len(text) + 8) % scan.ALIGNMENT)
  return len(text).to_bytes(8, "little") + text


def _safetensors(entries: Sequence[Entry]) -> Iterator[bytes | memoryview]:
  """The pieces of a safetensors file."""
  yield _header(entries)
  for entry in entries:
    x = entry.read()
    assert (x.shape, x.dtype) == (entry.shape, entry.dtype), f"{entry.name}: {x.dtype} {x.shape}"
    yield x.reshape(-1).view(np.uint8).data


def _write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> str:
  """The SHA-256 of what was written, which is taken while it is written, into a new file: never through a link."""
  state = hashlib.sha256()
  path.unlink(missing_ok=True)
  with open(path, "xb") as file, concurrent.futures.ThreadPoolExecutor(1) as thread:
    for piece in pieces:
      hashed = thread.submit(state.update, piece)
      file.write(piece)
      hashed.result()
    file.flush()
    os.fsync(file.fileno())
  return state.hexdigest()


def _sync(directory: Path) -> None:
  """Waits until the names in it are on disk."""
  fd = os.open(directory, os.O_RDONLY)
  try:
    os.fsync(fd)
  finally:
    os.close(fd)


def _json(plain: Mapping[str, Any]) -> bytes:
  return (json.dumps(plain, indent=2, allow_nan=False) + "\n").encode()
