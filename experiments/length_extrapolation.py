"""Train short, test long: how far does each position method stretch a model that was trained at a short context?

Trains one small byte-level decoder a scheme (RoPE, RoPE with log-n, ALiBi, ...) at --train_length, evaluates every method
at --lengths on text it has not seen, and leaves a table, figures and machine-readable results in --out.  Methods are
switched on for the long test only, and the model is not tuned for them.  Killed at any moment, the same command goes on
where it was.
"""

import dataclasses
import functools
from pathlib import Path

from absl import flags

from jaxllm.errors import ConfigError
from jaxllm.study import choices, methods, run_app

SMOKE = {  # what --smoke sets, unless the flag is given
  "train_length": 32,
  "steps": 40,
  "other_steps": 30,
  "batch_size": 8,
  "embed_dim": 64,
  "num_layers": 2,
  "mlp_dim": 128,
  "windows": 4,
}
SIZES = ("train_length", "seeds", "steps", "other_steps", "batch_size", "windows")
MODEL = ("embed_dim", "num_layers", "num_heads", "mlp_dim")
MULTIPLES = (1, 2, 4, 8, 16)

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
flags.DEFINE_string("metrics", "all", f"what to measure: all, or any of {', '.join(methods.METRICS)}")
flags.DEFINE_string(
  "factors", None, "context multipliers to apply at every length; default length / train_length"
)
flags.DEFINE_integer("train_length", 128, "context length of training, in bytes")
flags.DEFINE_string("lengths", None, "context lengths to test; default 1, 2, 4, 8 and 16 times train_length")
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
  "corpus", None, "a UTF-8 text file or a directory of them; default Python's standard library"
)
flags.DEFINE_enum(
  "dtype", "auto", ["auto", "float32", "bfloat16"], "compute type; auto: bfloat16 but on a CPU"
)
flags.DEFINE_enum("attention", "auto", choices.CORES, "attention core; auto: by device, method and length")


@dataclasses.dataclass(frozen=True)
class Settings:
  """The flags, read and checked."""

  out: str
  corpus: str | None
  schemes: tuple[str, ...]
  methods: tuple[str, ...]
  metrics: tuple[str, ...]
  factors: tuple[float, ...] | None
  lengths: tuple[int, ...]
  train_length: int
  seeds: int
  steps: int
  other_steps: int
  batch_size: int
  windows: int
  embed_dim: int
  num_layers: int
  num_heads: int
  mlp_dim: int
  learning_rate: float
  dtype: str
  attention: str

  def steps_of(self, scheme: str) -> int:
    """Training steps of a scheme: most of the time goes to the first."""
    return self.steps if scheme == self.schemes[0] else self.other_steps


def read_settings(f) -> Settings:
  """The flags as settings; raises ConfigError that names the flag, its value and what is allowed."""
  values = {name: f[name].value for name in (*SIZES, *MODEL)}
  if f.smoke:
    values |= {name: value for name, value in SMOKE.items() if not f[name].present}
  for name, value in values.items():
    if value < 1:
      raise ConfigError(f"--{name}={value}: found {value}, expected a whole number of at least 1")
  if values["train_length"] < 8:  # twice the sinks of `streaming`
    raise ConfigError(f"--train_length={values['train_length']}: expected at least 8")
  if values["embed_dim"] % (2 * values["num_heads"]):
    raise ConfigError(
      f"--num_heads={values['num_heads']}: head_dim = embed_dim / num_heads must be an even whole number, and "
      f"--embed_dim is {values['embed_dim']}"
    )
  train_length = values["train_length"]
  lengths = tuple(m * train_length for m in MULTIPLES)
  if f.lengths is not None:
    lengths = tuple(sorted(choices.number_list("lengths", f.lengths, int, 1)))
    if lengths[0] < train_length:
      raise ConfigError(
        f"--lengths={f.lengths}: {lengths[0]} is below --train_length={train_length}; test at least there"
      )
  factors = None if f.factors is None else choices.number_list("factors", f.factors, float, 1.0)
  schemes = choices.choice_list("schemes", f.schemes, tuple(methods.SCHEMES))
  chosen = methods.choose(f.methods, schemes)
  if f.methods in ("default", "all") and factors is None and lengths[-1] <= train_length:
    chosen = ("none",)
  if "hwfa" in schemes and values["num_layers"] < 2:
    raise ConfigError(
      f"--schemes={f.schemes} with --num_layers=1: hwfa needs at least 2 layers, windowed ones and a last one"
    )
  methods.check_methods_matter(schemes, chosen, factors, train_length, lengths)
  if f.corpus is not None and not (f.corpus and Path(f.corpus).exists()):
    raise ConfigError(
      f"--corpus={f.corpus}: there is no such file or directory; give UTF-8 text, or leave the flag out"
    )
  out = f.out or "runs/length_extrapolation" + ("_smoke" if f.smoke else "")
  if f.corpus is not None and Path(out).resolve().is_relative_to(Path(f.corpus).resolve()):
    raise ConfigError(
      f"--out={out} lies inside --corpus={f.corpus}, and would become part of the text; use another --out"
    )
  return Settings(
    out=out,
    corpus=f.corpus,
    schemes=schemes,
    methods=chosen,
    metrics=choices.choice_list("metrics", f.metrics, methods.METRICS),
    factors=factors,
    lengths=lengths,
    learning_rate=choices.positive("learning_rate", f.learning_rate),
    dtype=f.dtype,
    attention=f.attention,
    **values,
  )


def model_config(settings: Settings, scheme: str, dtype: str, tested: bool = False):
  """The decoder that a scheme trains, or the one that it is tested with: the same, but for inv_leaky."""
  from jaxllm.config import Layer, ModelConfig, hwfa_layers
  from jaxllm.ops.choose import CORES
  from jaxllm.position import POSITIONS, LogN

  length, how = settings.train_length, methods.SCHEMES[scheme]
  cls = POSITIONS[(how.tested_as if tested else None) or how.position]
  fields = {"original_length": length, "max_length": length, "proportion": 0.25}
  known = {field.name for field in dataclasses.fields(cls)}
  position = cls(**{name: value for name, value in fields.items() if name in known})
  layers = (Layer(position),)
  if how.hwfa:
    layers = hwfa_layers(settings.num_layers, hwfa_window(settings), position)
  return ModelConfig(
    vocab_size=256,
    embed_dim=settings.embed_dim,
    num_layers=settings.num_layers,
    num_heads=settings.num_heads,
    num_kv_heads=settings.num_heads,
    head_dim=settings.embed_dim // settings.num_heads,
    mlp_dim=settings.mlp_dim,
    layers=layers,
    query_scale=LogN(length) if how.log_n else None,
    embed_scale=settings.embed_dim**0.5,
    attention=CORES[settings.attention](),
    dtype=dtype,
  )


def hwfa_window(settings: Settings) -> int:
  """The largest window whose reach over all layers but the last, (window - 1) (L - 1) + 1, is at most 3/4 of the length."""
  return (3 * settings.train_length // 4 - 1) // (settings.num_layers - 1) + 1


def train_config(settings: Settings, scheme: str):
  """How a scheme trains."""
  from jaxllm.train.step import TrainConfig

  return TrainConfig(
    settings.steps_of(scheme),
    settings.batch_size,
    settings.train_length,
    learning_rate=settings.learning_rate,
  )


def default_dtype(platform: str) -> str:
  """The compute type of a platform, fixed: on CPUs XLA's bfloat16 products measure slower than its float32 ones."""
  return "float32" if platform == "cpu" else "bfloat16"


def source_digest() -> str:
  """SHA-256 of the project's own code: cells of two versions do not belong into one table."""
  import hashlib

  import jaxllm

  roots = (Path(jaxllm.__file__).parent, Path(__file__).parent)
  files = sorted(path for root in roots for path in root.rglob("*.py"))
  return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def record(settings: Settings, configs: dict, corpus, dtype: str) -> dict:
  """Everything needed to repeat the run, for config.json."""
  import platform
  from importlib.metadata import version

  import jax

  import jaxllm
  from experiments.extrapolation import evaluate
  from jaxllm.evaluate import windows

  # before anything is trained: a forced core that cannot serve a method is an error here
  attention = evaluate.core_reports(settings, configs)
  return {
    "jaxllm": jaxllm.__version__,
    "source": source_digest(),
    "python": platform.python_version(),
    "libraries": {
      name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    },
    "platform": jax.default_backend(),
    "devices": [device.device_kind for device in jax.devices()],
    "settings": {k: v for k, v in dataclasses.asdict(settings).items() if k != "out"} | {"dtype": dtype},
    "corpus": corpus.about,
    "models": {scheme: config.to_dict() for scheme, config in configs.items()},
    "training": {scheme: dataclasses.asdict(train_config(settings, scheme)) for scheme in configs},
    "evaluation": {
      "windows": settings.windows,
      "stride": windows.window_stride(corpus.validation, max(settings.lengths), settings.windows),
      "last_block": settings.train_length,
      "group_size": methods.GROUP_SIZE,
      "tokens_at_once": windows.TOKENS_AT_ONCE,
      "attention": attention,
      "dynamic_ntk": "one base a window; factor f at length L stretches by f L / L0 - (f - 1), 57 for f = 8 at 8 L0",
      "methods": {name: dataclasses.asdict(methods.METHODS[name]) for name in settings.methods},
    },
  }


def main(f) -> int:
  """The whole run; 0, or 1 if a cell failed."""
  settings = read_settings(f)
  import jax

  from experiments.extrapolation import evaluate, report
  from jaxllm.study.cells import Ledger, check_config, run_groups
  from jaxllm.study.files import Lock
  from jaxllm.study.progress import Progress
  from jaxllm.study.stop import StopFlag
  from jaxllm.train import data

  out = Path(settings.out)
  corpus = data.load_corpus(settings.corpus)
  source = settings.corpus or "the standard library"
  data.check_size(
    corpus, f"--corpus={source}", settings.train_length, max(settings.lengths), settings.windows
  )
  dtype = default_dtype(jax.default_backend()) if settings.dtype == "auto" else settings.dtype
  configs = {scheme: model_config(settings, scheme, dtype) for scheme in settings.schemes}
  tested = {scheme: model_config(settings, scheme, dtype, tested=True) for scheme in settings.schemes}
  with StopFlag() as stop, Lock(out):
    config = record(settings, configs, corpus, dtype)
    ledger = Ledger(out / "cells.jsonl", check_config(out, config))
    groups = methods.plan(
      settings.schemes,
      settings.methods,
      settings.metrics,
      settings.factors,
      settings.train_length,
      settings.lengths,
      settings.seeds,
      settings.windows,
    )
    with Progress() as progress:
      done = sum(ledger.finished(group.name) for group in groups)
      cells = progress.cells("cells", total=len(groups), done=done)
      trained = evaluate.Trained(
        out, configs, tested, functools.partial(train_config, settings), corpus.train, progress, stop
      )
      run_groups(
        groups,
        ledger,
        functools.partial(evaluate.compute, settings, trained, corpus.validation),
        on_done=lambda group, rows: cells.update(group.name),
        stop=stop,
      )
      rows = [row for group in groups for row in ledger.done[group.name]]
      for scheme, seed in dict.fromkeys((r["scheme"], r["seed"]) for r in rows if r["status"] == "ok"):
        trained.keep(scheme, seed)  # cells that are recorded do not ask for their model
    return report.write(out, settings, config, rows, corpus)


if __name__ == "__main__":
  run_app(main, check=read_settings)
