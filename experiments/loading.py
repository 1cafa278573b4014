"""How fast, and in how much memory, is a checkpoint loaded, beside reading the same tensors with safetensors?

A random Llama of --size is written by transformers (by this project, where that is missing) and removed after; --model=DIR
takes any checkpoint instead.  Each reading is a process of its own, which starts to count when all is imported; the sides take
turns and medians count; all files were read once before.  Memory is the peak of anonymous memory over the whole life of the
process.  The bars: at least half of the speed of safetensors, and, beyond the memory of a process that only imports, at most
1.15 times the parameters and the largest tensor.  Exits with 1 where one is missed; speed is judged
from 1 GB on, as tracing the model takes half a second whatever its size, and memory from 40 MB.
"""

import contextlib
import importlib.util
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import flags

from jaxllm.errors import ConfigError
from jaxllm.study import choices, run_app
from jaxllm.study import rows as rows_lib
from jaxllm.study.files import write_results

SIZES = {  # settings of LlamaConfig; 3b has the shape of Llama 3.2, 1b that of TinyLlama; heads of 3b and 213m are tied
  "half_7b": dict(  # 16 of the 32 layers of Llama 2
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=32,
  ),
  "3b": dict(
    vocab_size=128256,
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=28,
    num_attention_heads=24,
    num_key_value_heads=8,
    tie_word_embeddings=True,
  ),
  "1b": dict(
    vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32
  ),
  "213m": dict(
    vocab_size=32000,
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=16,
    num_attention_heads=16,
    tie_word_embeddings=True,
  ),
  "small": dict(
    vocab_size=2000, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8
  ),
  "tiny": dict(
    vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=8
  ),
}
KV_HEADS = 4
DTYPES = ("float32", "bfloat16", "float16")
COLUMNS = ("model", "dtype", "mesh", "metric", "value", *rows_lib.OUTCOME[1:])
HEADER = (
  "dtype",
  "mesh",
  "safetensors s",
  "jaxllm s",
  "speed ratio",
  "parameters GB",
  "peak GB",
  "peak / parameters",
  "(peak - imports) / bar",
)
DEVICES = 8
SPEED, MEMORY = 0.5, 1.15
SPEED_FROM, MEMORY_FROM = 10**9, 40_000_000
"""Bytes of parameters; of less, speed and memory are not told from what tracing the model takes."""
FLAGS = flags.FlagValues()

flags.DEFINE_string("model", None, "directory of a checkpoint; default: a random Llama", flag_values=FLAGS)
flags.DEFINE_enum(
  "size",
  "1b",
  list(SIZES),
  "of the random Llama: 3.2 billion parameters, 1.1 billion, 213 million, 26 million, or 150 thousand",
  flag_values=FLAGS,
)
flags.DEFINE_string(
  "dtypes",
  "float32,bfloat16",
  f"types of the random Llama: all, or any of {', '.join(DTYPES)}",
  flag_values=FLAGS,
)
flags.DEFINE_string(
  "meshes",
  "none fsdp=8 tensor=8",
  f"meshes of {DEVICES} virtual devices on a CPU, with spaces between; none: one device",
  flag_values=FLAGS,
)
flags.DEFINE_integer("rounds", 3, "readings of each side", flag_values=FLAGS)
flags.DEFINE_string(
  "work",
  None,
  "where the random Llama is written (4.4 GB in float32); default: the system's place for such",
  flag_values=FLAGS,
)
flags.DEFINE_string(
  "out", None, "directory for results.jsonl and results.csv; default: print the table only", flag_values=FLAGS
)
flags.DEFINE_bool("smoke", False, "the tiny Llama in float32, one round, two meshes", flag_values=FLAGS)


def check(f) -> None:
  """Refuse what cannot be measured."""
  if f.model is not None and not Path(f.model).is_dir():
    raise ConfigError(f"--model={f.model}: no such directory")
  choices.choice_list("dtypes", f.dtypes, DTYPES)
  choices.positive("rounds", f.rounds)
  if not f.meshes.split():
    raise ConfigError(
      f"--meshes={f.meshes}: expected none, or axes as in fsdp=2,tensor=4, with spaces between several"
    )


def make(directory: str, size: str, dtype: str) -> None:
  """Writes a random Llama, in files of up to 2 GB."""
  settings = {"num_key_value_heads": KV_HEADS, "tie_word_embeddings": False} | SIZES[size]
  if importlib.util.find_spec("transformers") and importlib.util.find_spec("torch"):
    import torch
    import transformers

    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
      model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size="2GB")
    return
  import ml_dtypes
  import numpy as np

  from jaxllm import hf, tree
  from jaxllm.hf import families
  from jaxllm.nn.shapes import expected_shapes

  plain = settings | {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "dtype": dtype,
  }
  cfg, rng = families.read_config(plain)[1], np.random.default_rng(0)
  kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
  draw = lambda shape: (0.02 * rng.standard_normal(shape, np.float32)).astype(kind)
  params = tree.unflatten({path: draw(shape) for path, shape in expected_shapes(cfg).items()})
  hf.save(directory, cfg, params, family="llama", max_shard_bytes=2_000_000_000)


def read_jaxllm(directory: str, mesh: str) -> float:
  """Seconds to load the checkpoint, on a mesh or not."""
  import jax

  from jaxllm import parallel
  from jaxllm.hf import loading

  made = None if mesh == "none" else parallel.make_mesh(mesh)
  jax.block_until_ready(jax.numpy.zeros(1))
  start = time.perf_counter()
  _, params = loading.load(directory, mesh=made, verify=False)  # as safetensors does not either
  jax.block_until_ready(params)
  return time.perf_counter() - start


def idle(directory: str, mesh: str) -> float:
  """`read_jaxllm` up to where its time starts."""
  import jax

  from jaxllm import parallel
  from jaxllm.hf import loading  # noqa: F401

  if mesh != "none":
    parallel.make_mesh(mesh)
  jax.block_until_ready(jax.numpy.zeros(1))
  time.sleep(0.05)  # seen by who looks at its memory
  return 0.0


def read_safetensors(directory: str, mesh: str) -> float:
  """Seconds to read all tensors into memory."""
  import ml_dtypes  # noqa: F401  (safetensors finds bfloat16 by its name)
  import safetensors.numpy

  start = time.perf_counter()
  tensors = {}
  for path in sorted(Path(directory).glob("*.safetensors")):
    tensors |= safetensors.numpy.load_file(path)
  return time.perf_counter() - start


def in_own_process(call: str, mesh: str = "none", before: str = "") -> tuple[float | None, int | None]:
  """(what `loading.<call>` returns, the peak of anonymous memory, None where the system does not say) of a new process.

  before: statements that it runs first.
  """
  devices = 1 if mesh == "none" else DEVICES
  flag = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip()
  code = f"{before}\nimport json; from experiments import loading; print(json.dumps(loading.{call}))"
  child = subprocess.Popen(
    [sys.executable, "-c", code],
    env=os.environ | {"XLA_FLAGS": flag},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  status, peak = Path(f"/proc/{child.pid}/status"), None
  try:
    while child.poll() is None:
      with contextlib.suppress(OSError, IndexError):  # it ended, or this is no Linux
        peak = max(peak or 0, 1024 * int(status.read_text().split("RssAnon:")[1].split()[0]))
      time.sleep(0.002)
    out, err = child.communicate()
  finally:
    child.kill()
  if child.returncode:
    raise RuntimeError(f"{call}: {err.strip()[-2000:]}")
  return json.loads(out.splitlines()[-1]), peak


def measure(directory: str, mesh: str, rounds: int, before: str = "") -> dict[str, float | int | None]:
  """The numbers of one line of the table."""
  from jaxllm.hf.files import Checkpoint

  tensors = Checkpoint(directory).tensors.values()
  for path in {tensor.file for tensor in tensors}:  # into the system's cache
    with open(path, "rb", buffering=0) as file:
      while file.read(1 << 24):
        pass
  sides = {"jaxllm": [], "safetensors": []}
  for _ in range(rounds):
    for side, found in sides.items():
      found.append(in_own_process(f"read_{side}({directory!r}, {mesh!r})", mesh, before))
  _, start = in_own_process(f"idle({directory!r}, {mesh!r})", mesh)
  seconds = {side: statistics.median(second for second, _ in found) for side, found in sides.items()}
  sizes = [tensor.stop - tensor.start for tensor in tensors]
  peaks = [peak for _, peak in sides["jaxllm"]]
  return {
    "seconds": seconds["jaxllm"],
    "safetensors_seconds": seconds["safetensors"],
    "speed_ratio": seconds["safetensors"] / seconds["jaxllm"],
    "parameter_bytes": sum(sizes),
    "peak_bytes": None if None in peaks else max(peaks),
    "idle_bytes": start,
    "bar_bytes": MEMORY * sum(sizes) + max(sizes),
  }


def missed(found: dict[str, float | int | None]) -> list[str]:
  """The bars that the numbers of a line miss, in words."""
  problems, size, used = [], found["parameter_bytes"], used_bytes(found)
  if size >= SPEED_FROM and found["speed_ratio"] < SPEED:
    problems.append(f"speed {found['speed_ratio']:.2f} of safetensors, expected at least {SPEED}")
  if size >= MEMORY_FROM and used is not None and used > found["bar_bytes"]:
    problems.append(
      f"memory {used / 1e9:.3f} GB beyond the imports, expected at most {found['bar_bytes'] / 1e9:.3f} GB "
      f"({MEMORY} times the parameters and the largest tensor)"
    )
  return problems


def used_bytes(found: dict[str, float | int | None]) -> int | None:
  """Peak memory beyond that of a process that only imports."""
  return (
    None if None in (found["peak_bytes"], found["idle_bytes"]) else found["peak_bytes"] - found["idle_bytes"]
  )


def line(dtype: str, mesh: str, found: dict[str, float | int | None]) -> str:
  """One line of the table in Markdown."""
  peak, size, used = found["peak_bytes"], found["parameter_bytes"], used_bytes(found)
  memory = (
    ("-", "-", "-")
    if used is None
    else (f"{peak / 1e9:.3f}", f"{peak / size:.3f}", f"{used / found['bar_bytes']:.3f}")
  )
  cells = (
    dtype,
    mesh,
    f"{found['safetensors_seconds']:.3f}",
    f"{found['seconds']:.3f}",
    f"{found['speed_ratio']:.2f}",
  )
  return f"| {' | '.join((*cells, f'{size / 1e9:.3f}', *memory))} |"


def parameters(directory: str) -> int:
  """How many numbers a checkpoint's tensors hold."""
  from jaxllm.hf.files import Checkpoint

  return sum(math.prod(tensor.shape) for tensor in Checkpoint(directory).tensors.values())


def stored_type(directory: str) -> str:
  """The types of a checkpoint's tensors."""
  from jaxllm.hf.files import Checkpoint

  return "+".join(sorted({tensor.dtype.name for tensor in Checkpoint(directory).tensors.values()}))


def main(f) -> int:
  """Measure, print the table and, with --out, write its numbers; 1 where a bar is missed."""
  import jax

  size, rounds, meshes = ("tiny", 1, ["none", "fsdp=8"]) if f.smoke else (f.size, f.rounds, f.meshes.split())
  dtypes = ("float32",) if f.smoke else choices.choice_list("dtypes", f.dtypes, DTYPES)
  print(
    f"{platform.machine()}, {jax.devices()[0].device_kind}, jax {jax.__version__}, Python {platform.python_version()}\n"
  )
  print(f"| {' | '.join(HEADER)} |\n|---|---{'|---:' * (len(HEADER) - 2)}|", flush=True)
  rows, problems = [], []
  for dtype in (None,) if f.model is not None else dtypes:
    directory = f.model or tempfile.mkdtemp(prefix="jaxllm-loading-", dir=f.work)
    try:
      if f.model is None:
        in_own_process(f"make({directory!r}, {size!r}, {dtype!r})")
      kind = dtype or stored_type(directory)
      for mesh in meshes:
        found = measure(directory, mesh, rounds)
        print(line(kind, mesh, found), flush=True)
        problems += [f"MISSED: {kind}, mesh {mesh}: {problem}" for problem in missed(found)]
        rows += [row(f.model or size, kind, mesh, metric, value) for metric, value in found.items()]
    finally:
      if f.model is None:
        shutil.rmtree(directory)
  return end(f.out, rows, COLUMNS, problems)


def end(out: str | None, rows: list[dict], columns: tuple[str, ...], problems: list[str]) -> int:
  """Writes the numbers where a directory is given, tells of missed bars, and is the exit code: 1 where one is missed."""
  if out is not None:
    Path(out).mkdir(parents=True, exist_ok=True)
    write_results(out, rows, columns)
  for problem in problems:
    print(problem, file=sys.stderr)
  return 1 if problems else 0


def row(model: str, dtype: str, mesh: str, metric: str, value: float | None) -> dict:
  """One number for results.jsonl."""
  cell = {"model": model, "dtype": dtype, "mesh": mesh, "metric": metric}
  if value is None:
    return rows_lib.not_applicable(cell, "the system does not tell the memory of a process")
  return rows_lib.ok(cell, value)


if __name__ == "__main__":
  run_app(main, check=check, values=FLAGS)
