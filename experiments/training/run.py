"""A training run: the loop with what it tells, looks at and leaves."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments import provenance
from experiments.step_cost import count_of
from experiments.training import metrics as metrics_lib
from experiments.training import results
from experiments.training.begin import shapes_of
from experiments.training.notes import notes
from experiments.training.settings import Settings
from experiments.training.setup import Setup, set_up
from jaxllm import flops, parallel
from jaxllm.errors import DataError
from jaxllm.parallel import multihost
from jaxllm.study.files import Lock, write_json
from jaxllm.study.progress import Progress
from jaxllm.study.stop import StopFlag, Stopped
from jaxllm.train import loop
from jaxllm.train.batches import Batches
from jaxllm.train.evaluation import make_evaluate


def run(s: Settings) -> int:
  """Train to the end; 0."""
  if s.tensorboard:
    metrics_lib.check_tensorboard()
  multihost.initialize()
  first = jax.process_index() == 0
  setup, out = set_up(s), Path(s.out)
  said = notes(s, setup)  # in every process: what the mesh cannot hold is refused
  if first:
    print(*said, sep="\n", end="\n" * bool(said), flush=True)
  out.mkdir(parents=True, exist_ok=True)
  with StopFlag() as flag, contextlib.ExitStack() as lock, Progress() as progress:
    multihost.by_first(lambda: lock.enter_context(Lock(out)) and None, out)
    stop = flag if jax.process_count() == 1 else SharedStop(flag)
    watch = Watch(s, setup, out, progress if first else None)
    with multihost.together(), contextlib.closing(watch):
      state = loop.fit(
        setup.model,
        setup.config,
        Batches(setup.train, s.seed),
        s.seed,
        out / "checkpoints",
        watch,
        stop,
        params=setup.params,
        mesh=setup.mesh,
        rules=None if setup.rules is None else parallel.RULES[setup.rules],
        identity=setup.identity,
        save_every=s.save_every,
        keep=s.keep,
      )
      return results.write(s, setup, out, watch, state, first)


class SharedStop:
  """A `StopFlag` of which all processes know: a signal reaches each at another step, if at all, and none can go on alone.

  It is asked once a step in every process, and they agree every AGREED-th time.
  """

  AGREED = 8

  def __init__(self, flag: StopFlag):
    self._flag, self._asked, self._stopped = flag, 0, False

  def __bool__(self) -> bool:
    self._asked += 1
    if not self._stopped and self._asked % self.AGREED == 0:
      self._stopped = bool(multihost_utils.process_allgather(np.array(bool(self._flag))).any())
    return self._stopped

  def check(self) -> None:
    """Raises Stopped in all processes, or in none."""
    if self._stopped:
      raise Stopped("a signal")


class Watch(loop.Watch):
  """What is told of a run while it trains."""

  def __init__(self, s: Settings, setup: Setup, out: Path, progress: Progress | None):
    self._settings, self._setup, self._out, self._progress = s, setup, out, progress
    self.evaluate = make_evaluate(setup.model, setup.config, setup.held_out, s.eval_rows, setup.mesh)
    self._metrics, self._shown = None, None
    self._held_out: dict[int, float] = {}
    self._since, self._tracing = None, False
    self._away = 0.0  # seconds of looks at held-out text
    self._looks: dict[int, float] = {}  # when the steps before each were done, until it is told of
    self._tokens = s.batch_size * s.length
    shards = 1 if setup.mesh is None else parallel.batch_shards(setup.mesh)
    self._peak, self._cost = _peak(s.device), None
    with contextlib.suppress(DataError):  # products that cannot be counted
      if self._peak is not None and self._progress is not None:
        self._cost = count_of(setup.model.cfg, setup.config, shards, shapes_of(s, setup.model.cfg))

  @property
  def rows(self) -> list[dict]:
    """The rows of metrics."""
    return [] if self._metrics is None else self._metrics.rows

  def start(self, step: int) -> None:
    """The run goes on from `step`."""
    multihost.by_first(lambda: self._open(step), self._out)

  def _open(self, step: int) -> None:
    """The files of the first process: not before, as a run that is refused leaves the record of the directory's own."""
    s = self._settings
    write_json(self._out / "config.json", {**provenance.record(), "settings": dataclasses.asdict(s)})
    self._metrics = metrics_lib.Metrics(self._out, step, s.tensorboard)
    self._shown = self._progress.training(
      f"train {s.name}", s.steps, step, self._tokens, self._utilisation, self._clock
    )

  def state(self, step: int, state) -> None:
    s = self._settings
    if s.profile is not None and step in s.profile:
      jax.block_until_ready(state)
      if step == s.profile[0]:
        jax.profiler.start_trace(str(self._out / "profile"))
      elif self._tracing:  # a run that goes on from within these steps began none
        jax.profiler.stop_trace()
      self._tracing = step == s.profile[0]
    if (s.eval_every and step % s.eval_every == 0) or step == s.steps:
      jax.block_until_ready(state)
      self._looks[step] = self._clock()
      self._held_out[step] = self.evaluate(state["params"])["loss"]
      self._away += self._clock() - self._looks[step]

  def step(self, step: int, metrics: dict) -> None:
    if self._metrics is None:
      return
    self._shown.update(step, metrics["loss"])
    s, held_out = self._settings, self._held_out.pop(step, None)
    if step % s.log_every and step != s.steps and held_out is None:
      return
    speed = self._speed(step)
    mfu, hfu = (None, None) if speed is None else self._utilisation(speed) or (None, None)
    self._metrics.add(
      metrics
      | dict(step=step, skipped=step - metrics["updates"], held_out_loss=held_out)
      | dict(tokens_per_second=speed, mfu=mfu, hfu=hfu)
    )

  def saving(self, step: int) -> None:
    """Rows are on disk before the checkpoint of their steps is."""
    if self._metrics is not None:
      self._metrics.sync()

  def _speed(self, step: int) -> float | None:
    """Slots a second since the row that was timed last; None for the first, and where the time of a step is not known.

    What is told of the steps before a look at held-out text comes after it, when all of them are done: they are timed together.
    """
    if step not in self._looks and any(step < look for look in self._looks):
      return None
    since, self._since = self._since, (step, self._looks.pop(step, self._clock()))
    return None if since is None else (step - since[0]) * self._tokens / (self._since[1] - since[1])

  def _clock(self) -> float:
    """Seconds, in which a look at held-out text takes no time."""
    return time.monotonic() - self._away

  def _utilisation(self, tokens_per_second: float) -> tuple[float, float] | None:
    """(MFU, HFU) of all devices; None where the peak of one is not known, or how many products a step has."""
    if self._cost is None:
      return None
    each = tokens_per_second / (1 if self._setup.mesh is None else math.prod(self._setup.mesh.shape.values()))
    return self._cost.mfu(each, self._peak), self._cost.hfu(each, self._peak)

  def close(self) -> None:
    """Close the files, and end a trace whose last step did not come."""
    if self._tracing:
      self._tracing = False
      jax.profiler.stop_trace()
    if self._metrics is not None:
      self._metrics.__exit__()


def _peak(name: str | None) -> float | None:
  """FLOP/s of a chip, by name or as jax calls it."""
  name = name or flops.known_as(jax.devices()[0].device_kind)
  return None if name is None else flops.DEVICES[name].flops
