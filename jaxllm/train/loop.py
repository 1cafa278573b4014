"""A training run from its last checkpoint to its end."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from jaxllm.errors import CheckpointError, JaxllmError
from jaxllm.nn.transformer import Transformer
from jaxllm.train import data
from jaxllm.train.checkpoint import Checkpoints
from jaxllm.train.step import State, TrainConfig, init_state, make_step

SAVE_EVERY = 25
"""Steps between checkpoints: at most this many are done again after a kill."""

MOST_SKIPPED = 64
"""Steps in a row whose gradients overflow: twice what takes the largest loss scale that a policy starts with, 2^32, to 1."""


class DivergedError(JaxllmError):
  """The loss is no longer a number, or no step is taken any more; the checkpoint before it is kept."""

  exit_code = 1


def fit(
  model: Transformer,
  config: TrainConfig,
  text: np.ndarray,
  seed: int,
  directory: Path,
  on_start: Callable[[int], None],
  on_step: Callable[[int, object], None],
  check_stop: Callable[[], None],
  stop: object = False,
) -> State:
  """Train to config.steps, or go on from the newest checkpoint in `directory`; the final state.

  `on_start(step)` is told where the run begins, `on_step(steps done, loss)` of each step (the loss may still be computing).
  `check_stop()` is called where the state is on disk, and may raise.  `stop`, such as a `StopFlag`, is true once the run is
  asked to stop: the step that runs then is saved, so that nothing is lost.  Raises CheckpointError if the checkpoints there
  are of another model, configuration, seed or text, or further than config.steps; OSError where there is no room to save.
  """
  with Checkpoints(directory) as checkpoints:
    state = init_state(model, config, seed)
    saved = checkpoints.restore(state)
    checkpoints.check_identity(
      {
        "model": model.cfg.to_dict(),
        "training": config.record(),
        "seed": seed,
        "text_sha256": hashlib.sha256(np.ascontiguousarray(text)).hexdigest(),
      }
    )
    state = state if saved is None else saved
    start = int(state["step"])
    if start > config.steps:
      raise CheckpointError(
        f"{directory}: trained for {start} steps, expected at most {config.steps}; use another --out"
      )
    on_start(start)
    if start == config.steps:
      return state
    checkpoints.check_room(state)
    if stop:
      check_stop()
    step_fn = make_step(model, config)
    losses = []
    for step in range(start, config.steps):
      state, loss = step_fn(state, data.batch(text, seed, step, config.batch_size, config.length))
      losses.append(loss)
      on_step(step + 1, loss)
      if (step + 1) % SAVE_EVERY == 0 or step + 1 == config.steps or stop:
        _check_finite(losses, state, directory)
        checkpoints.save(step + 1, state)
        losses = []
        check_stop()
    return state


def _check_finite(losses, state: State, directory: Path) -> None:
  """Before a save, so that a state of NaN never replaces a good one; no loss shows the last update yet."""
  values, step = np.asarray(losses, np.float64), int(state["step"])
  finite = np.isfinite(values)
  if not np.all(finite):
    first = int(np.argmin(finite))
    problem = f"the loss is {values[first]} at step {step - len(values) + 1 + first}"
  elif not all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state["params"])):
    problem = f"parameters are NaN or infinite after step {step}"
  elif "loss_scale" in state and (skipped := int(state["loss_scale"]["skipped"])) >= MOST_SKIPPED:
    scale = float(state["loss_scale"]["scale"])
    problem = f"gradients overflowed in all of the last {skipped} steps, to {step}, with a loss scale of {scale:g} now"
  else:
    return
  raise DivergedError(
    f"{directory}: {problem}; the checkpoint before it is kept. Lower --learning_rate and use another --out"
  )
