"""The flags of a training run, read and checked; nothing here imports jax."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

from jaxllm.errors import ConfigError
from jaxllm.study import choices

OBJECTIVES = ("causal", "prefix_lm", "glm")
"""Names of `train.objectives.OBJECTIVES`, which flags list without importing jax; so do the following."""
OPTIMIZERS = ("adamw", "lion", "adafactor", "muon")
SCHEDULES = ("cosine", "linear", "constant", "wsd", "inverse_sqrt")
PRECISIONS = ("auto", "model", "O0", "O1", "O2", "O3", "bf16", "bf16_master", "bf16_pure")
REMATS = ("none", "full", "dots", "dots_no_batch")
WHAT = ("full", "lora", "qlora")
SMOKE = {
  "num_layers": 2,
  "embed_dim": 32,
  "num_heads": 2,
  "mlp_dim": 64,
  "length": 32,
  "batch_size": 8,
  "steps": 20,
  "save_every": 10,
  "eval_every": 10,
  "eval_rows": 16,
  "log_every": 5,
}
"""What --smoke sets, unless the flag is given."""
SCRATCH = (
  "num_layers",
  "embed_dim",
  "num_heads",
  "num_kv_heads",
  "mlp_dim",
  "position",
  "base",
  "tie_embeddings",
)
"""Flags of a model that there is not yet."""
LEAST = dict.fromkeys(
  ("num_layers", "embed_dim", "num_heads", "num_kv_heads", "mlp_dim", "length", "batch_size"), 1
)
LEAST |= {
  "steps": 1,
  "accumulate": 1,
  "lora_rank": 1,
  "save_every": 1,
  "keep": 2,
  "log_every": 1,
  "eval_every": 0,
}
LEAST |= {"eval_rows": 1, "separator": 0, "seed": 0}
"""The smallest values of flags."""
POSITIVE = ("learning_rate", "clip_norm", "lora_alpha", "base")
SHARES = ("warmup", "eval_share", "beta1", "beta2")
"""Flags from 0 to below 1."""


@dataclasses.dataclass(frozen=True)
class Settings:
  """A run; the fields are the flags of `experiments.train`, with rules and lists read."""

  model: str | None
  shape: str | None
  num_layers: int
  embed_dim: int
  num_heads: int
  num_kv_heads: int
  mlp_dim: int
  position: str
  base: float | None
  tie_embeddings: bool
  text: str | None
  tokenizer: str | None
  separator: int | None
  objective: str
  glm_ids: tuple[int, ...] | None
  length: int
  batch_size: int
  steps: int
  accumulate: int
  optimizer: str
  schedule: str
  learning_rate: float
  final_ratio: float
  warmup: float
  weight_decay: float
  beta1: float
  beta2: float
  clip_norm: float
  z_loss: float
  precision: str
  remat: str
  scan: bool
  attention: str
  train: str
  trained: tuple[tuple[str, bool], ...]
  lora_rank: int
  lora_alpha: float
  lora_targets: str | None
  dtype: str
  verify: bool
  mesh: str | None
  rules: str | None
  seed: int
  save_every: int
  keep: int
  log_every: int
  eval_every: int
  eval_share: float
  eval_rows: int
  profile: tuple[int, int] | None
  tensorboard: bool
  device: str | None
  compile_only: bool
  topology: str | None
  out: str

  @property
  def name(self) -> str:
    """What is trained, for titles and results."""
    return self.model or self.shape or f"{self.num_layers} layers of {self.embed_dim}"


def read(f) -> Settings:
  """The flags as settings; raises ConfigError that names the flag, its value and what is allowed."""
  given = {name for name in f if f[name].present}
  values = {field.name: f[field.name].value for field in dataclasses.fields(Settings)}
  if f.smoke:
    values |= {name: value for name, value in SMOKE.items() if name not in given}
  _check_numbers(values)
  _check_together(f, given, values)
  values["num_kv_heads"] = values["num_kv_heads"] or values["num_heads"]
  values["mlp_dim"] = values["mlp_dim"] or 64 * math.ceil(values["embed_dim"] / 24)
  values["position"] = values["position"] or ("rope_2d" if f.objective == "glm" else "rope")
  values["trained"] = tuple(map(_rule, f.trained))
  values["glm_ids"] = None if f.glm_ids is None else _ids(f.glm_ids)
  values["profile"] = None if f.profile is None else _steps(f.profile, values["steps"])
  name = Path(f.model or f.shape or "").name
  values["out"] = f.out or "_".join(["runs/train", *filter(None, [name]), *["smoke"] * f.smoke])
  if f.text is not None and Path(values["out"]).resolve().is_relative_to(Path(f.text).resolve()):
    raise ConfigError(
      f"--out={values['out']} lies inside --text={f.text}, and would become part of it; use another --out"
    )
  return Settings(**values)


def _check_numbers(values: dict) -> None:
  for name, least in LEAST.items():
    if values[name] is not None and values[name] < least:
      raise ConfigError(f"--{name}={values[name]}: expected a whole number of at least {least}")
  for name in POSITIVE:
    if values[name] is not None:
      choices.positive(name, values[name])
  for name in SHARES:
    if not 0 <= values[name] < 1:
      raise ConfigError(f"--{name}={values[name]}: expected a number from 0 to below 1")
  for name in ("final_ratio", "weight_decay", "z_loss"):
    if not 0 <= values[name] < math.inf:
      raise ConfigError(f"--{name}={values[name]}: expected a number of at least 0")
  if values["seed"] >= 1 << 32:  # jax.random.key would take the rest by 2^32, in silence
    raise ConfigError(f"--seed={values['seed']}: expected a whole number below 2^32")
  if values["eval_share"] == 0:
    raise ConfigError("--eval_share=0: expected a number above 0 and below 1, as held-out text is looked at")
  if values["batch_size"] % values["accumulate"]:
    raise ConfigError(
      f"--accumulate={values['accumulate']}: expected a divisor of --batch_size={values['batch_size']}"
    )


def _check_together(f, given: set[str], values: dict) -> None:
  """Flags that do not go with each other."""
  if f.model is not None and f.shape is not None:
    raise ConfigError(f"--model={f.model} with --shape={f.shape}: both name a model; give one of them")
  if f.model == "":
    raise ConfigError("--model=: empty, expected a directory or a repository of Hugging Face's")
  if (f.model or f.shape) and (own := [name for name in SCRATCH if name in given]):
    which = f"--model={f.model}" if f.model else f"--shape={f.shape}"
    raise ConfigError(f"--{own[0]}={f[own[0]].value} with {which}, which has its own; leave it out")
  if f.model is None and (own := [name for name in ("dtype", "verify") if name in given]):
    raise ConfigError(f"--{own[0]}={f[own[0]].value} without --model: there is nothing to read; leave it out")
  if f.model is None and f.shape is None:
    D, N, K = values["embed_dim"], values["num_heads"], values["num_kv_heads"] or values["num_heads"]
    if D % (2 * N):
      raise ConfigError(
        f"--num_heads={N}: embed_dim / num_heads must be an even whole number, and --embed_dim is {D}"
      )
    if N % K:
      raise ConfigError(f"--num_kv_heads={K}: expected a divisor of --num_heads={N}")
  if f.text is not None and not (f.text and Path(f.text).exists()):
    raise ConfigError(
      f"--text={f.text}: there is no such file or directory; give text, or leave the flag out"
    )
  if f.text is not None and f.text.endswith(".bin") and f.separator is not None:
    raise ConfigError(f"--separator={f.separator} with --text={f.text}, whose header says it; leave it out")
  if f.tokenizer is not None and (f.model or not (f.text or "").endswith(".bin")):
    raise ConfigError(f"--tokenizer={f.tokenizer}: it is for --text=FILE.bin, from scratch; leave it out")
  if f.separator is not None and (f.text is None or not Path(f.text).is_file() or f.model is not None):
    raise ConfigError(
      f"--separator={f.separator}: it is for --text=FILE of bytes, from scratch; leave it out"
    )
  if f.objective != "glm" and f.glm_ids is not None:
    raise ConfigError(
      f"--glm_ids={f.glm_ids} with --objective={f.objective}: they are for glm; leave them out"
    )
  if f.objective == "glm" and f.glm_ids is None and (f.model or f.shape):
    raise ConfigError(
      "--objective=glm: the ids of [MASK], <sop> and <eop> are the model's; give --glm_ids=MASK,SOP,EOP"
    )
  if f.rules is not None and f.mesh is None:
    raise ConfigError(
      f"--rules={f.rules} without --mesh: there is nothing to lay out; give --mesh, or leave it out"
    )
  if f.rules is not None and f.rules not in choices.RULES:
    raise ConfigError(
      f"--rules={f.rules}: not known{choices.nearest(f.rules, choices.RULES)}; expected one of {', '.join(choices.RULES)}"
    )
  if f.topology is not None and not f.compile_only:
    raise ConfigError(
      f"--topology={f.topology} without --compile_only: nothing runs there; give it, or leave it out"
    )
  if f.train != "full" and f.trained:
    raise ConfigError(
      f"--trained={f.trained[0]} with --train={f.train}, which trains factors only; leave it out"
    )
  if f.train == "full" and (own := [n for n in ("lora_rank", "lora_alpha", "lora_targets") if n in given]):
    raise ConfigError(
      f"--{own[0]}={f[own[0]].value} with --train=full; give --train=lora or qlora, or leave it out"
    )
  if f.train == "qlora" and f.scan:
    raise ConfigError("--scan with --train=qlora: quantized weights are not stacked; leave it out")


def _rule(text: str) -> tuple[str, bool]:
  pattern, equals, value = text.rpartition("=")
  if not equals or value not in ("yes", "no"):
    raise ConfigError(f"--trained={text}: expected PATTERN=yes or PATTERN=no, as in layers/0/.+=yes")
  try:
    re.compile(pattern)
  except re.error as e:
    raise ConfigError(f"--trained={text}: {pattern!r} is no regular expression ({e})") from None
  return pattern, value == "yes"


def _ids(text: str) -> tuple[int, ...]:
  ids = choices.number_list("glm_ids", text, int, 0)
  if len(ids) != 3:
    raise ConfigError(f"--glm_ids={text}: found {len(ids)} ids, expected those of [MASK], <sop> and <eop>")
  return ids


def _steps(text: str, steps: int) -> tuple[int, int]:
  found = re.fullmatch(r"(\d+):(\d+)", text)
  if not found or not int(found[1]) < int(found[2]) <= steps:
    raise ConfigError(
      f"--profile={text}: expected FIRST:LAST with FIRST below LAST and LAST at most {steps}, as "
      f"{max(0, steps - 4)}:{max(1, steps - 1)}"
    )
  return int(found[1]), int(found[2])
