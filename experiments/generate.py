"""Continue a prompt with a model that experiments.length_extrapolation has trained, past its length by any method."""

import dataclasses
import json
import math
import os
import sys
from pathlib import Path

from absl import flags

from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.study import choices, methods, run_app, samplers

flags.DEFINE_string("run", "runs/length_extrapolation", "the --out of the run that trained the model")
flags.DEFINE_enum("scheme", "rope", list(methods.SCHEMES), "which of its models")
flags.DEFINE_integer("seed", 0, "the seed of the model, and of the draw")
flags.DEFINE_string("prompt", "def main(", "the text to continue; - reads standard input")
flags.DEFINE_integer("tokens", 256, "bytes to add")
flags.DEFINE_enum("method", "rerope", list(methods.METHODS), "position method")
flags.DEFINE_float(
  "factor", None, "context multiplier of the method; default: the whole text over the trained length"
)
samplers.define("bytes")


def check(f) -> None:
  """Refuse flags that no model could serve."""
  if reason := methods.not_applicable(methods.SCHEMES[f.scheme], f.method):
    raise ConfigError(f"--method={f.method} with --scheme={f.scheme}: {reason}; use --method=none")
  for name in ("tokens", "factor"):
    if f[name].value is not None:
      choices.positive(name, f[name].value)
  if f.factor is not None and not methods.METHODS[f.method].stretches:
    stretching = ", ".join(name for name, method in methods.METHODS.items() if method.stretches)
    raise ConfigError(
      f"--factor={f.factor} with --method={f.method}, which takes no factor; leave it out, or use one of {stretching}"
    )
  samplers.check(f)
  if f.prompt == "":
    raise ConfigError("--prompt=: empty, expected text to continue")


def load(run: Path, scheme: str, seed: int):
  """(config as it is tested, parameters) of a model of a run."""
  from jaxllm import tree
  from jaxllm.config import ModelConfig
  from jaxllm.nn import Transformer
  from jaxllm.train.checkpoint import restore_tree

  directory = run / "checkpoints" / f"{scheme}-{seed}"
  path, record = directory / "model.json", run / "config.json"
  if not record.is_file():
    smoke = run.with_name(f"{run.name}_smoke")
    if (smoke / "config.json").is_file():
      raise CheckpointError(
        f"{record}: no such file; there is a run with --smoke: give --run={smoke}, or run "
        f"`python -m experiments.length_extrapolation --out={run} --schemes={scheme}` first"
      )
    raise CheckpointError(
      f"{record}: no such file; run `python -m experiments.length_extrapolation --out={run} --schemes={scheme}` first"
    )
  settings = _read(record, lambda config: config["settings"], "restore the file")
  if scheme not in settings["schemes"] or seed not in range(settings["seeds"]):
    raise CheckpointError(
      f"{directory}: no such model; {run} has --scheme {', '.join(settings['schemes'])} with --seed "
      f"{', '.join(map(str, range(settings['seeds'])))}; to train others give length_extrapolation a new --out"
    )
  if not path.is_file():
    raise CheckpointError(f"{path}: no such file; run the command that trained {run} again")
  cfg = _read(path, ModelConfig.from_dict, "remove it, and run the command that trained it again")
  step, state = restore_tree(directory)

  import jax
  import jax.numpy as jnp

  expected = jax.eval_shape(Transformer(cfg).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
  tree.check_same(expected, state["params"], f"{directory}, step {step}")
  steps = _read(record, lambda config: config["training"][scheme]["steps"], "restore the file")
  if step < steps:
    print(
      f"note: {directory} is at step {step} of {steps}; the command that trained it goes on from there",
      file=sys.stderr,
    )
  return cfg, state["params"]


def _read(path: Path, build, advice: str):
  """build(the JSON value in a file); CheckpointError for a file that is damaged."""
  try:
    return build(json.loads(path.read_bytes()))
  except (ValueError, TypeError, KeyError) as e:  # ConfigError is a ValueError
    raise CheckpointError(f"{path}: damaged ({e}); {advice}") from e


def main(f) -> None:
  """Print the prompt and its continuation."""
  prompt = sys.stdin.buffer.read() if f.prompt == "-" else os.fsencode(f.prompt)
  cfg, params = load(Path(f.run), f.scheme, f.seed)

  import jax

  from jaxllm.generate.loop import generate
  from jaxllm.nn import Transformer
  from jaxllm.position import LogN

  method = methods.METHODS[f.method]
  train_length = json.loads((Path(f.run) / "config.json").read_text())["settings"]["train_length"]
  if method.position is not None:
    # dynamic NTK follows the length by itself: its factor comes on top
    own = 1.0 if f.method == "dynamic_ntk" else max(1.0, math.ceil((len(prompt) + f.tokens) / train_length))
    cfg = cfg.with_position(
      method.position, **({"factor": float(f.factor or own)} if method.stretches else {})
    )
  if method.log_n:
    cfg = dataclasses.replace(cfg, query_scale=LogN(train_length, floor=1.0))
  out = generate(
    Transformer(cfg),
    params,
    [list(prompt)],
    sampler=samplers.sampler(f),
    key=jax.random.key(f.seed),
    max_new_tokens=f.tokens,
  )
  sys.stdout.write((prompt + bytes(out.tokens[0])).decode("utf-8", errors="replace") + "\n")


if __name__ == "__main__":
  run_app(main, check=check)
