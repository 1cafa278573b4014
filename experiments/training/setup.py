"""What a run is made of: the model, the text, and how it is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.checkpoint import Checkpoint
from experiments.shapes import SHAPES
from experiments.training.begin import begin_with, shapes_of
from experiments.training.settings import Settings
from jaxllm import hf, parallel
from jaxllm.config import Layer, ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.nn.transformer import Transformer
from jaxllm.ops.choose import CORES
from jaxllm.position import POSITIONS
from jaxllm.study import choices
from jaxllm.train import data
from jaxllm.train.batches import Data, lay_out
from jaxllm.train.objectives import OBJECTIVES, Objective
from jaxllm.train.optimizers import OPTIMIZERS
from jaxllm.train.packing import documents, held_out
from jaxllm.train.precision import POLICIES
from jaxllm.train.schedules import SCHEDULES
from jaxllm.train.step import TrainConfig
from jaxllm.train.tokens import Text, open_text
from jaxllm.train.trainable import trained

GLM_IDS = 3
"""[MASK], <sop> and <eop>, after the ids of the text."""


@dataclasses.dataclass(frozen=True)
class Setup:
  """All of a run that is not where it is written.  params: makes those that it begins with, None: random ones of the seed."""

  model: Transformer
  config: TrainConfig
  train: Data
  held_out: Data
  mesh: jax.sharding.Mesh | None
  rules: str | None
  params: Callable[[], Any] | None
  identity: dict
  tokenizer: hf.Tokenizer | None
  family: str | None


def set_up(s: Settings) -> Setup:
  """The run of the settings; every error of what they name is raised here, before a weight is read or anything computed."""
  checkpoint = None
  if s.model is not None:
    checkpoint = Checkpoint.open(s.model, s.dtype, s.attention, s.mesh, s.rules, verify=s.verify)
  tokenizer = None
  if checkpoint is not None and not (s.text or "").endswith(".bin"):
    tokenizer = hf.load_tokenizer(
      checkpoint.directory, checkpoint.cfg, verify=bool(checkpoint.opened.kept.digests)
    )
  train, rest, ranges = _texts(s, tokenizer)
  own_ids = GLM_IDS if s.objective == "glm" and s.glm_ids is None else 0
  cfg = checkpoint.cfg if checkpoint is not None else model_config(s, train.vocab_size + own_ids)
  if checkpoint is None and train.separator is not None:
    cfg = dataclasses.replace(cfg, eos_ids=(train.separator,))
  objective = _objective(s, cfg, train)
  rows = lay_out(train, objective, s.length, s.batch_size, None if ranges is None else ranges[0])
  held = lay_out(rest, objective, s.length, s.batch_size, None if ranges is None else ranges[1])
  if rows.vocab_size > cfg.vocab_size:
    raise ConfigError(
      f"--text={s.text}: its ids, with those of --objective={s.objective}, need a vocabulary of {rows.vocab_size}, and the "
      f"model has {cfg.vocab_size}; tokenize the text for this model"
    )
  cfg.check_length(s.length, "--length")
  if s.scan and cfg.num_layers % len(cfg.layers):
    raise ConfigError(
      f"--scan: {cfg.num_layers} layers are no whole repeats of a pattern of {len(cfg.layers)}"
    )
  trained(shapes_of(s, cfg), s.trained or None)  # refuses rules, ranks and widths before there is a weight
  mesh, rules = _mesh(s, checkpoint)
  return Setup(
    model=Transformer(cfg, scan=s.scan),
    config=train_config(s),
    train=rows,
    held_out=held,
    mesh=mesh,
    rules=rules,
    params=None if checkpoint is None and s.train == "full" else lambda: begin_with(s, cfg, checkpoint),
    identity=_identity(s, checkpoint),
    tokenizer=tokenizer or _tokenizer(s, checkpoint, train),
    family=None if checkpoint is None else checkpoint.family,
  )


def model_config(s: Settings, vocab_size: int) -> ModelConfig:
  """Of a model from scratch: a shape by name, or a Llama of the sizes and the vocabulary."""
  attention = CORES[s.attention]()
  if s.shape is not None:
    if s.shape not in SHAPES:
      raise ConfigError(
        f"--shape={s.shape}: not known{choices.nearest(s.shape, list(SHAPES))}; expected one of {', '.join(SHAPES)}"
      )
    return dataclasses.replace(SHAPES[s.shape], attention=attention, dtype="float32")
  if s.position not in POSITIONS:
    near = choices.nearest(s.position, list(POSITIONS))
    raise ConfigError(f"--position={s.position}: not known{near}; expected one of {', '.join(POSITIONS)}")
  kind = POSITIONS[s.position]
  known = {field.name for field in dataclasses.fields(kind)}
  fields = {"original_length": s.length, "max_length": s.length, "base": s.base}
  if s.base is not None and "base" not in known:
    raise ConfigError(f"--base={s.base} with --position={s.position}, which has none; leave it out")
  method = kind(**{name: value for name, value in fields.items() if name in known and value is not None})
  return ModelConfig(
    vocab_size=vocab_size,
    embed_dim=s.embed_dim,
    num_layers=s.num_layers,
    num_heads=s.num_heads,
    num_kv_heads=s.num_kv_heads,
    head_dim=s.embed_dim // s.num_heads,
    mlp_dim=s.mlp_dim,
    layers=(Layer(method),),
    tie_embeddings=s.tie_embeddings,
    attention=attention,
    context_length=s.length,
  )


def _texts(s: Settings, tokenizer: hf.Tokenizer | None) -> tuple[Text, Text, tuple | None]:
  """(text to train on, text that is held out, documents of each where both are one text)."""
  path = s.text
  if path is not None and (path.endswith(".bin") or (tokenizer is None and not Path(path).is_dir())):
    text = open_text(path, s.separator)
    return text, text, held_out(documents(text), s.eval_share)
  corpus = data.load_corpus(path)
  source = corpus.about["source"]

  def made(part: str, ids: np.ndarray, vocab_size: int) -> Text:
    about = {**corpus.about, "part": part, "vocab_size": vocab_size, "tokens": len(ids)}
    return Text(ids, vocab_size, None, f"{source} ({part})", about)

  parts = {"training": corpus.train, "held out": corpus.validation}
  if tokenizer is None:
    return (*(made(part, text, data.VOCAB_SIZE) for part, text in parts.items()), None)
  encode = lambda text: np.asarray(tokenizer.encode(bytes(text).decode()), np.uint32)
  return (*(made(part, encode(text), tokenizer.vocab_size) for part, text in parts.items()), None)


def _objective(s: Settings, cfg: ModelConfig, text: Text) -> Objective:
  kind = OBJECTIVES[s.objective]
  if s.objective != "glm":
    return kind()
  ids = s.glm_ids or tuple(text.vocab_size + i for i in range(GLM_IDS))
  if max(ids) >= cfg.vocab_size:
    raise ConfigError(f"--glm_ids={','.join(map(str, ids))}: the model's ids are below {cfg.vocab_size}")
  two = any(position.two_dimensional for position in cfg.positions)
  return kind(mask=ids[0], sop=ids[1], eop=ids[2], two_dimensional=two)


def train_config(s: Settings, precision: str | None = None) -> TrainConfig:
  """How the run trains; precision: what "auto" stands for, None: what is best on the devices that there are."""
  if s.precision != "auto":
    precision = s.precision
  elif precision is None:
    precision = "model" if jax.default_backend() == "cpu" else "bf16"
  return TrainConfig(
    s.steps,
    s.batch_size,
    s.length,
    learning_rate=s.learning_rate,
    final_ratio=s.final_ratio,
    warmup=s.warmup,
    weight_decay=s.weight_decay,
    beta1=s.beta1,
    beta2=s.beta2,
    clip_norm=s.clip_norm,
    rule=OPTIMIZERS[s.optimizer](),
    rate=SCHEDULES[s.schedule](),
    precision=POLICIES[precision],
    accumulate=s.accumulate,
    remat=s.remat,
    z_loss=s.z_loss,
    trained=s.trained or None,
  )


def _mesh(s: Settings, checkpoint: Checkpoint | None):
  if s.mesh is None and jax.process_count() > 1:
    n = jax.device_count()
    raise ConfigError(
      f"--mesh: missing, and {jax.process_count()} processes train one model on {n} devices; give it, as --mesh=fsdp={n}"
    )
  if checkpoint is not None:
    return checkpoint.mesh, checkpoint.rules
  if s.mesh is None:
    return None, None
  mesh = parallel.make_mesh(s.mesh)
  return mesh, s.rules or parallel.default_rules(mesh)


def _identity(s: Settings, checkpoint: Checkpoint | None) -> dict:
  """What tells the run from others beside model, training, text and seed; the mesh may change."""
  about = (
    None if checkpoint is None else {k: v for k, v in checkpoint.about().items() if k in ("family", "files")}
  )
  factors = None if s.train == "full" else [s.train, s.lora_rank, s.lora_alpha, s.lora_targets]
  return {"checkpoint": about, "lora": factors, "scan": s.scan, "eval_share": s.eval_share}


def _tokenizer(s: Settings, checkpoint: Checkpoint | None, text: Text) -> hf.Tokenizer | None:
  """For the directory that is written at the end: the model's, that of the bytes, or the one that made the text's tokens."""
  if checkpoint is not None:
    return hf.load_tokenizer(
      checkpoint.directory, checkpoint.cfg, verify=bool(checkpoint.opened.kept.digests)
    )
  if not (s.text or "").endswith(".bin"):
    return hf.byte_tokenizer()
  named = s.tokenizer or text.about.get("tokenizer")
  if named is None or not (s.tokenizer or Path(named).is_dir()):
    return None
  found = hf.load_tokenizer(named)
  if found.vocab_size != text.vocab_size:
    which = (
      f"--tokenizer={named}"
      if s.tokenizer
      else f"--text={s.text}: its header names the tokenizer {named}, which"
    )
    raise ConfigError(
      f"{which} has {found.vocab_size} ids, and the tokens of --text are of {text.vocab_size}; give --tokenizer=DIR of the one "
      "that made them"
    )
  return found
