"""How well does a checkpoint predict a text? Perplexity, bits per byte and accuracy, every token scored exactly once.

The text is read in windows of --window tokens, --stride apart: the first scores all its tokens, each later one its last
--stride, so every token but the first is scored once, from at least window - stride tokens before it.  Intervals are of 95 %,
over 50 stretches of the text.  Killed at any moment, the same command goes on where it was.
"""

import dataclasses
import functools
import math
from pathlib import Path

from absl import flags

from jaxllm.errors import ConfigError
from jaxllm.study import choices, methods, run_app

FLAGS = flags.FlagValues()
METRICS = ("perplexity", "bpb", "accuracy")
SMOKE_WINDOW, SMOKE_TOKENS = 64, 400
LONGEST_DEFAULT = 4096
BLOCKS = 50
PARTS = 100
"""Into at most this many cells a text is cut: what a kill can lose."""
COLUMNS = (
  *("scheme", "quant", "method", "factor", "train_length", "length", "metric", "value", "seed"),
  *("status", "reason", "low", "high", "stride", "tokens", "bytes"),
)

flags.DEFINE_string(
  "model", None, "the checkpoint: a directory or a repository of Hugging Face's", flag_values=FLAGS
)
flags.DEFINE_string("text", None, "UTF-8 text to score: a file, or a directory of them", flag_values=FLAGS)
flags.DEFINE_string("metrics", "all", f"what to show: all, or any of {', '.join(METRICS)}", flag_values=FLAGS)
flags.DEFINE_integer(
  "window",
  None,
  f"tokens that the model reads at once; default its trained length, at most {LONGEST_DEFAULT}",
  flag_values=FLAGS,
)
flags.DEFINE_integer(
  "stride", None, "tokens from one window to the next; default half of --window", flag_values=FLAGS
)
flags.DEFINE_enum(
  "method", "none", list(methods.METHODS), "position method; none: as loaded", flag_values=FLAGS
)
flags.DEFINE_float(
  "factor",
  None,
  "context multiplier of the method; default --window over the trained length",
  flag_values=FLAGS,
)
flags.DEFINE_integer(
  "train_length", None, "tokens the model was trained at; default what its settings say", flag_values=FLAGS
)
flags.DEFINE_integer(
  "batch_size", None, "windows at once; default about 2048 tokens of them a device", flag_values=FLAGS
)
flags.DEFINE_string(
  "mesh", None, "devices to lay the model out on, such as fsdp=2,tensor=4", flag_values=FLAGS
)
flags.DEFINE_string("rules", None, choices.RULES_HELP, flag_values=FLAGS)
flags.DEFINE_enum(
  "dtype",
  "auto",
  ["auto", "float32", "bfloat16", "float16"],
  "type of computing and parameters; auto: what the files say",
  flag_values=FLAGS,
)
flags.DEFINE_enum(
  "attention", "auto", choices.CORES, "attention core; auto: by device, method and length", flag_values=FLAGS
)
flags.DEFINE_enum(
  "rope_precision",
  "exact",
  ["exact", "hf"],
  "angles: exact, or the float32 ones of transformers",
  flag_values=FLAGS,
)
flags.DEFINE_bool("verify", True, choices.VERIFY_HELP, flag_values=FLAGS)
flags.DEFINE_string(
  "out",
  None,
  "directory of the run; default one below runs/evaluate for each configuration",
  flag_values=FLAGS,
)
flags.DEFINE_bool(
  "smoke", False, f"windows of {SMOKE_WINDOW} over the first {SMOKE_TOKENS} tokens", flag_values=FLAGS
)


def check(f) -> None:
  """Refuse flags that no model could serve."""
  for name in ("model", "text"):
    if not f[name].value:
      raise ConfigError(f"--{name} is required: {f[name].help}")
  if not Path(f.text).exists():
    raise ConfigError(f"--text={f.text}: there is no such file or directory; give UTF-8 text")
  choices.choice_list("metrics", f.metrics, METRICS)
  for name in ("window", "stride", "batch_size", "train_length"):
    if f[name].value is not None and f[name].value < 1:
      raise ConfigError(
        f"--{name}={f[name].value}: found {f[name].value}, expected a whole number of at least 1"
      )
  if f.window is not None and f.stride is not None and f.stride > f.window:
    raise ConfigError(
      f"--stride={f.stride}: found {f.stride}, expected at most --window={f.window}, as tokens would be left out"
    )
  if f.factor is not None:
    if not (math.isfinite(f.factor) and f.factor >= 1):
      raise ConfigError(f"--factor={f.factor}: found {f.factor}, expected a number of at least 1")
    if not methods.METHODS[f.method].stretches:
      stretching = ", ".join(name for name, method in methods.METHODS.items() if method.stretches)
      raise ConfigError(
        f"--factor={f.factor} with --method={f.method}, which takes no factor; leave it out, or use one of {stretching}"
      )
  if f.rules is not None and f.mesh is None:
    raise ConfigError(
      f"--rules={f.rules} without --mesh: there is nothing to lay out; give --mesh, or leave it out"
    )


def main(f) -> int:
  """The whole run; 0, or 1 where a part failed."""
  from experiments import provenance
  from experiments.checkpoint import Checkpoint, method_on, scheme_of
  from experiments.scoring import Scoring, lines
  from jaxllm.evaluate import strided
  from jaxllm.study import describe, files
  from jaxllm.study.cells import Ledger, check_config, run_groups
  from jaxllm.study.progress import Progress
  from jaxllm.study.stop import StopFlag
  from jaxllm.train import data

  checkpoint = Checkpoint.open(f.model, f.dtype, f.attention, f.mesh, f.rules, f.rope_precision, f.verify)
  window, stride = lengths(f, checkpoint.trained_length)
  checkpoint.cfg.check_length(window, "--window")
  method_on(checkpoint, f.method, f.factor, f.train_length, window)  # refused before the text is read
  string, about = data.load_text(f.text)
  text = checkpoint.text(string, f"--text={f.text}")
  if f.smoke:
    text = dataclasses.replace(text, ids=text.ids[:SMOKE_TOKENS], sizes=text.sizes[:SMOKE_TOKENS])
  windows = strided.cover(len(text), window, stride)
  on = method_on(checkpoint, f.method, f.factor, f.train_length, windows.length)
  at_once = f.batch_size or strided.windows_at_once(windows.length) * checkpoint.rows
  scoring = Scoring(text, windows, strided.block_edges(len(text), BLOCKS), at_once, PARTS)
  config = {
    **provenance.record(),
    "model": str(f.model),
    "checkpoint": checkpoint.about(),
    "text": about | {"tokens": len(text), "begins": text.bos},
    "method": {"name": f.method, "factor": on.variant.factor, "train_length": on.train_length},
    "windows": {"length": windows.length, "stride": stride, "count": len(windows), "at_once": at_once},
    "intervals": f"95 %, Student's t over {len(scoring.edges) - 1} stretches of the text, as a ratio of their sums",
  }
  out = Path(f.out or f"runs/evaluate/{Path(f.model).name}-{files.digest(config)[:8]}")
  print("\n".join(describe.model_lines(on.tested, windows.length)))
  if checkpoint.mesh is not None:
    print(f"mesh: {checkpoint.about_mesh()}")
  if f.method == "none" and windows.length > on.train_length:
    advice = "; --method puts a position method on" if scheme_of(checkpoint.cfg).plain_rope else ""
    print(
      f"window: {windows.length / on.train_length:.4g} times the trained length of {on.train_length}{advice}"
    )
  if on.tested.layers != checkpoint.cfg.layers and (
    line := describe.replaced_line(checkpoint.cfg, on.train_length)
  ):
    print(line)
  print(
    f"text: {len(text)} tokens, {int(text.sizes.sum())} bytes; {len(windows)} windows of {windows.length}, stride {stride}"
    + ("" if text.bos is None else f"; each begins with token {text.bos}, as the tokenizer begins a text")
  )
  with StopFlag() as stop, files.Lock(out), Progress() as progress, checkpoint.scope():
    ledger = Ledger(out / "cells.jsonl", check_config(out, config))
    groups = scoring.groups()
    score = functools.partial(
      strided.score_text, on.model, ids=text.ids, windows=windows, tables=on.tables, bos=text.bos
    )
    # here, as what is wrong with the weights is no property of a part
    left = not all(ledger.finished(group.name) for group in groups)
    params = checkpoint.params() if left else None
    failures = run_groups(groups, ledger, scoring.compute(ledger, params, score, progress, stop), stop=stop)
    found = scoring.sums([row for group in groups for row in ledger.done[group.name]])
  shown = choices.choice_list("metrics", f.metrics, METRICS)
  cell = {
    **{"scheme": methods.LOADED, "quant": "none", "method": f.method, "factor": on.variant.factor},
    **{"train_length": on.train_length, "length": windows.length, "seed": 0, "stride": stride},
  }
  result = scoring.rows(cell, found, shown)
  files.write_results(out, result, COLUMNS)
  print("\n".join(lines(result)))
  print(f"Results: {out}")
  if failures:
    print(f"{failures} cells failed.  The same command tries them again.")
  return 1 if failures else 0


def lengths(f, trained: int | None) -> tuple[int, int]:
  """(window, stride), given or by default; ConfigError for a stride above the window."""
  longest = SMOKE_WINDOW if f.smoke else min(trained or LONGEST_DEFAULT, LONGEST_DEFAULT)
  window = f.window or max(longest, f.stride or 1)
  return window, f.stride or max(1, window // 2)


if __name__ == "__main__":
  run_app(main, check, values=FLAGS)
