"""What does attention by tiles cost at length, in seconds and memory, beside all scores at once?

One forward pass of the sweep's default model, scored by the chunked cross-entropy, at each of --lengths.  Both cores take
turns in one process and the best round of each counts; memory is the peak of a process of its own, above what it held
before the first pass.
"""

import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

from absl import flags

from jaxllm.errors import ConfigError
from jaxllm.study import choices, run_app
from jaxllm.study.files import write_text

METHODS = ("rope", "nope", "sinusoidal", "alibi", "t5", "xpos")
MODEL = dict(
  vocab_size=256, embed_dim=128, num_layers=3, num_heads=2, num_kv_heads=2, head_dim=64, mlp_dim=352
)
COLUMNS = ("method", "length", "plain s", "blockwise s", "blockwise / plain", "plain MB", "blockwise MB")

flags.DEFINE_string("lengths", "4096,8192,16384,32768", "sequence lengths")
flags.DEFINE_string("methods", "rope", f"position methods: all, or any of {', '.join(METHODS)}")
flags.DEFINE_integer("plain_up_to", 16384, "the longest length at which all scores at once are tried")
flags.DEFINE_integer("rounds", 3, "rounds; each core runs once a round")
flags.DEFINE_string("out", None, "directory for the table, attention_length.md; default: print it only")
flags.DEFINE_bool("smoke", False, "one length of 128, one round")


def check(f) -> None:
  """Refuse what cannot be measured."""
  lengths(f)
  choices.choice_list("methods", f.methods, METHODS)
  choices.positive("rounds", f.rounds)
  if f.plain_up_to < 0:
    raise ConfigError(f"--plain_up_to={f.plain_up_to}: expected a number of at least 0")


def lengths(f) -> tuple[int, ...]:
  """The lengths to measure."""
  text = "128" if f.smoke and not f["lengths"].present else f.lengths
  return choices.number_list("lengths", text, int, 2)


def forward(method: str, core: str, length: int):
  """A call that runs one forward pass over `length` tokens and waits for the losses, compiled when it is first called."""
  import jax
  import numpy as np

  from jaxllm.config import Layer, ModelConfig
  from jaxllm.nn.transformer import Transformer, head
  from jaxllm.ops.choose import CORES
  from jaxllm.ops.losses import cross_entropy
  from jaxllm.position import POSITIONS

  cfg = ModelConfig(**MODEL, layers=(Layer(POSITIONS[method]()),), attention=CORES[core]())
  model = Transformer(cfg)
  ids = np.random.default_rng(0).integers(0, 256, (1, length + 1)).astype(np.int32)
  params = jax.jit(model.init)(jax.random.key(0), ids[:, :2])["params"]

  @jax.jit
  def losses(params, ids):
    hidden_BTD, _ = model.apply({"params": params}, ids[:, :-1], logits=None)
    return cross_entropy(hidden_BTD, head(cfg, params), ids[:, 1:])[0]

  return lambda: jax.block_until_ready(losses(params, ids))


def best_seconds(sides, rounds: int) -> list[float]:
  """The fastest of `rounds` runs of each side, which take turns, after one that compiles."""
  best = [float("inf")] * len(sides)
  for number in range(rounds + 1):
    for i, side in enumerate(sides):
      start = time.perf_counter()
      side()
      if number:
        best[i] = min(best[i], time.perf_counter() - start)
  return best


def anonymous_bytes() -> int:
  """Anonymous memory of this process: what it has allocated, files left out (Linux)."""
  status = Path("/proc/self/status").read_text()
  return 1024 * int(status.split("RssAnon:")[1].split()[0])


def peak_bytes(method: str, core: str, length: int) -> int:
  """How much more memory this process holds at the height of one pass, compilation included, than before it."""
  run = forward(method, core, length)
  before = highest = anonymous_bytes()
  done = threading.Event()

  def watch():
    nonlocal highest
    while not done.wait(0.002):
      highest = max(highest, anonymous_bytes())

  watcher = threading.Thread(target=watch)
  watcher.start()
  run()
  done.set()
  watcher.join()
  return highest - before


def peak_of_own_process(method: str, core: str, length: int) -> int | None:
  """`peak_bytes` in a fresh process; None where the system does not say, or where the pass does not fit."""
  if not Path("/proc/self/status").exists():
    return None
  call = f"from experiments import attention_length as a; print(a.peak_bytes({method!r}, {core!r}, {length}))"
  done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=False)
  if done.returncode == 0:
    return int(done.stdout)
  if done.returncode < 0 or any(word in done.stderr for word in ("RESOURCE_EXHAUSTED", "MemoryError")):
    return None  # the system stopped it, or it was told that there is no more
  raise RuntimeError(f"memory of {method}, {core} at {length} tokens: {done.stderr.strip()[-500:]}")


def row(f, method: str, length: int) -> tuple:
  """One line of the table; None for what was not run."""
  cores = ("blockwise", "plain") if length <= f.plain_up_to else ("blockwise",)
  seconds = best_seconds([forward(method, core, length) for core in cores], 1 if f.smoke else f.rounds)
  peaks = [peak_of_own_process(method, core, length) for core in cores]
  (ours, plain), (our_peak, plain_peak) = ([*values, None][:2] for values in (seconds, peaks))
  ratio = None if plain is None else ours / plain
  return method, length, plain, ours, ratio, plain_peak, our_peak


def table(rows: list[tuple]) -> str:
  """The rows in Markdown."""
  number = lambda value, digits: "-" if value is None else f"{value:,.{digits}f}"
  megabytes = lambda value: number(None if value is None else value / 1e6, 0)
  lines = [f"| {' | '.join(COLUMNS)} |", "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
  for method, length, plain, ours, ratio, plain_peak, our_peak in rows:
    cells = (method, f"{length:,}", number(plain, 3), number(ours, 3), number(ratio, 2))
    lines.append(f"| {' | '.join((*cells, megabytes(plain_peak), megabytes(our_peak)))} |")
  return "\n".join(lines) + "\n"


def main(f) -> None:
  """Measure, print the table and, with --out, write it."""
  import jax

  machine = f"{platform.machine()}, {jax.devices()[0].device_kind}, jax {jax.__version__}, Python {platform.python_version()}"
  print(machine, flush=True)
  rows = []
  for method in choices.choice_list("methods", f.methods, METHODS):
    for length in lengths(f):
      rows.append(row(f, method, length))
      print(table(rows[-1:]).splitlines()[-1], flush=True)
  print(f"\n{table(rows)}", end="")
  if f.out is not None:
    Path(f.out).mkdir(parents=True, exist_ok=True)
    write_text(Path(f.out) / "attention_length.md", f"{machine}\n\n{table(rows)}")


if __name__ == "__main__":
  run_app(main, check=check)
