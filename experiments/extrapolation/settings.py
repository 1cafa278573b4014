"""The flags of the length-extrapolation sweep, read and checked; nothing here imports jax."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jaxllm.errors import ConfigError
from jaxllm.study import choices, methods

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
TRAINING = ("steps", "other_steps", "batch_size", "embed_dim", "num_layers", "num_heads", "mlp_dim")
SIZES = ("train_length", "seeds", "windows", *TRAINING)
ONLY_TRAINED = ("schemes", "seeds", "learning_rate", *TRAINING)
"""Flags that say how models are trained, and nothing about one that is loaded."""
ONLY_LOADED = ("text", "mesh", "rules", "verify")
MULTIPLES = (1, 2, 4, 8, 16)
LOADED_MULTIPLES = (1, 2, 4)
"""Of the trained length, of a loaded model: thousands of tokens, where the models trained here have a hundred."""


@dataclasses.dataclass(frozen=True)
class Settings:
  """What is tested, and how: of any models."""

  out: str
  corpus: str | None
  schemes: tuple[str, ...]
  methods: tuple[str, ...]
  metrics: tuple[str, ...]
  factors: tuple[float, ...] | None
  lengths: tuple[int, ...]
  train_length: int
  seeds: int
  windows: int
  dtype: str
  attention: str


@dataclasses.dataclass(frozen=True)
class TrainSettings(Settings):
  """A sweep over models that are trained first."""

  steps: int
  other_steps: int
  batch_size: int
  embed_dim: int
  num_layers: int
  num_heads: int
  mlp_dim: int
  learning_rate: float

  def steps_of(self, scheme: str) -> int:
    """Training steps of a scheme: most of the time goes to the first."""
    return self.steps if scheme == self.schemes[0] else self.other_steps


@dataclasses.dataclass(frozen=True)
class LoadSettings(Settings):
  """A sweep over a model that is loaded.

  train_length 0: what the model says; no lengths: multiples of it.  asked: what --methods says, which is settled by the model.
  """

  model: str
  text: str | None
  mesh: str | None
  rules: str | None
  verify: bool
  asked: str

  def settled(self, scheme: methods.Scheme, train_length: int | None) -> LoadSettings:
    """With the length, the lengths and the methods of the model; raises ConfigError where they do not go together."""
    length = self.train_length or train_length
    if not length:
      raise ConfigError(
        f"--model={self.model}: neither its RoPE nor its settings say how long a context it was trained at; "
        "give --train_length=TOKENS"
      )
    multiples = tuple(m * length for m in LOADED_MULTIPLES)
    if scheme.max_length is not None and not self.lengths:
      multiples = tuple(m for m in multiples if m <= scheme.max_length) or multiples
    lengths = self.lengths or multiples
    _check_lengths(lengths, length, f"--lengths={','.join(map(str, lengths))}")
    chosen = _chosen(self.asked, (scheme,), self.factors, length, lengths)
    methods.check_methods_matter((scheme,), chosen, self.factors, length, lengths)
    if not self.train_length:
      for name in chosen:
        methods.check_counts_from(scheme, name, length, f"--methods={self.asked}")
    return dataclasses.replace(self, methods=chosen, train_length=length, lengths=lengths)


def read_settings(f) -> Settings:
  """The flags as settings; raises ConfigError that names the flag, its value and what is allowed."""
  return _trained(f) if f.model is None else _loaded(f)


def _trained(f) -> TrainSettings:
  for name in ONLY_LOADED:
    if f[name].present:
      raise ConfigError(
        f"--{name}={f[name].value} without --model: it is for a model that is loaded; leave it out"
      )
  values = _sizes(f, SIZES)
  if values["embed_dim"] % (2 * values["num_heads"]):
    raise ConfigError(
      f"--num_heads={values['num_heads']}: head_dim = embed_dim / num_heads must be an even whole number, and "
      f"--embed_dim is {values['embed_dim']}"
    )
  train_length = values["train_length"]
  lengths = _lengths(f) or tuple(m * train_length for m in MULTIPLES)
  _check_lengths(lengths, train_length, f"--lengths={f.lengths}")
  factors = _factors(f)
  names = choices.choice_list("schemes", f.schemes, tuple(methods.SCHEMES))
  schemes = [methods.SCHEMES[name] for name in names]
  chosen = _chosen(f.methods, schemes, factors, train_length, lengths)
  if "hwfa" in names and values["num_layers"] < 2:
    raise ConfigError(
      f"--schemes={f.schemes} with --num_layers=1: hwfa needs at least 2 layers, windowed ones and a last one"
    )
  methods.check_methods_matter(schemes, chosen, factors, train_length, lengths)
  _check_text(f, "corpus")
  return TrainSettings(
    out=_out(f, "runs/length_extrapolation"),
    corpus=f.corpus,
    schemes=names,
    methods=chosen,
    metrics=choices.choice_list("metrics", f.metrics, methods.METRICS),
    factors=factors,
    lengths=lengths,
    learning_rate=choices.positive("learning_rate", f.learning_rate),
    dtype=f.dtype,
    attention=f.attention,
    **values,
  )


def _loaded(f) -> LoadSettings:
  for name in ONLY_TRAINED:
    if f[name].present:
      raise ConfigError(f"--{name}={f[name].value} with --model: it says how to train a model; leave it out")
  if not f.model:
    raise ConfigError("--model=: empty, expected a directory or a repository of Hugging Face's")
  if f.text is not None and f.corpus is not None:
    raise ConfigError(f"--text={f.text} with --corpus={f.corpus}: give one of them")
  if f.rules is not None and f.mesh is None:
    raise ConfigError(
      f"--rules={f.rules} without --mesh: there is nothing to lay out; give --mesh, or leave it out"
    )
  values = _sizes(f, ("windows",))
  length = f.train_length if f["train_length"].present else SMOKE["train_length"] if f.smoke else 0
  if f["train_length"].present:
    _check_train_length(length)
  methods.choose(
    f.methods, (methods.Scheme(methods.LOADED, "rope", plain_rope=True),)
  )  # names that no model has
  _check_text(f, "corpus")
  _check_text(f, "text")
  return LoadSettings(
    out=_out(f, f"runs/length_extrapolation_{Path(f.model).name or 'model'}"),
    corpus=f.corpus,
    schemes=(methods.LOADED,),
    methods=(),
    metrics=choices.choice_list("metrics", f.metrics, methods.TOKEN_METRICS),
    factors=_factors(f),
    lengths=_lengths(f),
    train_length=length,
    seeds=1,
    dtype=f.dtype,
    attention=f.attention,
    model=f.model,
    text=f.text,
    mesh=f.mesh,
    rules=f.rules,
    verify=f.verify,
    asked=f.methods,
    **values,
  )


def _sizes(f, names) -> dict[str, int]:
  values = {name: f[name].value for name in names}
  if f.smoke:
    values |= {name: value for name, value in SMOKE.items() if name in values and not f[name].present}
  for name, value in values.items():
    if value < 1:
      raise ConfigError(f"--{name}={value}: found {value}, expected a whole number of at least 1")
  if "train_length" in values:
    _check_train_length(values["train_length"])
  return values


def _check_train_length(value: int) -> None:
  if value < 8:  # twice the sinks of `streaming`
    raise ConfigError(f"--train_length={value}: expected at least 8")


def _lengths(f) -> tuple[int, ...]:
  return () if f.lengths is None else tuple(sorted(choices.number_list("lengths", f.lengths, int, 1)))


def _check_lengths(lengths, train_length: int, flag: str) -> None:
  if lengths[0] < train_length:
    raise ConfigError(f"{flag}: {lengths[0]} is below --train_length={train_length}; test at least there")


def _factors(f) -> tuple[float, ...] | None:
  return None if f.factors is None else choices.number_list("factors", f.factors, float, 1.0)


def _chosen(text: str, schemes, factors, train_length: int, lengths) -> tuple[str, ...]:
  """The methods of --methods; of a group of them, only `none` where no length is beyond the trained one."""
  chosen = methods.choose(text, schemes)
  if text in methods.GROUPS and factors is None and lengths[-1] <= train_length:
    return ("none",)
  return chosen


def _check_text(f, name: str) -> None:
  path = f[name].value
  if path is not None and not (path and Path(path).exists()):
    raise ConfigError(
      f"--{name}={path}: there is no such file or directory; give UTF-8 text, or leave the flag out"
    )


def _out(f, default: str) -> str:
  out = f.out or default + ("_smoke" if f.smoke else "")
  for name in ("corpus", "text"):
    path = f[name].value
    if path is not None and Path(out).resolve().is_relative_to(Path(path).resolve()):
      raise ConfigError(
        f"--out={out} lies inside --{name}={path}, and would become part of the text; use another --out"
      )
  return out
