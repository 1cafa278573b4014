"""Train short, test long: how far does each position method stretch a model that was trained at a short context?

Trains one small byte-level decoder a scheme (RoPE, RoPE with log-n, ALiBi, ...) at --train_length, or with --model loads a
checkpoint, evaluates every method at --lengths on text it has not seen, and leaves a table, figures and machine-readable
results in --out.  Methods are switched on for the long test only, and the model is not tuned for them.  Killed at any moment,
the same command goes on where it was.
"""

import dataclasses
import functools
from pathlib import Path

from absl import flags

from experiments.extrapolation.settings import LoadSettings, Settings, read_settings
from jaxllm.study import choices, methods, run_app

flags.DEFINE_string(
  "out", None, "directory of the run; default runs/length_extrapolation (with _smoke for --smoke)"
)
flags.DEFINE_bool("smoke", False, "a tiny run that goes through everything in under 90 seconds")
flags.DEFINE_string(
  "schemes", "rope,rope_logn,alibi", f"how to train: all, or any of {', '.join(methods.SCHEMES)}"
)
flags.DEFINE_string(
  "methods",
  "default",
  f"how to test: default ({len(methods.DEFAULT)} of them), all, or any of {', '.join(methods.METHODS)}",
)
flags.DEFINE_string(
  "metrics",
  "all",
  f"what to measure: all, or any of {', '.join(methods.METRICS)}; with --model, of these and perplexity",
)
flags.DEFINE_string(
  "factors", None, "context multipliers to apply at every length; default length / train_length"
)
flags.DEFINE_integer(
  "train_length", 128, "context length of training, in bytes; with --model, in tokens and by default its own"
)
flags.DEFINE_string(
  "lengths",
  None,
  "context lengths to test; default 1, 2, 4, 8 and 16 times train_length, with --model 1, 2 and 4 times",
)
flags.DEFINE_integer("seeds", 1, "models to train a scheme; several give 95 % intervals")
flags.DEFINE_integer("steps", 750, "training steps of the first scheme")
flags.DEFINE_integer("other_steps", 400, "training steps of every other scheme")
flags.DEFINE_integer("batch_size", 16, "sequences a training step")
flags.DEFINE_float("learning_rate", 2e-3, "peak of the warm-up and cosine schedule")
flags.DEFINE_integer("embed_dim", 128, "model width")
flags.DEFINE_integer("num_layers", 3, "layers")
flags.DEFINE_integer("num_heads", 2, "attention heads; head_dim = embed_dim / num_heads")
flags.DEFINE_integer("mlp_dim", 352, "hidden width of the SwiGLU feed-forward layers")
flags.DEFINE_integer("windows", 12, "windows of text a length is tested on")
flags.DEFINE_string(
  "corpus",
  None,
  "a UTF-8 text file or a directory of them, a twentieth for validation; default Python's standard library",
)
flags.DEFINE_enum(
  "dtype",
  "auto",
  ["auto", "float32", "bfloat16"],
  "compute type; auto: bfloat16 but on a CPU, with --model what its files say",
)
flags.DEFINE_string(
  "model",
  None,
  "test this checkpoint instead of training: a directory or a repository of Hugging Face's; flags that say how to train are "
  "refused beside it",
)
flags.DEFINE_string("text", None, "with --model: UTF-8 text to test on, all of it, in place of --corpus")
flags.DEFINE_string("mesh", None, "with --model: devices to lay it out on, such as fsdp=2,tensor=4")
flags.DEFINE_string("rules", None, choices.RULES_HELP)
flags.DEFINE_bool("verify", True, f"with --model: {choices.VERIFY_HELP}")
flags.DEFINE_enum("attention", "auto", choices.CORES, "attention core; auto: by device, method and length")


def default_dtype(platform: str) -> str:
  """The compute type of a platform, fixed: on CPUs XLA's bfloat16 products measure slower than its float32 ones."""
  return "float32" if platform == "cpu" else "bfloat16"


def record(settings: Settings, models, dtype: str) -> dict:
  """Everything needed to repeat the run, for config.json."""
  from experiments import provenance
  from experiments.extrapolation import evaluate
  from jaxllm.evaluate import windows

  # before anything is trained or loaded: a forced core that cannot serve a method is an error here
  attention = evaluate.core_reports(settings, models)
  return {
    **provenance.record(),
    "settings": {k: v for k, v in dataclasses.asdict(settings).items() if k not in ("out", "verify")}
    | {"dtype": dtype},
    **models.record(),
    "evaluation": {
      "windows": settings.windows,
      "stride": windows.window_stride(models.text.ids, max(settings.lengths), settings.windows),
      "last_block": settings.train_length,
      "group_size": max(how.group_size for how in models.schemes.values()),
      "tokens_at_once": windows.TOKENS_AT_ONCE,
      "attention": attention,
      "dynamic_ntk": "one base a window; factor f at length L stretches by f L / L0 - (f - 1), 57 for f = 8 at 8 L0",
      "methods": {name: dataclasses.asdict(methods.METHODS[name]) for name in settings.methods},
    },
  }


def open_models(settings: Settings):
  """(the settings, complete; where the models come from; their compute type)."""
  import jax

  if isinstance(settings, LoadSettings):
    from experiments.extrapolation.loaded import Loaded

    models = Loaded(settings)
    return models.settings, models, models.dtype
  from experiments.extrapolation.trained import Trained

  dtype = default_dtype(jax.default_backend()) if settings.dtype == "auto" else settings.dtype
  return settings, Trained(settings, dtype), dtype


def main(f) -> int:
  """The whole run; 0, or 1 if a cell failed."""
  settings, models, dtype = open_models(read_settings(f))

  from experiments.extrapolation import evaluate, report
  from jaxllm.study.cells import Ledger, check_config, run_groups
  from jaxllm.study.files import Lock
  from jaxllm.study.progress import Progress
  from jaxllm.study.stop import StopFlag

  out = Path(settings.out)
  evaluate.check_tables_differ(settings, models)
  with StopFlag() as stop, Lock(out):
    config = record(settings, models, dtype)
    ledger = Ledger(out / "cells.jsonl", check_config(out, config))
    groups = methods.plan(
      list(models.schemes.values()),
      settings.methods,
      settings.metrics,
      settings.factors,
      settings.train_length,
      settings.lengths,
      settings.seeds,
      settings.windows,
    )
    with Progress() as progress, models.scope():
      done = sum(ledger.finished(group.name) for group in groups)
      cells = progress.cells("cells", total=len(groups), done=done)
      models.begin(progress, stop, len(groups) - done)
      run_groups(
        groups,
        ledger,
        functools.partial(evaluate.compute, settings, models),
        on_done=lambda group, rows: cells.update(group.name),
        stop=stop,
      )
      rows = [row for group in groups for row in ledger.done[group.name]]
      for scheme, seed in dict.fromkeys((r["scheme"], r["seed"]) for r in rows if r["status"] == "ok"):
        models.keep(scheme, seed)  # cells that are recorded do not ask for their model
    return report.write(out, settings, config, rows, models)


if __name__ == "__main__":
  run_app(main, check=read_settings)
