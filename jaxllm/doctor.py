"""What this machine and, with --model, a checkpoint are to jaxllm: devices, versions, fit in memory, settings in force.

Reads settings and headers of files, and weights only where --weights asks for them; of a repository of the Hub it fetches no
more, and sizes are estimated where the weights are not in the cache.  Exits with 1 where something is wrong that a run would
not say: an accelerator that JAX does not use, a model that does not fit.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from jaxllm.errors import ConfigError
from jaxllm.study import choices, run_app

if TYPE_CHECKING:
  from jaxllm.hf.loading import Opened
  from jaxllm.ops.memory import Memory

FLAGS = flags.FlagValues()
flags.DEFINE_string(
  "model", None, "a checkpoint: a directory or a repository of Hugging Face's", flag_values=FLAGS
)
flags.DEFINE_integer(
  "context", None, "tokens that the cache is to hold; default what the model serves", flag_values=FLAGS
)
flags.DEFINE_bool(
  "verify",
  True,
  f"of settings, the tokenizer, and weights that do not fit them: {choices.VERIFY_HELP}",
  flag_values=FLAGS,
)

flags.DEFINE_bool(
  "weights",
  False,
  "read all weights, too, for values that are NaN or infinite and, by --verify, for sums",
  flag_values=FLAGS,
)

NEEDED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "safetensors", "absl-py", "einops")
OPTIONAL = ("tokenizers", "huggingface-hub", "transformers", "torch")
VENDORS = {"0x10de": "NVIDIA GPU", "0x1ae0": "TPU"}
"""By PCI vendor: NVIDIA's displays, and what of Google's is no disk or network card."""
CLASSES = {
  "NVIDIA GPU": lambda kind: kind[:4] == "0x03",
  "TPU": lambda kind: kind[:4] not in ("0x01", "0x02"),
}
PLUGINS = {
  "NVIDIA GPU": (
    "gpu",
    r"jax-cuda\d+-plugin",
    "pip install -e '.[cuda]', and see that the driver is there (nvidia-smi)",
  ),
  "TPU": ("tpu", r"libtpu", "pip install -e '.[tpu]'; in Colab: Runtime, Change runtime type"),
}


def accelerators(root: Path = Path("/")) -> dict[str, int]:
  """{kind: how many} of the accelerators that the operating system shows, whether JAX uses them or not (Linux)."""
  found: dict[str, int] = {}
  for device in sorted(root.glob("sys/bus/pci/devices/*")):
    vendor, kind = (_line(device / name) for name in ("vendor", "class"))
    name = VENDORS.get(vendor)
    if name is not None and CLASSES[name](kind):
      found[name] = found.get(name, 0) + 1
  for name, pattern in (("NVIDIA GPU", "nvidia[0-9]*"), ("TPU", "accel[0-9]*")):
    if there := len(list((root / "dev").glob(pattern))):  # in a container the bus may be hidden
      found[name] = max(there, found.get(name, 0))
  return found


def fall_back(backend: str, there: dict[str, int], packages: list[str]) -> str | None:
  """What to say where JAX runs on the CPU of a machine with an accelerator; None where it does not."""
  if backend != "cpu" or not there:
    return None
  said = os.environ.get("JAX_PLATFORMS")
  lines = [
    f"THIS MACHINE HAS {', '.join(f'{n} x {name}' for name, n in there.items())}, AND JAX RUNS ON THE CPU."
  ]
  if said:
    lines.append(f"JAX_PLATFORMS={said} is set: unset it.")
  for name in there:
    _, pattern, advice = PLUGINS[name]
    has = [package for package in packages if re.match(rf"{pattern}( |$)", package)]
    lines.append(
      f"{name}: {', '.join(has) + ' is installed' if has else 'no plugin of JAX is installed'}; {advice}."
    )
  return "  ".join(lines)


def machine_lines() -> tuple[list[str], list[str]]:
  """(what there is, what is wrong)."""
  import jax

  from jaxllm.ops.memory import memory_of

  devices, backend = jax.devices(), jax.default_backend()
  kinds = {kind: sum(d.device_kind == kind for d in devices) for kind in (d.device_kind for d in devices)}
  lines = [f"devices: {', '.join(f'{n} x {kind}' for kind, n in kinds.items())} ({backend})"]
  packages = [f"{d.metadata['Name']} {d.version}" for d in importlib.metadata.distributions()]
  wrong = [problem] if (problem := fall_back(backend, accelerators(), packages)) else []
  memory = memory_of(devices)
  if memory is not None:
    lines.append(f"memory: {gib(memory.bytes)} of {memory.what}")
  lines.append(
    f"versions: jaxllm {_version('jaxllm')}, Python {platform.python_version()}, {', '.join(_versions(NEEDED))}"
  )
  lines.append(f"optional: {', '.join(_versions(OPTIONAL))}")
  return lines, wrong


def model_lines(
  model: str, context: int | None, verify: bool = True, weights: bool = False
) -> Iterator[tuple[str, str | None]]:
  """(a line of what the checkpoint is, and what is wrong with that, if anything); raises what loading raises.

  weights: read them, too, as `hf.load` does; else only settings, headers and the tokenizer.
  """
  import jax

  from jaxllm.hf import families, files, hub, loading, match
  from jaxllm.ops.memory import memory_of
  from jaxllm.study import describe

  directory = hub.find(model, weights=weights)
  if not Path(model).expanduser().is_dir() and files.missing_weights(directory):
    yield from _unfetched_lines(directory, context, verify)
    return
  opened = loading.open_checkpoint(directory, verify=verify)
  checkpoint, family, cfg, source = opened.checkpoint, opened.family, opened.cfg, opened.source
  match.check_heads(checkpoint, opened.matched, source)
  found, shapes = opened.matched.found, opened.matched.shapes
  sizes: dict[str, int] = {}
  for _, stored in found:
    sizes[stored.dtype.name] = sizes.get(stored.dtype.name, 0) + stored.stop - stored.start
  count = sum(_product(shape) for shape in shapes.values())
  types = ", ".join(f"{gib(size)} {name}" for name, size in sizes.items())
  yield f"checkpoint: {checkpoint.directory}, family {family.name}, {count:,} parameters, {types}", None
  for line in describe.model_lines(cfg, context or cfg.context_length):
    yield line, None
  yield fit(cfg, sum(sizes.values()), context or cfg.context_length, memory_of(jax.devices()))
  ignored = families.ignored_settings(source.plain, source.path)
  yield f"settings that change no logit, ignored: {', '.join(ignored) or 'none'}", None
  unused = sorted(set(checkpoint.tensors) - {stored.name for _, stored in found})
  yield f"tensors that hold no parameters, unused: {_few(unused)}", None
  yield tokenizer_line(checkpoint.directory, cfg, verify), None
  yield weights_line(opened, weights), None


def weights_line(opened: Opened, read: bool) -> str:
  """What is known of the values of the weights, which are read where that is asked; raises what loading raises."""
  from jaxllm.hf import files, sums

  if not read:
    return "weights: not read; --weights looks at every value, and at the sums that were kept of the files"
  opened.params()
  names = {name for name in opened.checkpoint.read_files if name.endswith(files.WEIGHTS)}
  kept = len(names & opened.kept.digests.keys())
  return f"weights: every value is finite; {kept} of {len(names)} files have a sum in {sums.NAME}, and it is theirs"


def _unfetched_lines(directory: Path, context: int | None, verify: bool) -> Iterator[tuple[str, str | None]]:
  """`model_lines` of a repository whose weights are not here: sizes by the shapes of the model that config.json asks for."""
  import jax
  import numpy as np

  from jaxllm.hf import families, loading
  from jaxllm.nn.shapes import expected_shapes
  from jaxllm.ops.memory import memory_of
  from jaxllm.study import describe

  family, cfg, source = loading.load_config(directory)
  count = sum(_product(shape) for shape in expected_shapes(cfg).values())
  size = count * np.dtype(cfg.dtype).itemsize
  yield (
    f"checkpoint: {directory}, family {family.name}, {count:,} parameters, {gib(size)} if all are {cfg.dtype}: by "
    "config.json, as the weights are not in the cache; their tensors are not checked",
    None,
  )
  for line in describe.model_lines(cfg, context or cfg.context_length):
    yield line, None
  yield fit(cfg, size, context or cfg.context_length, memory_of(jax.devices()))
  ignored = families.ignored_settings(source.plain, source.path)
  yield f"settings that change no logit, ignored: {', '.join(ignored) or 'none'}", None
  yield tokenizer_line(directory, cfg, verify), None


def fit(cfg, weights: int, context: int | None, memory: Memory | None) -> tuple[str, str | None]:
  """Weights and the cache of one row beside what a device holds: (in words, what is wrong)."""
  if context is None:
    return (
      f"memory: {gib(weights)} of weights; its settings name no context: give --context=TOKENS for the cache",
      None,
    )
  cache = cache_bytes(cfg, context)
  text = f"memory: {gib(weights)} of weights + {gib(cache)} for a cache of {context} tokens"
  if memory is None:
    return text, None
  need, have = weights + cache, memory.bytes
  text += f" = {gib(need)}, of {gib(have)} of {memory.what}"
  if need <= have:
    return text, None
  if need <= have * memory.devices:
    return text, f"does not fit on one device; over {memory.devices} it may: --mesh=fsdp={memory.devices}"
  return (
    text,
    f"does not fit: {gib(need)} are needed and {gib(have * memory.devices)} are there; take a shorter --context",
  )


def cache_bytes(cfg, context: int) -> int:
  """Bytes of one row's keys, values and positions as `generate` holds them: of a layer with a window, the window and a part."""
  import jax

  from jaxllm.generate.loop import PART
  from jaxllm.nn import init_cache

  cache = jax.eval_shape(lambda: init_cache(cfg, 1, context, call=PART))
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))


def tokenizer_line(directory: Path, cfg, verify: bool = True) -> str:
  """What encodes text for the model, or why nothing does; raises for a tokenizer that is damaged or of another model."""
  from jaxllm.hf.tokenizer import NoTokenizerError, load_tokenizer

  try:
    tokenizer = load_tokenizer(directory, cfg, verify)
  except NoTokenizerError as e:
    return f"tokenizer: none ({e})"
  spare = cfg.vocab_size - tokenizer.vocab_size
  rows = (
    f", {spare} rows of the embedding without one"
    if spare > 0
    else f", {-spare} beyond the embedding"
    if spare
    else ""
  )
  special = f"bos {tokenizer.bos_id}, eos {', '.join(map(str, tokenizer.eos_ids)) or None}"
  chat = "with" if tokenizer.template else "without"
  return f"tokenizer: {tokenizer.vocab_size} ids{rows}; {special}; {chat} a chat template"


def gib(size: int) -> str:
  """Bytes in the unit that shows three digits: 512 B, 1.50 MiB, 12.3 GiB."""
  for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
    if size >= scale:
      return f"{size / scale:.3g} {unit}"
  return f"{size} B"


def check(f) -> None:
  """Refuse a context that is none."""
  if f.context is not None and f.context < 1:
    raise ConfigError(f"--context={f.context}: found {f.context}, expected a whole number of at least 1")
  if f.context is not None and f.model is None:
    raise ConfigError(f"--context={f.context} without --model: there is no cache without a model")
  if f.weights and f.model is None:
    raise ConfigError("--weights without --model: give the checkpoint whose weights are to be read")


def main(f) -> int:
  """Print all of it; 1 where something is wrong."""
  lines, wrong = machine_lines()
  for line in lines:
    print(line)
  for problem in wrong:
    print(f"\n*** {problem}\n", file=sys.stderr)
  if f.model is not None:
    for line, problem in model_lines(f.model, f.context, f.verify, f.weights):
      print(line, flush=True)
      if problem:
        print(f"\n*** {problem}\n", file=sys.stderr)
        wrong.append(problem)
  return 1 if wrong else 0


def _versions(names: tuple[str, ...]) -> list[str]:
  return [f"{name} {_version(name)}" for name in names]


def _version(name: str) -> str:
  import jaxllm

  try:
    return jaxllm.__version__ if name == "jaxllm" else importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return "not installed"


def _line(path: Path) -> str:
  return _text(path).strip()


def _text(path: Path) -> str:
  try:
    return path.read_text()
  except OSError:
    return ""


def _few(names: list[str]) -> str:
  return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none"


def _product(shape: tuple[int, ...]) -> int:
  size = 1
  for n in shape:
    size *= n
  return size


if __name__ == "__main__":
  run_app(main, check, values=FLAGS)
