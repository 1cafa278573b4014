"""Does it fit? The decoding of a token, compiled for TPUs that are not there: memory, FLOPs, collectives.

The program is the one that `generate` has, the compiler that of the TPU (`pip install 'jaxllm[tpu]'`, on any Linux machine),
and the model a config: no weight is loaded or made.  Without --topology it is compiled for the devices at hand.  What a step
of training needs, `experiments.train --compile_only` tells.
"""

import math
from pathlib import Path

from absl import flags

from jaxllm.errors import ConfigError
from jaxllm.study import choices, run_app

FLAGS = flags.FlagValues()
SCHEMES = ("none", "int8", "int8_tensor", "int8_asym", "int4", "int4_asym", "int3", "int3_asym", "w8a8")
SCHEMES += ("zeroquant", "llm_int8", "nf4", "fp4", "glm_int8", "glm_int4")
SMOKE = dict(model="llama-7b", mesh="data=1", length=64, batch_size=1)
"""What --smoke sets of what is not given."""


def _define() -> None:
  def flag(kind, name, default, about, *more):
    getattr(flags, f"DEFINE_{kind}")(name, default, *more, help=about, flag_values=FLAGS)

  flag(
    "string",
    "model",
    None,
    "a directory with a config.json, or a name of experiments.shapes such as llama-3-70b",
  )
  flag("string", "topology", None, "kind and shape of a TPU slice, as v5e:4x4; default the devices at hand")
  flag("string", "mesh", "tensor=-1", "axes and sizes, as tensor=16 or data=2,tensor=8")
  flag("enum", "rules", None, choices.RULES_HELP, choices.RULES)
  flag("integer", "length", 2048, "tokens that the cache of a row has room for")
  flag("integer", "batch_size", 16, "rows that are decoded")
  flag("enum", "quant", "int8", "the scheme that holds the weights", SCHEMES)
  flag("enum", "cache_type", "full", "the form of the key/value cache", choices.STORES)
  flag("string", "out", None, "directory of report.md and the results; default runs/compile_MODEL")
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
  for name in ("length", "batch_size"):
    if f[name].value < 1:
      raise ConfigError(f"--{name}={f[name].value}: expected a whole number of at least 1")


def main(f) -> int:
  """Compile, print, and write the report and the results."""
  from experiments.compiling import report_decoding, target
  from experiments.cost import config_of
  from jaxllm import parallel, quant

  on = target(f.mesh, f.topology)  # before anything else touches a device
  cfg = config_of(f.model)
  cfg.check_length(f.length, "--length")
  rules = f.rules or parallel.default_rules(on.mesh)
  shards = parallel.batch_shards(on.mesh)
  if f.batch_size % shards:
    near = math.ceil(f.batch_size / shards) * shards
    raise ConfigError(
      f"--batch_size={f.batch_size}: expected a multiple of {shards} on the mesh {parallel.spell(on.mesh)}, such as {near}"
    )
  scheme = None if f.quant == "none" else quant.SCHEMES[f.quant]()
  found = report_decoding(cfg, scheme, rules, on, batch=f.batch_size, length=f.length, store=f.cache_type)
  found.write(Path(f.out or f"runs/compile_{Path(f.model).name}"), f.model, "decode")
  return 0


if __name__ == "__main__":
  run_app(main, check, values=FLAGS)
