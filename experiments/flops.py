"""What does training a model cost? Parameters, FLOPs, memory a device, utilisation and days, from its settings alone.

FLOPs are those of products, two a multiplication and addition, counted exactly; a backward pass is two forward ones.  MFU is
what the model needs over what the devices could do, HFU counts what is computed again.  Nothing is loaded and nothing is run.
"""

from pathlib import Path

from absl import flags

from jaxllm.errors import ConfigError
from jaxllm.study import choices, run_app

FLAGS = flags.FlagValues()
SMOKE = "llama-7b"
"""The model of --smoke where none is given."""
COLUMNS = ("model", "quantity", "unit", "devices", "zero", "value", "status", "reason")


def _define() -> None:
  def flag(kind, name, default, about, *more):
    getattr(flags, f"DEFINE_{kind}")(name, default, *more, help=about, flag_values=FLAGS)

  flag(
    "string",
    "model",
    None,
    "a directory with a config.json, or a name of experiments.shapes such as llama-65b",
  )
  flag("float", "tokens", None, "tokens to train on; default 20 a parameter")
  flag("integer", "devices", 1, "chips")
  flag("enum", "device", "a100", "what they are", choices.DEVICES)
  flag("integer", "length", None, "tokens of a sequence; default the context of the model, at most 4096")
  flag("integer", "batch", 1, "sequences that a device holds at once")
  flag(
    "enum", "attention", "full", "which scores count: all, or those that the mask allows", ["full", "causal"]
  )
  flag(
    "enum",
    "remat",
    "none",
    "what the backward pass computes again: scores, or layers",
    ["none", "selective", "full"],
  )
  flag(
    "bool", "chunked_head", False, "logits are computed again too, as by the loss of more than 8192 tokens"
  )
  flag("integer", "zero", 0, "stage of ZeRO, 0 to 3")
  flag(
    "enum",
    "precision",
    "mixed",
    "bytes a parameter, with Adam: 2 + 2 + 12, 2 + 4 + 12, or 4 + 4 + 8 for parameters, gradients and optimizer",
    ["mixed", "megatron", "float32"],
  )
  flag("enum", "cache_type", "full", "the form of the key/value cache", choices.STORES)
  flag("float", "tokens_per_second", None, "what a device was measured at")
  flag("float", "mfu", None, "in its place: the model FLOPs utilisation to assume; default 0.4")
  flag("string", "out", None, "directory of report.md, results and the figure; default runs/flops_MODEL")
  flag("bool", "smoke", False, f"as it is, of {SMOKE} where no --model is given")


_define()


def check(f) -> None:
  """Refuse what cannot be counted."""
  if f.model is None and not f.smoke:
    raise ConfigError("--model is required: a directory with a config.json, or a name such as llama-65b")
  for name in ("devices", "length", "batch"):
    if f[name].value is not None and f[name].value < 1:
      raise ConfigError(f"--{name}={f[name].value}: expected a whole number of at least 1")
  for name in ("tokens", "tokens_per_second", "mfu"):
    if f[name].value is not None:
      choices.positive(name, f[name].value)
  if f.zero not in range(4):
    raise ConfigError(f"--zero={f.zero}: expected a stage from 0 to 3")
  if f.mfu is not None and f.tokens_per_second is not None:
    raise ConfigError(f"--mfu={f.mfu} with --tokens_per_second={f.tokens_per_second}: give one of them")
  if f.mfu is not None and f.mfu > 1:
    raise ConfigError(f"--mfu={f.mfu}: expected a share of the peak, above 0 and at most 1")


def main(f) -> None:
  """Count, print, and write the report, the results and the figure."""
  from experiments.cost import GB, Cost, tables
  from jaxllm.study import files, plots

  if f.model is None:
    f.model = SMOKE
  cost = Cost(f)
  experts = "" if cost.count.active == cost.count.parameters else f", {cost.count.active:,} of them active"
  heading = f"{cost.name}: {cost.count.parameters:,} parameters{experts}"
  print(heading)
  out, shown = Path(f.out or f"runs/flops_{Path(cost.name).resolve().name}"), tables(cost)
  for title, table in shown.items():
    table.show(title)
  axis = cost.axis()
  memory = {
    f"ZeRO {stage}": (axis, [sum(cost.memory(n, stage).values()) / GB for n in axis]) for stage in cost.stages
  }
  memory[f"memory of {f.device}"] = (axis, [cost.device.memory / GB] * len(axis))
  time = {f"training, MFU {cost.mfu:.0%}": (axis, [cost.days(n) for n in axis])}
  with files.Lock(out):
    files.write_results(out, cost.rows(), COLUMNS)
    body = "\n".join(f"## {title}\n\n{table.markdown()}" for title, table in shown.items())
    files.write_text(out / "report.md", f"# {heading}\n\n{body}")
    plots.lines(
      out / "devices.png",
      {"days": (time, {}), "memory, GB a device": (memory, {})},
      f"devices ({f.device}), each as fast as alone",
      "",
      f"{cost.name}: {cost.tokens:,.3g} tokens, batch {f.batch} of {cost.length:,} a device",
      ylog=True,
      one_scale=False,
    )
  print(f"report, results and figure: {out}")


if __name__ == "__main__":
  run_app(main, check, values=FLAGS)
