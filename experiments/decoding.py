"""How fast does a model read a prompt and write text, beside transformers in the same type on the same machine?

A random Llama of --size is written by transformers and removed after; --model=DIR takes any checkpoint that both read.  Each
reading is a process of its own that loads the checkpoint and generates greedily, without stop ids: once to warm up, then
--reads times; the sides take turns, and medians of all reads of all processes count.  Prefill is the time to the first new
token, and decoding that of the others.  The share of memory bandwidth is that of a copy in the same process: a step reads every
weight once, and what it reads of the cache is not counted.  Where JAX finds a CUDA GPU, transformers runs on it, too.

The bars, of a CPU: decoding at least 1.5 times as fast in float32 and 1.2 times in bfloat16, prefill at least 0.8 times, and
the first token of a process that finds its programs in the compilation cache within 4 seconds of its start.  With --quant,
beside transformers in bfloat16: int8 decodes one row at least 3 times as fast, and 0.8 times as fast as llama.cpp; w8a8 decodes
eight rows at least 2 times as fast, and reads their prompts as fast.  On a GPU int8 decodes one row at least 1.6 times as fast
as this project does in bfloat16, which --quant measures there, too.  These are bars of the default rules: with --quantize_head
none counts.  A bar whose other side was not read, such as llama.cpp's without --llama_cpp, is told as not measured.  Exits with
1 where a bar is missed, as far as the model has 100 million parameters (on a GPU, a billion).
"""

import importlib.util
import json
import math
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import flags

from experiments import llama_cpp, loading
from jaxllm.errors import ConfigError
from jaxllm.study import choices, run_app
from jaxllm.study import rows as rows_lib

BARS = {"float32": 1.5, "bfloat16": 1.2}
PREFILL_BAR, FIRST_BAR = 0.8, 4.0
QUANT_BARS = {
  ("int8", "cpu", 1): {"decode ratio": 3.0, "llama_cpp decode ratio": 0.8},
  ("w8a8", "cpu", 8): {"decode ratio": 2.0, "prefill ratio": 1.0},
  ("int8", "gpu", 1): {"own decode ratio": 1.6},
}
"""Of --quant, where jaxllm runs, and the number of rows: the least of numbers of a line in bfloat16."""
LARGE = {"cpu": 10**8, "gpu": 10**9}
"""Parameters from which the bars count: of less, it is not the model that takes the time."""
COLUMNS = ("model", "quant", "dtype", "batch", "metric", "value", *rows_lib.OUTCOME[1:])
HEADER = (
  "dtype",
  "batch",
  "decode tok/s",
  "transformers",
  "ratio",
  "memory bandwidth",
  "prefill tok/s",
  "transformers",
  "ratio",
  "first token s",
)
THIRD = (
  ("llama.cpp Q8_0 decode tok/s", "llama_cpp decode tok/s"),
  ("ratio", "llama_cpp decode ratio"),
  ("llama.cpp prefill tok/s", "llama_cpp prefill tok/s"),
  ("ratio", "llama_cpp prefill ratio"),
)
"""Columns of --llama_cpp, and their numbers."""
OWN = (("jaxllm decode tok/s", "own decode tok/s"), ("ratio", "own decode ratio"))
"""Columns of --quant on a GPU, unquantized."""
FLAGS = flags.FlagValues()

flags.DEFINE_string("model", None, "directory of a checkpoint; default: a random Llama", flag_values=FLAGS)
flags.DEFINE_enum("size", "213m", list(loading.SIZES), "of the random Llama", flag_values=FLAGS)
flags.DEFINE_string("dtypes", "float32,bfloat16", f"all, or any of {', '.join(BARS)}", flag_values=FLAGS)
flags.DEFINE_string("batches", "1,8", "numbers of rows", flag_values=FLAGS)
flags.DEFINE_integer("prompt", 128, "tokens of a prompt", flag_values=FLAGS)
flags.DEFINE_integer("new", 64, "tokens to generate", flag_values=FLAGS)
flags.DEFINE_integer("rounds", 2, "processes of each side", flag_values=FLAGS)
flags.DEFINE_integer("reads", 3, "readings of a process", flag_values=FLAGS)
flags.DEFINE_string(
  "quant",
  "none",
  "how jaxllm holds its weights (a name of jaxllm.quant.SCHEMES), read as float32 on a CPU; those of transformers are of "
  "--dtypes",
  flag_values=FLAGS,
)
flags.DEFINE_bool(
  "quantize_head", False, "with --quant: the head (or the tied embedding), too", flag_values=FLAGS
)
flags.DEFINE_enum(
  "cache_implementation",
  "dynamic",
  ["dynamic", "static"],
  "of transformers' generate; static compiles its forward pass where there is a GPU",
  flag_values=FLAGS,
)
flags.DEFINE_bool(
  "llama_cpp",
  False,
  "of one row, also beside llama.cpp in Q8_0 (needs llama-cpp-python and gguf)",
  flag_values=FLAGS,
)
flags.DEFINE_string("out", None, "directory for results.jsonl and results.csv", flag_values=FLAGS)
flags.DEFINE_bool("smoke", False, "the tiny Llama in float32, one process a side", flag_values=FLAGS)


def check(f) -> None:
  """Refuse what cannot be measured."""
  if f.model is not None and not Path(f.model).is_dir():
    raise ConfigError(f"--model={f.model}: no such directory")
  choices.choice_list("dtypes", f.dtypes, BARS)
  for name in ("prompt", "rounds", "reads"):
    choices.positive(name, f[name].value)
  if f.new < 2:
    raise ConfigError(f"--new={f.new}: expected at least 2, as the first token belongs to the prompt")
  if not all(one.strip().isdigit() and int(one) for one in f.batches.split(",")):
    raise ConfigError(f"--batches={f.batches}: expected numbers of rows, as in 1,8")
  from jaxllm import quant  # not for --help, which it would delay

  if f.quant not in (known := ["none", *quant.SCHEMES]):
    near = choices.nearest(f.quant, known)
    raise ConfigError(f"--quant={f.quant}: not known{near}; allowed: {', '.join(known)}")
  if f.quantize_head and f.quant == "none":
    raise ConfigError(
      "--quantize_head without --quant: there is no scheme for it; give --quant, or leave it out"
    )
  if f.llama_cpp and (lacks := llama_cpp.missing()):
    raise ConfigError(
      f"--llama_cpp: {' and '.join(lacks)} not installed; pip install {' '.join(lacks)}, which builds it"
    )
  missing = [name for name in ("transformers", "torch") if importlib.util.find_spec(name) is None]
  if missing:
    raise ConfigError(
      f"{' and '.join(missing)}: not installed, and the other side of the comparison; pip install -e '.[parity]'"
    )


def prompts(vocab_size: int, batch: int, length: int) -> list[list[int]]:
  """Random ids."""
  import numpy as np

  return np.random.default_rng(0).integers(0, vocab_size, (batch, length)).tolist()


def device(started: float) -> dict[str, str]:
  """What JAX runs on in a new process, as this one must leave a GPU's memory alone."""
  import jax

  return {"kind": jax.devices()[0].device_kind, "platform": jax.default_backend()}


def bandwidth() -> float:
  """Bytes a second that adding 1 to a gibibyte of numbers reads and writes: the best of five."""
  import jax
  import jax.numpy as jnp

  x, add, seconds = jnp.arange(2**28, dtype=jnp.float32), jax.jit(lambda x: x + 1, donate_argnums=0), []
  for _ in range(6):  # in place, as new memory is slow at first; the first one compiles
    start = time.perf_counter()
    x = jax.block_until_ready(add(x))
    seconds.append(time.perf_counter() - start)
  return 2 * x.nbytes / min(seconds)


def step_bytes(cfg, params) -> int:
  """The bytes of the weights that decoding a token reads: all but a table of embeddings that is not the head, too."""
  from jaxllm import tree

  parts = tree.flatten(params).items()
  return sum(x.nbytes for path, x in parts if path != "embed" or cfg.tie_embeddings)


def timed(model, params, texts: list[list[int]], new: int) -> tuple[float, float]:
  """Seconds to the first of `new` tokens after each of the texts, and for the others: drawn greedily, without stop ids."""
  from jaxllm.generate.loop import generate

  first = []
  start = time.perf_counter()
  generate(
    model,
    params,
    texts,
    max_new_tokens=new,
    stop_ids=(),
    on_tokens=lambda row, ids: first.append(time.perf_counter()) if not first else None,
  )
  return first[0] - start, time.perf_counter() - first[0]


def jaxllm_side(
  directory: str,
  dtype: str,
  batch: int,
  length: int,
  new: int,
  reads: int,
  quant: str,
  quantize_head: bool,
  started: float,
) -> dict:
  """Seconds to the first token and for the others, of each read, and from `started` (of the process) to the very first; the
  least seconds that a step can take for its weights.
  """
  import jax

  from jaxllm import hf
  from jaxllm import quant as quants
  from jaxllm.nn import Transformer

  if quant != "none" and jax.default_backend() == "cpu":
    dtype = "float32"
  cfg, params = hf.load(directory, dtype=dtype, verify=False)
  if quant != "none":
    rules = [("embed" if cfg.tie_embeddings else "head", True)] if quantize_head else []
    params = quants.apply(params, quants.SCHEMES[quant](), rules)
  model, texts = Transformer(cfg), prompts(cfg.vocab_size, batch, length)

  before = time.time() - started
  prefill, _ = timed(model, params, texts, new)
  found = {"first": before + prefill, "reads": [timed(model, params, texts, new) for _ in range(reads)]}
  return found | {"floor": step_bytes(cfg, params) / bandwidth()}


def transformers_side(
  directory: str,
  dtype: str,
  batch: int,
  length: int,
  new: int,
  reads: int,
  platform: str,
  cache: str,
  started: float,
) -> dict:
  """The same of transformers, but for the last."""
  import torch
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
  model.generation_config.eos_token_id = None
  gpu = platform == "gpu" and torch.cuda.is_available()
  model = model.to("cuda" if gpu else "cpu")
  ids = torch.tensor(prompts(model.config.vocab_size, batch, length), device=model.device)

  def now() -> float:
    if gpu:
      torch.cuda.synchronize()
    return time.perf_counter()

  def read() -> tuple[float, float]:
    start, at = now(), []

    def seen(_, scores):  # called with the logits of every new token
      at.append(time.perf_counter() if at else now())
      return scores

    with torch.inference_mode():
      model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        cache_implementation=None if cache == "dynamic" else cache,
        logits_processor=transformers.LogitsProcessorList([seen]),
      )
    assert len(at) == new, (len(at), new)
    return at[0] - start, now() - at[0]

  before = time.time() - started
  prefill, _ = read()
  return {"first": before + prefill, "reads": [read() for _ in range(reads)]}


def llama_cpp_side(
  directory: str, dtype: str, batch: int, length: int, new: int, reads: int, gguf: str, started: float
) -> dict:
  """The same of llama.cpp in Q8_0, of one row, by the file `gguf`, which is made where it is not there."""
  if not Path(gguf).exists():
    llama_cpp.write(directory, gguf)
  vocab_size = json.loads((Path(directory) / "config.json").read_text())["vocab_size"]
  return llama_cpp.side(gguf, prompts(vocab_size, batch, length)[0], new, reads, started)


def in_own_process(name: str, *arguments) -> dict:
  """What the function of that name returns in a new process."""
  call = f"{name}(*{arguments!r}, started=float(sys.argv[1]))"
  code = f"import json, sys; from experiments import decoding; print(json.dumps(decoding.{call}))"
  run = subprocess.run(
    [sys.executable, "-c", code, str(time.time())], capture_output=True, text=True, check=False
  )
  if run.returncode:
    raise RuntimeError(f"{name}: {run.stderr.strip()[-2000:]}")
  return json.loads(run.stdout.splitlines()[-1])


def measure(directory: str, dtype: str, batch: int, platform: str, gguf: str | None, f) -> dict[str, float]:
  """The numbers of one line of the table; gguf: the file for llama.cpp."""
  task = (directory, dtype, batch, f.prompt, f.new, f.reads)
  more = {"jaxllm": (f.quant, f.quantize_head), "transformers": (platform, f.cache_implementation)}
  sides = {"jaxllm": [], "transformers": []}
  if gguf is not None and batch == 1:
    sides["llama_cpp"], more["llama_cpp"] = [], (gguf,)
  if f.quant != "none" and platform == "gpu":
    sides["own"], more["own"] = [], ("none", False)
  for _ in range(f.rounds):
    for side, found in sides.items():
      call = "jaxllm_side" if side == "own" else f"{side}_side"
      found.append(in_own_process(call, *task, *more[side]))
  numbers = {}
  for side, found in sides.items():
    reads = [read for one in found for read in one["reads"]]
    prefill, decoding = (statistics.median(column) for column in zip(*reads, strict=True))
    numbers[f"{side} decode tok/s"] = batch * (f.new - 1) / decoding
    numbers[f"{side} prefill tok/s"] = batch * f.prompt / prefill
  for name in ("decode", "prefill"):
    for side in list(sides)[1:]:
      ratio = f"{name} ratio" if side == "transformers" else f"{side} {name} ratio"
      numbers[ratio] = numbers[f"jaxllm {name} tok/s"] / numbers[f"{side} {name} tok/s"]
  floor = statistics.median(one["floor"] for one in sides["jaxllm"])
  numbers["share of memory bandwidth"] = floor * numbers["jaxllm decode tok/s"] / batch
  # the first process may have compiled; the others found its programs
  return numbers | {"first token s": min(one["first"] for one in sides["jaxllm"][1:] or sides["jaxllm"])}


def bars(dtype: str, batch: int, held: str, platform: str) -> dict[str, float]:
  """The least of numbers of a line; held: none, or the scheme of the weights, with ", head" where the head is in it, too."""
  if held == "none":
    return {"decode ratio": BARS[dtype], "prefill ratio": PREFILL_BAR} if platform == "cpu" else {}
  return QUANT_BARS.get((held, platform, batch), {}) if dtype == "bfloat16" else {}


def missed(dtype: str, batch: int, found: dict[str, float], held: str, platform: str) -> list[str]:
  """The bars that the numbers of a line miss, in words; the first token's is for a row alone, as its prompts are to be read."""
  problems = [
    f"{name} {found[name]:.2f}, expected at least {bar}"
    for name, bar in bars(dtype, batch, held, platform).items()
    if name in found and found[name] < bar
  ]
  if (held, platform, batch) == ("none", "cpu", 1) and found["first token s"] > FIRST_BAR:
    problems.append(f"first token after {found['first token s']:.1f} s, expected at most {FIRST_BAR}")
  return problems


def unmeasured(dtype: str, batch: int, found: dict[str, float], held: str, platform: str) -> list[str]:
  """The bars of a line of which it has no number, in words."""
  lacks = {name: bar for name, bar in bars(dtype, batch, held, platform).items() if name not in found}
  return [f"{name}, expected at least {bar}; give --llama_cpp" for name, bar in lacks.items()]


def line(dtype: str, batch: int, found: dict[str, float], more: tuple[tuple[str, str], ...] = ()) -> str:
  """One line of the table in Markdown; more: the columns after the usual ones, of which a line may have no number."""
  cells = [dtype, str(batch)]
  for name in ("decode", "prefill"):
    cells += [f"{found[f'{side} {name} tok/s']:.1f}" for side in ("jaxllm", "transformers")]
    cells.append(f"{found[f'{name} ratio']:.2f}")
    if name == "decode":
      cells.append(f"{found['share of memory bandwidth']:.0%}")
  cells.append(format(found["first token s"], ".2f"))
  cells += [f"{found[name]:.2f}" if name in found else "-" for _, name in more]
  return f"| {' | '.join(cells)} |"


def main(f) -> int:
  """Measure, print the table and, with --out, write its numbers; 1 where a bar is missed."""
  import jax

  where = in_own_process("device")
  if f.smoke:
    f.size, f.dtypes, f.batches, f.prompt, f.new, f.rounds, f.reads = "tiny", "float32", "2", 8, 4, 1, 1
  print(
    f"{platform.machine()}, {where['kind']}, jax {jax.__version__}, Python {platform.python_version()}; "
    f"prompts of {f.prompt} tokens, {f.new} new ones\n"
  )
  more = THIRD if f.llama_cpp else ()
  more += OWN if f.quant != "none" and where["platform"] == "gpu" else ()
  header = [*HEADER, *(name for name, _ in more)]
  print(f"| {' | '.join(header)} |\n|---{'|---:' * (len(header) - 1)}|", flush=True)
  rows, problems, notes = [], [], []
  for dtype in choices.choice_list("dtypes", f.dtypes, BARS):
    scratch = tempfile.mkdtemp(prefix="jaxllm-decoding-")
    directory = f.model or scratch
    gguf = str(Path(scratch) / "q8_0.gguf") if f.llama_cpp else None
    try:
      if f.model is None:
        loading.in_own_process(f"make({directory!r}, {f.size!r}, {dtype!r})")
      if f.llama_cpp:
        llama_cpp.gguf_names(directory)  # here, where what it refuses is told as an error of the user's
      judged = loading.parameters(directory) >= LARGE.get(where["platform"], math.inf)
      for batch in map(int, f.batches.split(",")):
        found = measure(directory, dtype, batch, where["platform"], gguf, f)
        print(line(dtype, batch, found, more), flush=True)
        held = f.quant + (", head" if f.quantize_head else "")
        if judged:
          told = (dtype, batch, found, held, where["platform"])
          problems += [f"MISSED: {dtype}, batch {batch}: {one}" for one in missed(*told)]
          notes += [f"NOT MEASURED: {dtype}, batch {batch}: {one}" for one in unmeasured(*told)]
        cell = {"model": f.model or f.size, "quant": held, "dtype": dtype, "batch": batch}
        rows += [rows_lib.ok(cell | {"metric": name}, value) for name, value in found.items()]
    finally:
      shutil.rmtree(scratch)
  if notes:
    print("\n" + "\n".join(notes))
  return loading.end(f.out, rows, COLUMNS, problems)


if __name__ == "__main__":
  run_app(main, check=check, values=FLAGS)
