"""Does it fit? A training step or the decoding of a token, compiled for TPUs that are not there: memory, FLOPs, collectives.

The program is the one that a run has, the compiler that of the TPU (`pip install 'jaxllm[tpu]'`, on any Linux machine), and the
model a config: no weight is loaded or made.  Without --topology it is compiled for the devices at hand.
"""

import math
from pathlib import Path

from absl import flags

from experiments.training import settings
from jaxllm.errors import ConfigError
from jaxllm.study import choices, run_app

FLAGS = flags.FlagValues()
COLUMNS = ("model", "job", "topology", "mesh", "rules", "quantity", "unit", "value", "status", "reason")
PRECISIONS, REMATS = settings.PRECISIONS[1:], settings.REMATS
SCHEMES = ("none", "int8", "int8_tensor", "int8_asym", "int4", "int4_asym", "int3", "int3_asym", "w8a8")
SCHEMES += ("zeroquant", "llm_int8", "nf4", "fp4", "glm_int8", "glm_int4")
SMOKE = dict(model="llama-7b", mesh="data=1", length=64, batch_size=1)
"""What --smoke sets of what is not given."""


def _define() -> None:
  def flag(kind, name, default, about, *more):
    getattr(flags, f"DEFINE_{kind}")(name, default, *more, help=about, flag_values=FLAGS)

  flag(
    "enum",
    "job",
    "train",
    "what is compiled: a step of training, or a token of decoding",
    ["train", "decode"],
  )
  flag(
    "string",
    "model",
    None,
    "a directory with a config.json, or a name of experiments.shapes such as llama-3-8b",
  )
  flag("string", "topology", None, "kind and shape of a TPU slice, as v5e:4x4; default the devices at hand")
  flag(
    "string",
    "mesh",
    None,
    "axes and sizes, as fsdp=16 or data=2,tensor=8; default fsdp=-1 or tensor=-1 by the job",
  )
  flag("enum", "rules", None, choices.RULES_HELP, choices.RULES)
  flag("integer", "length", 2048, "tokens of a sequence, or that the cache of a row has room for")
  flag("integer", "batch_size", 16, "sequences of a step, or rows that are decoded")
  flag("integer", "accumulate", 1, "with --job=train: parts of a batch, one after the other")
  flag("enum", "precision", "bf16", "with --job=train: types of weights, products and moments", PRECISIONS)
  flag("enum", "remat", "full", "with --job=train: what is kept of a layer for its gradient", REMATS)
  flag("enum", "quant", "int8", "with --job=decode: the scheme that holds the weights", SCHEMES)
  flag("enum", "cache_type", "full", "with --job=decode: the form of the key/value cache", choices.STORES)
  flag("string", "out", None, "directory of report.md and the results; default runs/compile_MODEL_JOB")
  flag("bool", "smoke", False, "llama-7b on one device, where nothing else is given")


_define()


def check(f) -> None:
  """Refuse what cannot be compiled."""
  if f.smoke:
    for name, value in SMOKE.items():
      if not f[name].present:
        f[name].value = value
  if f.model is None:
    raise ConfigError("--model is required: a directory with a config.json, or a name such as llama-3-8b")
  for name in ("length", "batch_size", "accumulate"):
    if f[name].value < 1:
      raise ConfigError(f"--{name}={f[name].value}: expected a whole number of at least 1")
  if f.batch_size % f.accumulate:
    raise ConfigError(f"--accumulate={f.accumulate}: expected a divisor of --batch_size={f.batch_size}")
  if f.mesh is None:
    f.mesh = "fsdp=-1" if f.job == "train" else "tensor=-1"


def main(f) -> int:
  """Compile, print, and write the report and the results."""
  from experiments.compiling import report_decoding, report_training, target
  from experiments.cost import config_of
  from jaxllm import parallel, quant
  from jaxllm.study import files
  from jaxllm.train.precision import POLICIES
  from jaxllm.train.step import TrainConfig

  on = target(f.mesh, f.topology)  # before anything else touches a device
  cfg = config_of(f.model)
  cfg.check_length(f.length, "--length")
  rules = f.rules or parallel.default_rules(on.mesh)
  shards = parallel.batch_shards(on.mesh) * (f.accumulate if f.job == "train" else 1)
  if f.batch_size % shards:
    near = math.ceil(f.batch_size / shards) * shards
    raise ConfigError(
      f"--batch_size={f.batch_size}: expected a multiple of {shards} on the mesh {parallel.spell(on.mesh)}, such as {near}"
    )
  if f.job == "train":
    config = TrainConfig(
      *(1000, f.batch_size, f.length), precision=POLICIES[f.precision], accumulate=f.accumulate, remat=f.remat
    )
    found = report_training(cfg, config, rules, on)
  else:
    scheme = None if f.quant == "none" else quant.SCHEMES[f.quant]()
    found = report_decoding(cfg, scheme, rules, on, batch=f.batch_size, length=f.length, store=f.cache_type)
  out = Path(f.out or f"runs/compile_{Path(f.model).name}_{f.job}")
  said = dict(model=f.model, job=f.job, topology=f.topology or "", mesh=parallel.spell(on.mesh), rules=rules)
  with files.Lock(out):
    files.write_results(out, [said | row for row in found.rows()], COLUMNS)
    found.write(out / "report.md", f"{f.model}, {f.job}")
  print(f"report and results: {out}")
  return 0


if __name__ == "__main__":
  run_app(main, check, values=FLAGS)
