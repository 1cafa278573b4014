"""How fast is a training step, beside transformers under torch with the same weights, batch and optimizer, on this machine?

A random Llama of --size goes to transformers as the checkpoint that this project writes.  Both sides take whole steps of
AdamW (gradients clipped to norm 1, weight decay on the matrices of the layers, a constant rate; torch's is the fused one) on
the same tokens, in turns within one process, torch eagerly and by torch.compile, which needs a C++ compiler.  bfloat16 is the
policy of that name here (float32 parameters, products in bfloat16), and autocast there.  The losses of the first steps tell
whether it is the same work.  Speeds are medians over rounds; ratios are means of the rounds' logarithms, with 95 % intervals.

The share of time in products is of one core, in processes of their own, by the profilers of jax and torch; torch's attention
kernel, which has products within, is told apart.  The time to compile is of the step with layers scanned (one compiled body)
and unrolled, each in a new process without a compilation cache.

On a GPU, torch's side is there too, in torch's own types of `autocast`, and where the chip is known MFU and HFU are told, by
the convention of `flops` (all pairs of tokens count); shares are of CPUs only.

The bars, of a CPU and the 20 M-parameter shape: tokens a second against torch, eager and compiled, at least 1.0 times in
float32 and 0.7 times in bfloat16 (the aim is 1.0); 32 scanned layers compile in at most 1.5 times the time of 8.  Exits with 1
where one is missed, or where the losses differ.
"""

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
from collections.abc import Callable
from pathlib import Path

from absl import flags

from experiments import loading, provenance, step_profile
from experiments.training import settings
from jaxllm.errors import ConfigError
from jaxllm.study import choices, interval, run_app
from jaxllm.study import rows as rows_lib
from jaxllm.study.files import write_json

BARS = {"float32": 1.0, "bfloat16": 0.7}
"""The least ratio of tokens a second to each of torch's."""
DEPTHS, COMPILE_BAR = (8, 32), 1.5
"""Layers, and the most that compiling the deeper step may take of the time for the other."""
SAME = {"float32": 1e-4, "bfloat16": 5e-3}
"""The most that losses of the first steps differ by, relative: types round otherwise in both."""
STEPS = 3
"""Steps whose losses are compared."""
SIZES = {
  "20m": dict(vocab_size=8192, embed_dim=384, num_layers=8, num_heads=6, mlp_dim=1024),
  "1b": dict(vocab_size=32000, embed_dim=2048, num_layers=20, num_heads=16, mlp_dim=5632),
  "tiny": dict(vocab_size=64, embed_dim=16, num_layers=2, num_heads=2, mlp_dim=32),
}
"""Shapes by name (fields of ModelConfig); as many key heads as heads, a head of its own: 20.5 M, 1.16 G, 10 k parameters."""
RATE, DECAY, BETAS, CLIP = 1e-3, 0.1, (0.9, 0.98), 1.0
TORCH = ("torch", "torch.compile")
COLUMNS = ("size", "dtype", "length", "batch", "metric", "value", *rows_lib.OUTCOME[1:])
FLAGS = flags.FlagValues()

flags.DEFINE_enum("size", "20m", list(SIZES), "of the random Llama", flag_values=FLAGS)
flags.DEFINE_string("dtypes", "float32,bfloat16", f"all, or any of {', '.join(BARS)}", flag_values=FLAGS)
flags.DEFINE_integer("length", 512, "tokens of a row", flag_values=FLAGS)
flags.DEFINE_integer("batch", 4, "rows of a step", flag_values=FLAGS)
flags.DEFINE_integer("rounds", 7, "rounds; each side takes a step a round", flag_values=FLAGS)
flags.DEFINE_enum(
  "attention", "auto", choices.CORES, "attention core; auto: by device, method and length", flag_values=FLAGS
)
flags.DEFINE_enum(
  "remat", "none", settings.REMATS, "what a layer keeps for its gradient, here", flag_values=FLAGS
)
flags.DEFINE_bool("scan", False, "layers as one compiled body, here", flag_values=FLAGS)
flags.DEFINE_bool("compiled", True, "also torch.compile", flag_values=FLAGS)
flags.DEFINE_bool("shares", True, "also the share of time in products", flag_values=FLAGS)
flags.DEFINE_bool("depths", True, "also the time to compile", flag_values=FLAGS)
flags.DEFINE_string(
  "out", None, "directory for results.jsonl, results.csv and config.json", flag_values=FLAGS
)
flags.DEFINE_bool("smoke", False, "the tiny Llama in float32, one round, torch eagerly", flag_values=FLAGS)


def check(f) -> None:
  """Refuse what cannot be measured."""
  choices.choice_list("dtypes", f.dtypes, BARS)
  for name in ("length", "batch"):
    choices.positive(name, f[name].value)
  if f.rounds < 2:
    raise ConfigError(f"--rounds={f.rounds}: expected at least 2, as one ratio has no interval")
  missing = [name for name in ("transformers", "torch") if importlib.util.find_spec(name) is None]
  if missing:
    raise ConfigError(
      f"{' and '.join(missing)}: not installed, and the other side of the comparison; pip install -e '.[parity]'"
    )


def model_config(size: str, attention: str, layers: int | None = None):
  """The decoder that both sides run, with another number of layers if one is given."""
  from jaxllm.config import Layer, ModelConfig
  from jaxllm.ops.choose import CORES
  from jaxllm.position import Rope

  shape = SIZES[size] | ({} if layers is None else {"num_layers": layers})
  heads = shape["num_heads"]
  more = dict(num_kv_heads=heads, head_dim=shape["embed_dim"] // heads, layers=(Layer(Rope()),))
  return ModelConfig(**shape, **more, attention=CORES[attention](), dtype="float32")


def train_config(dtype: str, batch: int, length: int, remat: str = "none"):
  """The run that both sides are of."""
  from jaxllm.train.precision import POLICIES
  from jaxllm.train.schedules import Constant
  from jaxllm.train.step import TrainConfig

  return TrainConfig(
    *(1000, batch, length),
    **dict(learning_rate=RATE, warmup=0.0, weight_decay=DECAY, beta1=BETAS[0], beta2=BETAS[1]),
    **dict(clip_norm=CLIP, rate=Constant(), precision=POLICIES["bf16" if dtype == "bfloat16" else "model"]),
    remat=remat,
  )


def batch_of(vocab_size: int, batch: int, length: int):
  """Random ids, [batch, length + 1]."""
  import numpy as np

  return np.random.default_rng(0).integers(0, vocab_size, (batch, length + 1)).astype(np.int32)


def our_side(
  size: str,
  attention: str,
  dtype: str,
  batch: int,
  length: int,
  directory: str | None = None,
  remat: str = "none",
  scan: bool = False,
):
  """(the compiled step, one step with its loss); writes the weights before the first to `directory`, if one is given."""
  import jax.numpy as jnp

  from jaxllm import hf, tree
  from jaxllm.nn import Transformer
  from jaxllm.train.step import init_state, make_step

  cfg, config = model_config(size, attention), train_config(dtype, batch, length, remat)
  model, tokens = Transformer(cfg, scan=scan), jnp.asarray(batch_of(cfg.vocab_size, batch, length))
  held = {"state": init_state(model, config, 0)}
  if directory is not None:
    params = held["state"]["params"]
    hf.save(directory, cfg, tree.unstack_layers(params) if scan else params)
  step = make_step(model, config).lower(held["state"], tokens).compile()

  def run() -> float:
    held["state"], loss = step(held["state"], tokens)
    return float(loss)

  return step, run


def torch_side(directory: str, dtype: str, batch: int, length: int, compiled: bool = False):
  """One step of transformers' Llama, with its loss, from the weights in `directory`, on the GPU if jax has one."""
  import jax
  import torch
  import transformers

  device = "cuda" if jax.default_backend() == "gpu" else "cpu"
  model = transformers.AutoModelForCausalLM.from_pretrained(
    directory, dtype=torch.float32, attn_implementation="sdpa", use_cache=False
  ).to(device)
  model.train()
  inside = [x for name, x in model.named_parameters() if name.endswith("proj.weight")]
  others = [x for name, x in model.named_parameters() if not name.endswith("proj.weight")]
  groups = [{"params": inside, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
  optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, fused=True)
  compute = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")
  tokens = torch.tensor(batch_of(model.config.vocab_size, batch, length), dtype=torch.long, device=device)

  def forward():
    with compute:
      logits = model(input_ids=tokens[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

  forward = torch.compile(forward) if compiled else forward

  def run() -> float:
    optimizer.zero_grad(set_to_none=True)
    loss = forward()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    return loss.item()

  return run


def measure(sides: dict[str, Callable[[], float]], rounds: int) -> tuple[dict, dict]:
  """(losses of the first steps, seconds of a step a round) of each side, which take turns after those first steps."""
  losses = {name: [run() for _ in range(STEPS)] for name, run in sides.items()}
  seconds: dict[str, list[float]] = {name: [] for name in sides}
  for _ in range(rounds):
    for name, run in sides.items():
      start = time.perf_counter()
      run()
      seconds[name].append(time.perf_counter() - start)
  return losses, seconds


def compared(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
  """(ratio of our speed to theirs, the ends of its 95 % interval) from seconds of the same rounds."""
  logs = [math.log(b / a) for a, b in zip(ours, theirs, strict=True)]
  center, half = interval.mean(logs), interval.half_width(logs) if len(logs) > 1 else math.inf
  return tuple(math.exp(x) for x in (center, center - half, center + half))


def compile_seconds(size: str, attention: str, batch: int, length: int, layers: int, scan: bool) -> dict:
  """Seconds to trace and to compile the float32 step of so many layers, and the instructions of the compiled program."""
  import jax

  from jaxllm.nn import Transformer
  from jaxllm.train.step import init_state, make_step

  jax.config.update("jax_enable_compilation_cache", False)
  cfg, config = model_config(size, attention, layers), train_config("float32", batch, length)
  model, tokens = Transformer(cfg, scan=scan), batch_of(cfg.vocab_size, batch, length)
  state = jax.eval_shape(lambda: init_state(model, config, 0))
  start = time.perf_counter()
  lowered = make_step(model, config).lower(state, tokens)
  traced = time.perf_counter()
  text = lowered.compile().as_text()
  return {
    "trace": traced - start,
    "compile": time.perf_counter() - traced,
    "instructions": sum(" = " in line for line in text.splitlines()),
  }


def in_own_process(call: str, **environment: str) -> dict:
  """What that call of this module or of `step_profile` returns, in a new process."""
  code = f"import json; from experiments import step_profile, training_speed; print(json.dumps({call}))"
  run = subprocess.run(
    [sys.executable, "-c", code],
    env=os.environ | environment,
    **dict(capture_output=True, text=True, check=False),
  )
  if run.returncode:
    raise RuntimeError(f"{call}: {run.stderr.strip()[-2000:]}")
  return json.loads(run.stdout.splitlines()[-1])


def speeds(dtype: str, f, notes: list[str], problems: list[str]) -> dict[str, float]:
  """The numbers of one line of the first table; adds what is not measured, and what is missed."""
  import jax

  directory, task = tempfile.mkdtemp(prefix="jaxllm-speed-"), (dtype, f.batch, f.length)
  try:
    sides = {"jaxllm": our_side(f.size, f.attention, *task, directory, f.remat, f.scan)[1]}
    sides["torch"] = torch_side(directory, *task)
    if f.compiled and shutil.which(os.environ.get("CXX", "g++")) is None:
      notes.append("NOT MEASURED: torch.compile, which needs a C++ compiler (g++)")
    elif f.compiled:
      sides["torch.compile"] = torch_side(directory, *task, compiled=True)
    losses, seconds = measure(sides, f.rounds)
    found = utilised(dtype, f, statistics.median(seconds["jaxllm"]))
    for name, times in seconds.items():
      found[f"{name} tokens/s"] = f.batch * f.length / statistics.median(times)
      if name == "jaxllm":
        continue
      ratio, low, high = compared(seconds["jaxllm"], times)
      found |= {f"{name} ratio": ratio, f"{name} ratio low": low, f"{name} ratio high": high}
      differs = max(abs(a - b) / abs(b) for a, b in zip(losses["jaxllm"], losses[name], strict=True))
      found[f"{name} loss difference"] = differs
      if not differs <= SAME[dtype]:
        told = ", ".join(f"{a:.4f} and {b:.4f}" for a, b in zip(losses["jaxllm"], losses[name], strict=True))
        problems.append(f"MISSED: {dtype}, losses of the first steps here and by {name}: {told}")
    if f.shares and (jax.default_backend() != "cpu" or f.scan or f.remat != "none"):
      notes.append(
        "NOT MEASURED: the share of time in products, which is told on CPUs, without --scan and --remat"
      )
    elif f.shares:
      found |= step_profile.shares(in_own_process, directory, f.size, f.attention, *task)
  finally:
    shutil.rmtree(directory)
  return found


def utilised(dtype: str, f, seconds: float) -> dict[str, float]:
  """MFU and HFU of a step that takes so long; nothing of a chip that is not known, and of float32, whose peak is not told."""
  import jax

  from experiments.step_cost import count_of
  from jaxllm import flops

  chip = flops.known_as(jax.devices()[0].device_kind)
  if chip is None or dtype == "float32":
    return {}
  cost = count_of(model_config(f.size, f.attention), train_config(dtype, f.batch, f.length, f.remat), 1)
  speed, peak = f.batch * f.length / seconds, flops.DEVICES[chip].flops
  return {"MFU": cost.mfu(speed, peak), "HFU": cost.hfu(speed, peak)}


def missed(dtype: str, found: dict[str, float]) -> list[str]:
  """The bars that the numbers of a line miss, in words."""
  return [
    f"{name} ratio {found[f'{name} ratio']:.2f}, expected at least {BARS[dtype]}"
    for name in TORCH
    if f"{name} ratio" in found and found[f"{name} ratio"] < BARS[dtype]
  ]


def line(dtype: str, found: dict[str, float]) -> str:
  """One line of the first table in Markdown."""
  cells = [dtype, f"{found['jaxllm tokens/s']:,.0f}"]
  for name in TORCH:
    if f"{name} ratio" in found:
      ends = (found[f"{name} ratio{which}"] for which in ("", " low", " high"))
      cells += [f"{found[f'{name} tokens/s']:,.0f}", "{:.2f} ({:.2f} to {:.2f})".format(*ends)]
      cells.append(f"{found[f'{name} loss difference']:.1e}")
    else:
      cells += ["-"] * 3
  cells += [f"{found[name]:.1%}" if name in found else "-" for name in ("MFU", "HFU")]
  cells += [f"{found[name]:.0%}" if name in found else "-" for name in step_profile.SHARES]
  return f"| {' | '.join(cells)} |"


def depths(f, problems: list[str]) -> list[tuple[str, dict[str, float]]]:
  """Prints the second table; (layers and form, numbers) of its lines; adds what is missed."""
  print("\n| layers | form | trace s | compile s | instructions |\n|---:|---|---:|---:|---:|", flush=True)
  found = []
  for scan in (True, False):
    both = []
    for layers in DEPTHS if f.size != "tiny" else (2, 4):
      call = f"training_speed.compile_seconds({f.size!r}, {f.attention!r}, {f.batch}, {f.length}, {layers}, {scan})"
      both.append(in_own_process(call))
      form = "scanned" if scan else "unrolled"
      cells = (f"{both[-1]['trace']:.2f}", f"{both[-1]['compile']:.2f}", f"{both[-1]['instructions']:,}")
      print(f"| {layers} | {form} | {' | '.join(cells)} |", flush=True)
      found.append((f"{layers} layers {form}", both[-1]))
    ratio = both[1]["compile"] / both[0]["compile"]
    found.append((form, {"compile ratio": ratio}))
    if scan and f.size != "tiny" and ratio > COMPILE_BAR:
      problems.append(
        f"MISSED: compiling 32 scanned layers took {ratio:.2f} times as long, at most {COMPILE_BAR}"
      )
  return found


def main(f) -> int:
  """Measure, print the tables and, with --out, write their numbers; 1 where a bar is missed."""
  import jax
  import torch
  import transformers

  if f.smoke:
    f.size, f.dtypes, f.length, f.batch, f.rounds = "tiny", "float32", 8, 2, 2
    f.compiled = f.shares = f.depths = False
  cores, device = len(os.sched_getaffinity(0)), jax.devices()[0]
  chip = f"{device.device_kind}, " if device.platform != "cpu" else ""
  print(
    f"{chip}{provenance.processor()}, {cores} cores, jax {jax.__version__}, torch {torch.__version__} on "
    f"{torch.get_num_threads()} threads, transformers {transformers.__version__}, Python {platform.python_version()}; "
    f"{f.batch} rows of {f.length} tokens\n"
  )
  header = ["dtype", "jaxllm tokens/s"]
  for name in TORCH:
    header += [f"{name} tokens/s", "ratio", "losses differ"]
  header += ["MFU", "HFU"]
  header += [name.replace(" share", "") for name in step_profile.SHARES]
  print(f"| {' | '.join(header)} |\n|---{'|---:' * (len(header) - 1)}|", flush=True)
  rows, problems, notes = [], [], []
  cell = {"size": f.size, "length": f.length, "batch": f.batch}
  for dtype in choices.choice_list("dtypes", f.dtypes, BARS):
    found = speeds(dtype, f, notes, problems)
    print(line(dtype, found), flush=True)
    if f.size == "20m" and jax.default_backend() == "cpu":
      problems += [f"MISSED: {dtype}: {one}" for one in missed(dtype, found)]
    rows += [rows_lib.ok(cell | {"dtype": dtype, "metric": name}, value) for name, value in found.items()]
  for form, found in depths(f, problems) if f.depths else ():
    rows += [
      rows_lib.ok(cell | {"dtype": "float32", "metric": f"{form}: {name}"}, value)
      for name, value in found.items()
    ]
  if notes:
    print("\n" + "\n".join(dict.fromkeys(notes)))
  if f.out is not None:
    Path(f.out).mkdir(parents=True, exist_ok=True)
    told = {
      "torch": torch.__version__,
      "transformers": transformers.__version__,
      "flags": f.flag_values_dict(),
    }
    write_json(Path(f.out) / "config.json", provenance.record() | told)
  return loading.end(f.out, rows, COLUMNS, problems)


if __name__ == "__main__":
  run_app(main, check=check, values=FLAGS)
