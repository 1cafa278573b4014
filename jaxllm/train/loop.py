"""A training run from its last checkpoint to its end."""

from __future__ import annotations

import collections
import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from jaxllm import parallel
from jaxllm.errors import CheckpointError, JaxllmError
from jaxllm.nn.transformer import Transformer
from jaxllm.parallel.rules import Rules, RuleSet
from jaxllm.train import divergence
from jaxllm.train.checkpoint import Checkpoints
from jaxllm.train.loss_scale import all_finite
from jaxllm.train.step import State, TrainConfig, init_state, make_step
from jaxllm.train.trainable import trained, with_trained

SAVE_EVERY = 25
"""Steps between checkpoints: at most this many are done again after a kill."""

MOST_SKIPPED = 64
"""Steps in a row whose gradients overflow: twice what takes the largest loss scale that a policy starts with, 2^32, to 1."""

IN_FLIGHT = 2
"""Steps that are given to the devices ahead of what they have told: they never wait for the host, nor it for memory."""

_all_finite = jax.jit(all_finite)


class DivergedError(JaxllmError):
  """The loss is no longer a number, or no step is taken any more; the checkpoint before it is kept."""

  exit_code = 1


class Source(Protocol):
  """Where batches come from (`data.Stretches`, `batches.Batches`): each a pure function of its step."""

  identity: dict

  def batch(self, step: int) -> Any:
    """The batch of a step, on the host, whole in every process."""

  def describe(self, step: int) -> str:
    """What that batch is, for errors."""


class Watch:
  """What a run is told to; what a subclass leaves out is told to nobody."""

  def start(self, step: int) -> None:
    """The run begins, or goes on, after `step` steps."""

  def state(self, step: int, state: State) -> None:
    """`step` steps are given to the devices, which may still compute them; the state is gone with the next one."""

  def step(self, step: int, metrics: dict) -> None:
    """What `make_step` tells of each step, in order, some steps later."""

  def saving(self, step: int) -> None:
    """All that there is to tell of `step` steps is told; their checkpoint comes next."""


class Stop(Protocol):
  """Whether a run is asked to stop (`study.stop.StopFlag`)."""

  def __bool__(self) -> bool: ...

  def check(self) -> None:
    """Raises where it is: called where the state is on disk."""


def fit(
  model: Transformer,
  config: TrainConfig,
  source: Source,
  seed: int,
  directory: Path,
  watch: Watch | None = None,
  stop: Stop | None = None,
  *,
  params: Callable[[], Any] | None = None,
  mesh: Mesh | None = None,
  rules: RuleSet | Rules | None = None,
  identity: dict | None = None,
  save_every: int | None = None,
  keep: int = 2,
) -> State:
  """Train to config.steps, or go on from the newest checkpoint in `directory`; the final state.

  stop: once the run is asked to, the step that runs is saved, so that nothing is lost, and `stop.check` raises.
  params: makes those that training begins with (`init_state`).  Where only a part of them is trained, checkpoints hold that
  part, and params is called after a stop, too.
  mesh, rules: where the state lies; a run may go on on another mesh.  identity: what tells the run from others, beside model,
  configuration, seed and text.  save_every: steps between checkpoints (SAVE_EVERY), of which the newest `keep` stay.
  Raises CheckpointError if the checkpoints there are of another model, configuration, seed or text, or further than
  config.steps; OSError where there is no room to save; DivergedError where the loss or a parameter is no number, or nothing but
  skipped steps is left.
  """
  watch = watch or Watch()
  scope = contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)
  with Checkpoints(directory, keep) as checkpoints, scope:

    def begin() -> State:
      state = init_state(model, config, seed, None if params is None else params(), mesh, rules)
      if not checkpoints.steps:
        return state
      part = _to_save(state, config)
      target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), part)
      kept = None if part["params"] is state["params"] else state["params"]
      del part, state  # before there is another: a device may have room for one
      saved = checkpoints.restore(target)
      return (
        saved if kept is None else saved | {"params": with_trained(kept, saved["params"], config.trained)}
      )

    state = begin()
    checkpoints.check_identity(
      {"model": model.cfg.to_dict(), "training": config.record(), "seed": seed}
      | source.identity
      | (identity or {})
    )
    start = int(state["step"])
    if start > config.steps:
      raise CheckpointError(
        f"{directory}: trained for {start} steps, expected at most {config.steps}; use another --out"
      )
    watch.start(start)
    if start == config.steps:
      return state
    checkpoints.check_room(_to_save(state, config))
    if stop:
      stop.check()
    step_fn = make_step(model, config, mesh, rules, metrics=True)
    put = (lambda batch: batch) if mesh is None else lambda batch: parallel.shard_batch(batch, mesh)
    waiting, since = collections.deque(), []

    def tell(most: int) -> None:
      while len(waiting) > most:
        done, metrics = waiting.popleft()
        metrics = {name: np.asarray(value).item() for name, value in metrics.items()}
        since.append(metrics)
        watch.step(done, metrics)

    every = save_every or SAVE_EVERY
    for step in range(start, config.steps):
      state, metrics = step_fn(state, put(source.batch(step)))
      waiting.append((step + 1, metrics))
      watch.state(step + 1, state)
      tell(IN_FLIGHT)
      if (step + 1) % every == 0 or step + 1 == config.steps or stop:
        tell(0)
        if problem := _problem(since, state, config):
          del state
          if (at := _culprit(since, step + 1)) is not None:
            problem += f" ({divergence.explain(model, config, source, begin, step_fn, put, at)})"
          kept = (
            "the checkpoint before it is kept" if checkpoints.steps else "there is no checkpoint before it"
          )
          raise DivergedError(f"{directory}: {problem}; {kept}. Lower --learning_rate and use another --out")
        watch.saving(step + 1)
        checkpoints.save(step + 1, _to_save(state, config))
        since.clear()
        if stop is not None:
          stop.check()
    return state


def _to_save(state: State, config: TrainConfig) -> State:
  """The state without parameters that are not trained."""
  return state | {"params": trained(state["params"], config.trained)}


def _problem(since: list[dict], state: State, config: TrainConfig) -> str | None:
  """Before a save, so that a state of NaN never replaces a good one; no loss shows the last update yet."""
  step = int(state["step"])
  for i, metrics in enumerate(since):
    if not math.isfinite(metrics["loss"]):
      return f"the loss is {metrics['loss']} at step {step - len(since) + 1 + i}"
  if not _all_finite(trained(state["params"], config.trained)):
    return f"parameters are NaN or infinite after step {step}"
  if "loss_scale" in state and (skipped := int(state["loss_scale"]["skipped"])) >= MOST_SKIPPED:
    scale = float(state["loss_scale"]["scale"])
    return f"gradients overflowed in all of the last {skipped} steps, to {step}, with a loss scale of {scale:g} now"
  return None


def _culprit(since: list[dict], done: int) -> int | None:
  """The step, from 0, in which the first number that is not finite came up; None where steps are only skipped."""
  first = done - len(since)
  for i, metrics in enumerate(since):
    overflown = not math.isfinite(metrics["grad_norm"]) and "skipped" not in metrics
    if overflown or not math.isfinite(metrics["loss"]):
      return first + i
  return None if since[-1].get("skipped") else done - 1
