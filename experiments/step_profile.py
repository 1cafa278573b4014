"""What share of a training step's time is in matrix products, on one core: by the profilers of jax and of torch."""

from __future__ import annotations

import collections
import glob
import gzip
import json
import os
import re
import tempfile
from collections.abc import Callable

SHARES = ("products here share", "products of torch share", "attention kernel of torch share")
TORCH_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
TORCH_ATTENTION = "_scaled_dot_product"
CONTAINERS = ("while", "call", "conditional")


def shares(in_own_process: Callable[..., dict], directory: str, *task) -> dict[str, float]:
  """`SHARES` of a task (size, attention, dtype, batch, length), each side in a process of its own."""
  size, attention, *rest = task
  # without it products of float32 run on a library's threads, where the profiler does not see them
  xla = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"
  ours = in_own_process(f"step_profile.of_jax{(size, attention, *rest)!r}", XLA_FLAGS=xla)
  theirs = in_own_process(f"step_profile.of_torch{(directory, *rest)!r}", OMP_NUM_THREADS="1")
  names = dict(zip(SHARES, ("products", "products", "attention"), strict=True))
  return {name: (ours if "here" in name else theirs)[kind] for name, kind in names.items()}


def one_core() -> None:
  """Keeps this process on one of its cores."""
  os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def of_jax(size: str, attention: str, dtype: str, batch: int, length: int) -> dict[str, float]:
  """The share of a step's time in operations that are, or have within, a product."""
  one_core()
  import jax

  from experiments import training_speed

  step, run = training_speed.our_side(size, attention, dtype, batch, length)
  run()
  with tempfile.TemporaryDirectory() as directory:
    with jax.profiler.trace(directory):
      run()
    (path,) = glob.glob(f"{directory}/**/*.trace.json.gz", recursive=True)
    with gzip.open(path) as file:
      events = json.load(file)["traceEvents"]
  return {"products": product_share(step.as_text(), events)}


def product_share(text: str, events: list[dict]) -> float:
  """The share of products in the time of a trace's operations; text: the compiled program, which says what each one is."""
  products, has_dot, name = set(), set(), None
  for line in text.splitlines():  # a computation stands before those that call it
    if found := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
      name = found[1]
    elif found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = .*?[\])}] ([a-z][\w\-]*)\((.*)", line):
      called = re.search(r"calls=%?([\w.\-]+)", found[3])
      if found[2] == "dot" or (called and called[1] in has_dot):
        products.add(found[1])
        has_dot.add(name)
  spent = collections.Counter()
  for event in events:
    op = event.get("args", {}).get("hlo_op")
    if event.get("ph") == "X" and op is not None and op.split(".")[0] not in CONTAINERS:
      spent[op in products] += event["dur"]
  return spent[True] / sum(spent.values())


def of_torch(directory: str, dtype: str, batch: int, length: int) -> dict[str, float]:
  """The shares of a step's time in products, and in torch's attention kernel, forward and backward."""
  one_core()
  import torch

  from experiments import training_speed

  torch.set_num_threads(1)
  run = training_speed.torch_side(directory, dtype, batch, length)
  run()
  with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
    run()
  spent = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
  # oneDNN's products of 16-bit types are within aten::mm and its like
  products = sum(spent.get(name, 0) for name in TORCH_PRODUCTS)
  attention = sum(time for name, time in spent.items() if TORCH_ATTENTION in name)
  total = sum(spent.values())
  return {"products": products / total, "attention": attention / total}
