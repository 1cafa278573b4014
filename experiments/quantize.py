"""What does a quantization scheme save, and what does it cost? Bits, bytes, error of weights, perplexity and decoding speed.

Every scheme is put on the same weights of one model and scored on the same text, every token but the first once, in windows of
--window half of which overlap; `none` is the model as loaded.  Differences to `none` have 95 % intervals by a bootstrap that
draws stretches of the text, the same ones for both.  With --lengths it joins the length-extrapolation sweep: scheme x context
length x position method in one table.  Without --model and --run it trains the model of experiments.length_extrapolation first.
Killed at any moment, the same command goes on where it was.
"""

from pathlib import Path

from absl import flags

from jaxllm.errors import ConfigError
from jaxllm.study import choices, methods, run_app

FLAGS = flags.FlagValues()
SMOKE = {"tokens": 2000, "prompt": 8, "new": 9, "rounds": 2, "seconds": 0.0}
"""What --smoke sets, unless the flag is given."""
LEAST = {"window": 2, "tokens": 3, "prompt": 1, "new": 2, "batch": 1, "rounds": 2, "windows": 2}
"""The smallest values of flags."""
JOINED = ("methods", "windows")
"""Flags of the sweep, which --lengths joins."""
OF_MODEL = ("text", "train_length", "dtype", "mesh", "rules", "verify")
"""Flags that go with --model."""
METHODS = "none,pi,ntk,yarn"


def _define() -> None:
  def flag(kind, name, default, about, *more):
    getattr(flags, f"DEFINE_{kind}")(name, default, *more, help=about, flag_values=FLAGS)

  flag("string", "model", None, "the checkpoint: a directory or a repository of Hugging Face's")
  flag("string", "text", None, "with --model: UTF-8 text to score, a file or a directory of them")
  flag("string", "run", None, "the --out of a length-extrapolation sweep, whose first model is taken")
  flag(
    "string",
    "schemes",
    "all",
    "all, or names of jaxllm.quant.SCHEMES, each with fields of its own where wanted: int8,int4:group=32",
  )
  flag(
    "multi_string",
    "weights",
    [],
    "a rule, PATTERN=yes (in the scheme of each line), PATTERN=no (as loaded) or PATTERN=a scheme, where PATTERN is a regular "
    "expression of whole paths, as embed or layers/0/.+; it may be given several times, and the first that matches counts",
  )
  flag("bool", "quantize_head", False, "the head, too (where it is tied, with the embedding)")
  flag("string", "lengths", None, "context lengths of the joint table with position methods; default: none")
  flag("string", "methods", METHODS, f"with --lengths: position methods, any of {', '.join(methods.METHODS)}")
  flag("integer", "windows", 12, "with --lengths: windows of text a length is tested on")
  flag(
    "integer", "train_length", None, "with --model: tokens it was trained at; default what its settings say"
  )
  flag(
    "integer", "window", None, "tokens that the model reads at once; default its trained length, at most 4096"
  )
  flag("integer", "tokens", 100_000, "how many of the text's first tokens are scored, at most")
  flag("integer", "prompt", 32, "decoding: tokens of the prompt")
  flag("integer", "new", 65, "decoding: tokens to draw, of which all but the first are timed")
  flag(
    "float",
    "seconds",
    0.5,
    "decoding: a reading takes at least so long, by several texts where one is too short",
  )
  flag("integer", "batch", 1, "decoding: rows at once, whose prompts follow each other in the text")
  flag("integer", "rounds", 7, "decoding: how often each scheme and the model as loaded take turns")
  flag("enum", "dtype", "auto", "with --model: type of computing and parameters; auto: what the files say",
       ["auto", "float32", "bfloat16", "float16"])  # fmt: skip
  flag("string", "mesh", None, "with --model: devices to lay it out on, such as fsdp=2,tensor=4")
  flag("string", "rules", None, choices.RULES_HELP)
  flag("bool", "verify", True, f"with --model: {choices.VERIFY_HELP}")
  flag(
    "string", "out", None, "directory of the run; default runs/quantize (with the name of --model, _smoke)"
  )
  flag("bool", "smoke", False, "a tiny run that goes through everything: little text, two rounds of decoding")


_define()


def check(f) -> None:
  """Refuse flags that no model could serve."""
  given = {name for name in f if f[name].present}
  if f.model is not None and f.run is not None:
    raise ConfigError(f"--model={f.model} with --run={f.run}: both name a model; give one of them")
  if f.model is not None and f.text is None:
    raise ConfigError(f"--model={f.model} without --text: {f['text'].help}; give --text=FILE")
  if f.model is None and (own := sorted(given & set(OF_MODEL))):
    raise ConfigError(
      f"--{own[0]}={f[own[0]].value} without --model: a model of the sweep has its own; leave it out"
    )
  if f.text is not None and not (f.text and Path(f.text).exists()):
    raise ConfigError(f"--text={f.text}: there is no such file or directory; give UTF-8 text")
  if f.lengths is None and (own := sorted(given & set(JOINED))):
    raise ConfigError(
      f"--{own[0]}={f[own[0]].value} without --lengths: it is for the table by context length; give --lengths, or leave it out"
    )
  if f.rules is not None and f.mesh is None:
    raise ConfigError(
      f"--rules={f.rules} without --mesh: there is nothing to lay out; give --mesh, or leave it out"
    )
  for name, least in LEAST.items():
    if f[name].value is not None and f[name].value < least:
      raise ConfigError(f"--{name}={f[name].value}: expected a whole number of at least {least}")
  if not 0 <= f.seconds < float("inf"):
    raise ConfigError(f"--seconds={f.seconds}: expected a number of at least 0")
  from experiments.quantization import schemes

  schemes.parse(f.schemes)
  schemes.parse_rules(f.weights)
  if f.lengths is not None:
    choices.number_list("lengths", f.lengths, int, 1)
    choices.choice_list("methods", f.methods, tuple(methods.METHODS))
  if f.text is not None and Path(directory(f)).resolve().is_relative_to(Path(f.text).resolve()):
    raise ConfigError(
      f"--out={directory(f)} lies inside --text={f.text}, and would become part of it; use another --out"
    )


def directory(f) -> str:
  """Where the run lives."""
  name = f"runs/quantize_{Path(f.model).name}" if f.model else "runs/quantize"
  return f.out or name + ("_smoke" if f.smoke else "")


def main(f) -> int:
  """The whole run; 0, or 1 where a cell failed."""
  from experiments import provenance
  from experiments.quantization import cells, report, source
  from jaxllm.study.cells import Ledger, check_config, run_groups
  from jaxllm.study.files import Lock
  from jaxllm.study.progress import Progress
  from jaxllm.study.stop import StopFlag

  if f.smoke:
    for name, value in SMOKE.items():
      f[name].value = f[name].value if f[name].present else value
  out = Path(directory(f))
  models = source.open_models(f, out)
  plan = cells.Plan.of(f, models)
  config = {**provenance.record(), **plan.record(), **models.record()}
  with StopFlag() as stop, Lock(out), Progress() as progress, models.scope():
    ledger = Ledger(out / "cells.jsonl", check_config(out, config))
    groups = plan.groups()
    left = [group.name for group in groups if not ledger.finished(group.name)]
    models.begin(progress, stop, len(left))
    if left:
      models.params()  # here, as what is wrong with the weights is no property of a cell
    shown = progress.cells("cells", total=len(groups), done=len(groups) - len(left))
    work = cells.Work(plan, ledger, progress, stop)
    failures = run_groups(
      groups, ledger, work.compute, on_done=lambda group, rows: shown.update(group.name), stop=stop
    )
  report.write(out, plan, config, {group.name: ledger.done[group.name] for group in groups})
  if failures:
    print(f"{failures} rows of the table failed.  The same command tries them again.")
  return 1 if failures else 0


if __name__ == "__main__":
  run_app(main, check, values=FLAGS)
