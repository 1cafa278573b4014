"""A Hugging Face checkpoint as (ModelConfig, parameters): from mapped files straight into the arrays of the model."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from jaxllm import tree
from jaxllm.config import DTYPES, ModelConfig
from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.hf import families, files, hub, quantized, ranks, scan, sizes, sums
from jaxllm.hf.family import Family, Key
from jaxllm.hf.header import Stored
from jaxllm.hf.match import Matched, Source, check_constants, check_heads, match
from jaxllm.hf.plain import SETTINGS_LIMIT, plain_file, read_json
from jaxllm.hf.settings import TOKENS, Settings
from jaxllm.leaf import Matrix, QTensor
from jaxllm.parallel.mesh import default_rules
from jaxllm.parallel.rules import RULES, Rules, layout

THREADS = 8
"""At most; NumPy copies without holding the interpreter's lock, and two or three threads take all the memory can give."""

SETTINGS = (files.CONFIG, files.GENERATION_CONFIG)
LARGE = 1e4
"""Weights beyond it are said: no model trained well has them."""

_log = logging.getLogger(__name__)


def load(
  path_or_repo: str | os.PathLike,
  dtype: str = "auto",
  mesh: Mesh | None = None,
  rules: Rules | None = None,
  rope_precision: str = "exact",
  verify: bool = True,
) -> tuple[ModelConfig, dict[str, Any]]:
  """(cfg, params) of a checkpoint: a directory, or "owner/name" (and @revision) of the Hugging Face Hub.

  dtype: "auto" keeps each parameter in the type it is stored in, and computes in the type config.json names, or else in that of
  the files; "float32", "bfloat16" or "float16" is both.  mesh, rules: every shard is read straight onto its device; rules are
  by default those of `parallel.RULES` that use all axes of the mesh.  rope_precision: see `ModelConfig`.  verify: compare all
  files with their SHA-256 while they are read, where `sums.of` finds any, as `save` writes them; else the log says that nothing
  was verified.

  Matrices stay [out, in] as `leaf.Matrix` where `matrix_layout` says so, and weights that `save` wrote quantized are the same
  `leaf.QTensor` again, whatever dtype is.  Raises CheckpointError for files that are damaged,
  that do not fit config.json, or with values that are NaN or infinite; ConfigError for what no model here can be.  A matrix
  of zeros only, and values beyond 10,000, are a warning that names the tensors.
  """
  opened = open_checkpoint(path_or_repo, dtype, rope_precision, verify)
  return opened.cfg, opened.params(mesh, rules)


@dataclasses.dataclass(frozen=True)
class Opened:
  """A checkpoint whose settings and headers are read, and fit each other, and whose weights are not read.

  cast: the type that parameters get, None: each its own.  kept: the sums of its files that are to be checked; those of
  its settings were.
  """

  checkpoint: files.Checkpoint
  family: Family
  cfg: ModelConfig
  source: Source
  matched: Matched
  cast: str | None
  kept: sums.Sums

  def params(self, mesh: Mesh | None = None, rules: Rules | None = None) -> dict[str, Any]:
    """The parameters, as `load` gives them."""
    weights = {name for name in self.checkpoint.read_files if name.endswith(files.WEIGHTS)}
    with self.kept.checking(weights):
      params = load_params(
        self.checkpoint, self.family, self.cfg, self.source, self.cast, mesh, rules, self.matched
      )
    verified = sorted(weights & self.kept.digests.keys())
    _log.info(
      "%s: %s",
      self.checkpoint.directory,
      f"{len(verified)} of {len(weights)} files of weights have the sums that were kept of them"
      if verified
      else f"the files were not verified, as there is no {sums.NAME} beside them, or verify=False was given",
    )
    return params


def open_checkpoint(
  path_or_repo: str | os.PathLike, dtype: str = "auto", rope_precision: str = "exact", verify: bool = True
) -> Opened:
  """What `load` would load, as far as settings and headers tell; raises as it does, for all but weights."""
  if dtype not in ("auto", *DTYPES):
    raise ConfigError(f"dtype: found {dtype!r}, expected one of auto, {', '.join(DTYPES)}")
  directory = hub.find(path_or_repo)
  kept = sums.of(directory) if verify else sums.Sums(directory)
  kept.check({name for name in kept.digests if not name.endswith(files.WEIGHTS)})
  try:
    family, cfg, source = load_config(directory)
    checkpoint = ranks.open_files(directory, family)
    kept.require(
      checkpoint.read_files | {path.name for path in (directory / one for one in SETTINGS) if path.exists()}
    )
    compute = dtype if dtype != "auto" else _compute_type(cfg, source, checkpoint)
    cfg = dataclasses.replace(cfg, dtype=compute, rope_precision=rope_precision)
    matched = match(checkpoint, family, cfg, source)
  except CheckpointError:
    kept.check()  # a file that has changed is why the rest does not fit
    raise
  return Opened(checkpoint, family, cfg, source, matched, None if dtype == "auto" else dtype, kept)


def load_config(directory: Path) -> tuple[Family, ModelConfig, Source]:
  """The family and the config of a model directory, with the eos ids of its generation_config.json, and what was read."""
  if not os.path.lexists(directory / files.CONFIG):
    raise CheckpointError(
      f"{directory}: no {files.CONFIG}; give the directory that a model was saved to (a save that was interrupted leaves none)"
    )
  path = plain_file(directory, files.CONFIG)
  plain = read_json(path, ConfigError, SETTINGS_LIMIT)
  read = lambda plain: families.read_config(plain, str(path))
  family, cfg = read(plain)
  if (problem := sizes.problem(cfg, None)) is not None:
    raise ConfigError(f"{path}: {problem}; mend it, or fetch the file again")
  if code := [name for name in ("auto_map", "trust_remote_code") if plain.get(name)]:
    _log.warning(
      "%s: names code of its own (%s), which is never run: the model is the family %s",
      *(path, ", ".join(code), family.name),
    )
  if os.path.lexists(directory / files.GENERATION_CONFIG):
    generation = plain_file(directory, files.GENERATION_CONFIG)
    found = Settings(read_json(generation, ConfigError, SETTINGS_LIMIT), str(generation)).take(
      "eos_token_id", TOKENS, None
    )
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if ids := [one for one in ids if 0 <= one < cfg.vocab_size]:
      cfg = dataclasses.replace(cfg, eos_ids=tuple(ids))
  return family, cfg, Source(str(path), plain, lambda plain: read(plain)[1])


def load_params(
  checkpoint: files.Checkpoint,
  family: Family,
  cfg: ModelConfig,
  source: Source,
  dtype: str | None = None,
  mesh: Mesh | None = None,
  rules: Rules | None = None,
  matched: Matched | None = None,
) -> dict[str, Any]:
  """The parameters of a model of `cfg`, in the type `dtype` (None: each in the type of its tensor); as `load` says.

  matched: what `match` found, where it was asked.
  """
  matched = match(checkpoint, family, cfg, source) if matched is None else matched
  check_heads(checkpoint, matched, source)
  check_constants(checkpoint, matched, source)
  found, held = matched.found, matched.held
  shapes = quantized.opened_shapes(matched.shapes, held)
  platform = jax.devices()[0].platform if mesh is None else mesh.devices.flat[0].platform
  targets = {}
  for key, stored in found:
    kind = stored.dtype if dtype is None or key.dtype is not None else np.dtype(dtype)
    keep = key.stored == "oi" and matrix_layout(platform, kind.name, cfg.dtype)[0] == "oi"
    for path in key.ours:
      struct = jax.ShapeDtypeStruct(shapes[path], kind)
      targets[path] = Matrix(_swapped(struct), "oi") if keep else struct
  if mesh is not None:
    rules = RULES[default_rules(mesh)] if rules is None else rules
    whole = tree.unflatten(quantized.closed(targets, held))
    targets = quantized.opened(tree.flatten(layout(whole, mesh, rules, cfg)))

  largest: dict[str, float] = {}  # magnitude of a tensor's values; a tensor is read by one thread
  slices: dict[tuple[str, ...], list[tuple[Key, Stored]]] = {}
  for key, stored in found:
    slices.setdefault(key.ours, []).append((key, stored))

  def read(items: list[tuple[Key, Stored]]) -> list[tuple[str, Any]]:
    """The parameters of one tensor, or of all that are slices of the same ones."""
    key, leaves = items[0][0], []
    tensors = [checkpoint.view(stored.name) for _, stored in items]
    split = [key.layout.split(tensor, cfg, key.axis(tensor.ndim)) for tensor in tensors]
    for path, views in zip(key.ours, zip(*split, strict=True), strict=True):
      matrix = isinstance(targets[path], Matrix)
      struct = targets[path].value if matrix else targets[path]
      parts = [
        _Part(view if matrix else key.to_stored(view), tensor, stored, largest)
        for view, tensor, (_, stored) in zip(views, tensors, items, strict=True)
      ]
      value = _place(parts, key.part is not None, struct)
      leaves.append((path, Matrix(value, "oi") if matrix else value))
    return leaves

  with concurrent.futures.ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as threads:
    flat = dict(leaf for leaves in threads.map(read, slices.values()) for leaf in leaves)
  flat, targets = quantized.closed(flat, held), quantized.closed(targets, held)
  params = tree.unflatten({path: flat[path] for path in matched.shapes})
  tree.check_same(tree.unflatten(targets), params, str(checkpoint.directory))
  for odd in _odd_values(largest, {stored.name: stored for _, stored in found}):
    _log.warning(
      "%s: %s; the files may be damaged, or of a training that diverged", checkpoint.directory, odd
    )
  _log.info("%s", _report(checkpoint, family, cfg, params, platform))
  return params


def matrix_layout(
  platform: str, dtype: str, compute: str, half_units: bool | None = None
) -> tuple[Literal["oi", "io"], str]:
  """How the matrices of files, [out, in], are held, and why: "oi" as they are, "io" transposed, one at a time.

  dtype: of the parameters; compute: cfg.dtype; half_units: whether the CPU has units for products of half types (None: look).
  With them XLA multiplies bfloat16 4 to 25 times as fast as [in, out]; without, neither layout is the faster.
  """
  if platform != "cpu":
    return "oi", f"the compiler lays products out for the {platform} as it likes"
  if dtype == compute == "float32":
    return "oi", "this CPU multiplies float32 as fast in either layout"
  if not (_has_half_units() if half_units is None else half_units):
    return "oi", f"this CPU has no units for {compute}, and multiplies it as fast in either layout"
  return "io", f"this CPU multiplies {compute} fast as [in, out] only"


def _swapped(struct: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  """[..., in, out] as [..., out, in]."""
  *leading, rows, columns = struct.shape
  return jax.ShapeDtypeStruct((*leading, columns, rows), struct.dtype)


def _has_half_units() -> bool:
  """Whether this machine's CPU has AMX for bfloat16, as Linux tells; False where nothing tells."""
  try:
    return "amx_bf16" in Path("/proc/cpuinfo").read_text()
  except OSError:
    return False


@dataclasses.dataclass(frozen=True)
class _Part:
  """A tensor of the files and a view of it: all of a parameter, or a slice of one."""

  view: np.ndarray
  tensor: np.ndarray
  stored: Stored
  largest: dict[str, float]

  def copy(self, index: tuple[slice, ...], dtype: np.dtype, out: np.ndarray | None = None) -> np.ndarray:
    """What is at the index, in memory of its own or in `out`; raises CheckpointError where it is not finite."""
    part, largest = scan.copy(self.view[index], dtype, out)
    self.largest[self.stored.name] = max(largest, self.largest.get(self.stored.name, 0.0))
    if not math.isfinite(largest):
      raise CheckpointError(
        f"{self.stored.file.parent}: {self.stored}: {scan.explain(self.tensor, dtype)}; fetch the file again, or mend it"
      )
    return part


def _odd_values(largest: dict[str, float], tensors: dict[str, Stored]) -> Iterator[str]:
  """What is finite and still no weights: matrices of zeros only, values beyond LARGE."""
  zero = [name for name, value in largest.items() if not value and math.prod(tensors[name].shape[:-1]) > 1]
  large = [f"{name} (up to {value:.4g})" for name, value in largest.items() if value > LARGE]
  if zero:
    yield f"matrices of zeros only: {files.listed(sorted(zero), 5)}"
  if large:
    yield f"values beyond {LARGE:,.0f}: {files.listed(sorted(large), 5)}"


def _place(parts: list[_Part], stacked: bool, struct: jax.ShapeDtypeStruct) -> jax.Array:
  """The array of `struct` with the values of its one part, past whose end it is 0, or of as many as it has slices."""

  def read(index: tuple[slice, ...]) -> np.ndarray:
    shape = tuple(len(range(*along.indices(size))) for along, size in zip(index, struct.shape, strict=True))
    if not stacked:
      part = parts[0].copy(index, struct.dtype)
      if part.shape == shape:
        return part
      return np.pad(part, [(0, n - m) for n, m in zip(shape, part.shape, strict=True)])
    out = scan.aligned(shape, struct.dtype)
    for one, part in zip(out, parts[index[0]], strict=True):
      part.copy(index[1:], struct.dtype, one)
    return out

  if struct.sharding is None:
    return jax.device_put(read((slice(None),) * len(struct.shape))).block_until_ready()
  done: dict[str, np.ndarray] = {}  # devices that hold the same part read it once

  def part_of(index: tuple[slice, ...]) -> np.ndarray:
    if str(index) not in done:
      done[str(index)] = read(index)
    return done[str(index)]

  return jax.make_array_from_callback(struct.shape, struct.sharding, part_of).block_until_ready()


def _compute_type(cfg: ModelConfig, source: Source, checkpoint: files.Checkpoint) -> str:
  """The type that config.json names, or else the one that most of the files' bytes are in."""
  if any(source.plain.get(name) is not None for name in ("dtype", "torch_dtype")):
    return cfg.dtype
  sizes = dict.fromkeys(DTYPES, 0)
  for stored in checkpoint.tensors.values():
    if stored.dtype.name in sizes:
      sizes[stored.dtype.name] += stored.stop - stored.start
  return max(sizes, key=sizes.get)


def _report(
  checkpoint: files.Checkpoint, family: Family, cfg: ModelConfig, params: dict[str, Any], platform: str
) -> str:
  """What was loaded, in a line: how much of what, in which types, and how matrices are held and why."""
  leaves = list(tree.flatten(params).values())
  types: dict[str, int] = {}
  for leaf in leaves:
    types[leaf.dtype.name] = types.get(leaf.dtype.name, 0) + leaf.size
  floats = [leaf.dtype.name for leaf in leaves if not isinstance(leaf, QTensor)]
  most = max(floats, key=types.get)
  how, why = matrix_layout(platform, most, cfg.dtype)
  return (
    f"{checkpoint.directory}: {family.name} of {sum(types.values()):,} parameters ("
    + ", ".join(f"{count:,} {name}" for name, count in types.items())
    + f"), computed in {cfg.dtype}; matrices are held {'[out, in], as in the files' if how == 'oi' else '[in, out]'}: {why}"
  )
