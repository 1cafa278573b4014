"""Models that experiments.length_extrapolation has trained, read back."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from jaxllm.errors import CheckpointError, ConfigError


def load(run: Path, scheme: str, seed: int):
  """(config as it is tested, parameters) of a model of a run."""
  from jaxllm import tree
  from jaxllm.config import ModelConfig
  from jaxllm.nn import Transformer
  from jaxllm.train.checkpoint import restore_tree

  directory = run / "checkpoints" / f"{scheme}-{seed}"
  path, own = directory / "model.json", settings(run, scheme)
  if scheme not in own["schemes"] or seed not in range(own["seeds"]):
    raise CheckpointError(
      f"{directory}: no such model; {run} has --scheme {', '.join(own['schemes'])} with --seed "
      f"{', '.join(map(str, range(own['seeds'])))}; to train others give length_extrapolation a new --out"
    )
  if not path.is_file():
    raise CheckpointError(f"{path}: no such file; run the command that trained {run} again")
  cfg = _read(path, ModelConfig.from_dict, "remove it, and run the command that trained it again")
  step, state = restore_tree(directory)

  import jax
  import jax.numpy as jnp

  expected = jax.eval_shape(Transformer(cfg).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
  tree.check_same(expected, state["params"], f"{directory}, step {step}")
  steps = _read(run / "config.json", lambda config: config["training"][scheme]["steps"], "restore the file")
  if step < steps:
    print(
      f"note: {directory} is at step {step} of {steps}; the command that trained it goes on from there",
      file=sys.stderr,
    )
  return cfg, state["params"]


def trained_length(run: Path) -> int:
  """The length that the models of a run were trained at."""
  return settings(run)["train_length"]


def settings(run: Path, scheme: str = "rope") -> dict:
  """The settings of a run, as its config.json has them; CheckpointError, with the command to give, where there is none."""
  record = run / "config.json"
  if record.is_file():
    return _read(record, lambda config: config["settings"], "restore the file")
  command = f"`python -m experiments.length_extrapolation --out={run} --schemes={scheme}`"
  smoke = run.with_name(f"{run.name}_smoke")
  if (smoke / "config.json").is_file():
    raise CheckpointError(
      f"{record}: no such file; there is a run with --smoke: give --run={smoke}, or run {command} first"
    )
  raise CheckpointError(f"{record}: no such file; run {command} first")


def check_corpus(run: Path, corpus) -> None:
  """Raise ConfigError where the text of a run is another by now."""
  about = _read(run / "config.json", lambda config: config["corpus"], "restore the file")
  if corpus.about["sha256"] != about["sha256"]:
    raise ConfigError(
      f"{run}: its text, {about['source']}, has changed since; compare where the run was made"
    )


def _read(path: Path, build, advice: str):
  """build(the JSON value in a file); CheckpointError for a file that is damaged."""
  try:
    return build(json.loads(path.read_bytes()))
  except (ValueError, TypeError, KeyError) as e:  # ConfigError is a ValueError
    raise CheckpointError(f"{path}: damaged ({e}); {advice}") from e
