"""Runs to be disturbed, each in a process of its own that tells what it does: `python trainee.py` forks one a line of stdin.

A line is JSON: {"run": one of RUNS, "out": directory, and what that run takes}.  What is told are lines of stdout, the first
"PID n" and the last "EXIT status".  Nothing uses a device before the fork.
"""

import dataclasses
import hashlib
import json
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import train_cases
from absl import flags

from jaxllm import hf
from jaxllm.errors import CheckpointError
from jaxllm.failpoint import VARIABLE
from jaxllm.leaf import Matrix
from jaxllm.nn import Transformer
from jaxllm.study import run_app
from jaxllm.study.cells import Ledger
from jaxllm.study.files import Lock
from jaxllm.study.stop import StopFlag
from jaxllm.train import checkpoint, data, disk, loop, manifest

LARGE = dataclasses.replace(train_cases.CFG, embed_dim=32, head_dim=16, vocab_size=65_536)
"""Of a state of more than 48 MiB, which takes about as long to save as two steps take."""


def say(*words):
  os.write(1, (" ".join(map(str, words)) + "\n").encode())


def digest(state):
  """SHA-256 of the names, types, shapes and bytes of all arrays."""
  found = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    array = np.asarray(leaf)
    found.update(f"{manifest.plain(path)} {array.dtype} {array.shape}\n".encode())
    found.update(array.tobytes())
  return found.hexdigest()


class Told(checkpoint.Checkpoints):
  """Checkpoints that tell of what they do; "SAVED" is the promise that this step is not lost."""

  def save(self, step, state):
    sha = digest(state)
    say("SAVING", step, sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
    super().save(step, state)
    say("SAVED", step, sha)

  def restore(self, target):
    state = super().restore(target)
    say("RESTORED", 0 if state is None else int(state["step"]), digest(state or {}))
    return state


def train(request):
  """`fit` of a small or large model; takes steps, save_every, large."""
  with Lock(request["out"]), StopFlag() as stop:
    loop.Checkpoints, loop.SAVE_EVERY = Told, request["save_every"]
    model = Transformer(LARGE if request.get("large") else train_cases.CFG)

    class Slow(data.Stretches):
      def batch(self, step):
        say("DATA", step)
        time.sleep(request.get("data_seconds", 0))
        return super().batch(step)

    class Said(loop.Watch):
      def start(self, step):
        say("START", step)

      def step(self, step, metrics):
        say("STEP", step, np.float32(metrics["loss"]).tobytes().hex())

    state = loop.fit(
      model,
      train_cases.config(request["steps"]),
      Slow(train_cases.TEXT, 3, train_cases.BATCH, train_cases.LENGTH),
      3,
      Path(request["out"]),
      Said(),
      stop,
    )
    say("DONE", digest(state))


def some_state(step, mib):
  """A state that is a function of the step, of some mebibytes."""
  words = np.random.default_rng(step).integers(0, 2**32, (mib, 512, 512), np.uint32)
  return {"step": np.int32(step), "w": words}


def saves(request):
  """Goes on saving `some_state` to `steps`, from the newest step that is there; takes mib, by default 3."""
  mib = request.get("mib", 3)
  with Lock(request["out"]), Told(request["out"]) as checkpoints:
    found = checkpoints.restore(some_state(0, mib))
    start = 0 if found is None else int(found["step"])
    assert found is None or digest(found) == digest(some_state(start, mib))
    say("START", start)
    for step in range(start + 1, request["steps"] + 1):
      checkpoints.save(step, some_state(step, mib))
  say("DONE", digest(some_state(request["steps"], mib)))


def lines(request):
  """A ledger of `steps` groups, each recorded once."""
  with Lock(request["out"]):
    ledger = Ledger(Path(request["out"]) / "cells.jsonl", "0" * 64)
    say("START", len(ledger.done))
    for i in range(request["steps"]):
      if not ledger.finished(f"group {i}"):
        ledger.record(f"group {i}", [{"length": i, "value": i / 7, "status": "ok", "reason": None}])
        say("SAVED", i)
  say("DONE", hashlib.sha256((Path(request["out"]) / "cells.jsonl").read_bytes()).hexdigest())


def export(request):
  """A model as a directory: tells which of the models by seed is there, or why none is, and writes that of `seed`."""
  out, models = Path(request["out"]), {}
  shapes = jax.eval_shape(Transformer(train_cases.CFG).init, jax.random.key(0), np.zeros((1, 1), np.int32))
  for seed in (0, 1):
    draw = np.random.default_rng(seed)
    models[seed] = jax.tree.map(lambda x, d=draw: d.standard_normal(x.shape, np.float32), shapes["params"])
  try:
    say("RESTORED", read_export(models, out / "model"))
  except CheckpointError as e:
    say("RESTORED", "none", *str(e).split())
  hf.save(out / "model", train_cases.CFG, models[request["seed"]])
  say("DONE", read_export(models, out / "model"))


def read_export(models, path):
  """The seed of the model in a directory; a mixture of two is none."""
  cfg, params = hf.load(path)
  assert cfg.embed_dim == train_cases.CFG.embed_dim
  same = lambda a, b: all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), y), a, b)))
  return next(
    seed for seed, model in models.items() if same(jax.tree.map(dense, params, is_leaf=is_matrix), model)
  )


def is_matrix(leaf):
  return isinstance(leaf, Matrix)


def dense(leaf):
  """The values of a leaf of `hf.load`, as [in, out]."""
  return np.asarray(leaf.value).T if is_matrix(leaf) and leaf.stored == "oi" else np.asarray(leaf)


RUNS = {run.__name__: run for run in (train, saves, lines, export)}


def kill_within_arrays(out):
  """SIGKILL once a part of an array of the state has been written, and not all of it."""
  while not any(path.stat().st_size > 2**20 for path in Path(out).glob("*.saving/*-tmp/ocdbt.process_0/d/*")):
    time.sleep(1e-4)
  os.kill(os.getpid(), signal.SIGKILL)


def kill_before_orbax_commits():
  """SIGKILL where Orbax would give its directory its name."""
  rename = os.rename

  def instead(source, target, **kwargs):
    if ".orbax-checkpoint-tmp" in str(source):
      os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target, **kwargs)

  os.rename = os.replace = instead


def child(request):
  """Never returns."""
  fault = request.get("fault")
  if fault == "arrays_half":
    threading.Thread(target=kill_within_arrays, args=[request["out"]], daemon=True).start()
  elif fault == "orbax_commit":
    kill_before_orbax_commits()
  elif fault is not None:
    os.environ[VARIABLE] = fault
  if "largest_file" in request:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest_file"], resource.RLIM_INFINITY))
  if seconds := request.get("save_seconds"):
    write = disk.write_whole
    disk.write_whole = lambda *args: (time.sleep(seconds), write(*args))
  if "free_bytes" in request:
    disk.free_bytes = lambda directory: request["free_bytes"]
  if request.get("any_room"):  # so that a disk is full where a save has begun
    disk.check_room = lambda directory, size: None
  try:
    run_app(lambda _: RUNS[request["run"]](request), argv=["trainee"], values=flags.FlagValues())
  except SystemExit as e:
    sys.stderr.flush()
    os._exit(e.code)


def main():
  for line in sys.stdin:
    request = json.loads(line)
    pid = os.fork()
    if pid == 0:
      if "log" in request:
        os.dup2(os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
      child(request)
    say("PID", pid)
    say("EXIT", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


if __name__ == "__main__":
  main()
