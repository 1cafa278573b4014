"""The model families, and config.json to a ModelConfig and back.

Adding one is a file with its settings and the names of its tensors, a row in FAMILIES, and a row of arguments for the tests;
CONTRIBUTING.md has each step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from jaxllm.activation import Xielu
from jaxllm.config import DTYPES, Layer, ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.experts import Moe
from jaxllm.hf import quantized, rope
from jaxllm.hf.families.apertus import APERTUS
from jaxllm.hf.families.arcee import ARCEE
from jaxllm.hf.families.baichuan import BAICHUAN
from jaxllm.hf.families.bloom import BLOOM
from jaxllm.hf.families.chatglm import CHATGLM
from jaxllm.hf.families.chatglm_6b import CHATGLM_6B
from jaxllm.hf.families.cohere import COHERE, COHERE2
from jaxllm.hf.families.exaone4 import EXAONE4
from jaxllm.hf.families.falcon import FALCON
from jaxllm.hf.families.gemma import GEMMA, GEMMA2, GEMMA3
from jaxllm.hf.families.glm import GLM, GLM4
from jaxllm.hf.families.glm_130b import GLM_130B
from jaxllm.hf.families.gpt2 import GPT2, GPT_BIGCODE
from jaxllm.hf.families.gpt_neox import GPT_NEOX
from jaxllm.hf.families.gpt_oss import GPT_OSS
from jaxllm.hf.families.gptj import CODEGEN, GPTJ
from jaxllm.hf.families.granite import GRANITE
from jaxllm.hf.families.hunyuan import HUNYUAN
from jaxllm.hf.families.llama import LLAMA
from jaxllm.hf.families.mistral import MINISTRAL3, MISTRAL
from jaxllm.hf.families.mixtral import MIXTRAL
from jaxllm.hf.families.mpt import MPT
from jaxllm.hf.families.nemotron import NEMOTRON
from jaxllm.hf.families.olmo import OLMO, OLMO2, OLMO3
from jaxllm.hf.families.opt import OPT
from jaxllm.hf.families.persimmon import PERSIMMON
from jaxllm.hf.families.phi import PHI
from jaxllm.hf.families.phi3 import PHI3
from jaxllm.hf.families.qwen import QWEN2, QWEN3
from jaxllm.hf.families.qwen_moe import QWEN3_MOE
from jaxllm.hf.families.relative import pattern
from jaxllm.hf.families.seed_oss import SEED_OSS
from jaxllm.hf.families.smollm3 import SMOLLM3
from jaxllm.hf.families.stablelm import STABLELM
from jaxllm.hf.families.starcoder2 import STARCODER2
from jaxllm.hf.family import Family
from jaxllm.hf.settings import FLAG, IGNORED, TEXT, TOKENS, Settings, nearest, one_of
from jaxllm.ops.choose import Auto
from jaxllm.position import LogN, Position, Rope

_ROWS = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, PHI3, OLMO2, GRANITE, SMOLLM3, MINISTRAL3)
_ROWS += (GPT_NEOX, BLOOM, MPT, GPT2)
_ROWS += (GLM, GLM4, COHERE, COHERE2, OLMO, OLMO3, EXAONE4, SEED_OSS, ARCEE, HUNYUAN, APERTUS)
_ROWS += (STARCODER2, PHI, GPTJ, CODEGEN, FALCON, OPT, GPT_BIGCODE, NEMOTRON, PERSIMMON, STABLELM)
_ROWS += (MIXTRAL, QWEN3_MOE, GPT_OSS)
_ROWS += (BAICHUAN, CHATGLM_6B, CHATGLM, GLM_130B)
FAMILIES: dict[str, Family] = {family.name: family for family in _ROWS}
"""By name, in the order in which `write_config` tries them."""

SETTLED = {
  "per_layer_config": ((), "layers that differ in size are not supported"),
  "is_encoder_decoder": ((False,), "decoders only"),
  "add_cross_attention": ((False,), "decoders only"),
  "pruned_heads": (({},), "pruned heads are not supported"),
}
"""Settings of any family that have one value, and why."""


def read_config(plain: Mapping[str, Any], source: str = "config.json") -> tuple[Family, ModelConfig]:
  """(family, config) of the settings of a config.json; `source` is the file, for messages.

  Every setting is handled, one that changes no logit, at its only value, or a ConfigError that names the key, the value and
  what was expected.  cfg.dtype is dtype or torch_dtype, float32 where there is neither.
  """
  family, cfg, _ = _read(plain, source)
  return family, cfg


def ignored_settings(plain: Mapping[str, Any], source: str = "config.json") -> list[str]:
  """The keys of a config.json that change no logit, so that nothing was made of them."""
  return _read(plain, source)[2]


def _read(plain: Mapping[str, Any], source: str) -> tuple[Family, ModelConfig, list[str]]:
  s = Settings(plain, source)
  family = family_of(s)
  for name, (values, why) in SETTLED.items():
    s.settle(name, *values, why=why)
  s.take(quantized.NAME, quantized.CONFIG, None)  # parameters are, and the model is the same
  _check_architecture(s, family)
  common = {
    "tie_embeddings": s.take("tie_word_embeddings", FLAG, family.tied),
    "eos_ids": _eos_ids(s, family),
    "dtype": s.take("dtype", one_of(DTYPES), "float32", also=("torch_dtype",)),
  }
  cfg = family.read(s)
  common["eos_ids"] = tuple(one for one in common["eos_ids"] if one < cfg.vocab_size)  # others never occur
  cfg = dataclasses.replace(cfg, **common)
  return family, cfg, s.finish(IGNORED | set(family.ignored))


def family_of(s: Settings) -> Family:
  """The family that model_type names, and of several the first that the settings fit.

  Raises ConfigError for another.
  """
  name = s.take("model_type", TEXT)
  if found := [family for family in FAMILIES.values() if family.model_type == name]:
    return next((family for family in found if family.fits(s)), found[-1])
  raise s.error("model_type", _one_of(name, {family.model_type for family in FAMILIES.values()}))


def _one_of(name: str, known: Iterable[str]) -> str:
  """What was expected in place of an unknown name, with the one that it may be a misspelling of."""
  near = nearest(name, known := sorted(known), 0.8)
  return f"one of {', '.join(known)}{f' (by its spelling nearest: {near})' if near else ''}"


def _check_architecture(s: Settings, family: Family) -> None:
  """architectures may name the decoder or the model without its head, in any spelling; the authors' code of MPT has its own."""
  base = family.architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
  names = (family.architecture, f"{base}Model", f"{base}TextModel", f"{base}ForCausalLM", *family.also)
  allowed = {name.lower() for name in names}
  found = s.plain.get("architectures")
  s.ignore("architectures")
  if found is None or found == []:
    return
  if not isinstance(found, list) or not all(isinstance(x, str) and x.lower() in allowed for x in found):
    raise s.error("architectures", f"[{family.architecture!r}], as only its head is read")


def _eos_ids(s: Settings, family: Family) -> tuple[int, ...]:
  several = isinstance(family.eos, tuple)
  default = list(family.eos) if several else family.eos
  found = s.take("eos_token_id", TOKENS, default, null=default if several else None)
  ids = found if isinstance(found, list) else [] if found is None else [found]
  return tuple(one for one in ids if one >= 0)  # -1 stands for none


def write_config(
  cfg: ModelConfig, family: str | None = None, pinned: bool = False
) -> tuple[Family, dict[str, Any]]:
  """(family, settings of its config.json) whose reading is cfg but for what changes no logit beyond rounding.

  family: its name; None for the first of FAMILIES that has such a model and that transformers has, too.  Fixed frequencies of
  any method are written as LongRoPE's factors, but for a family of remote code, which has its own RoPE only.  pinned: as
  `rope.expressible`.  Raises ConfigError, by name, for what no family, or not this one, can say.
  """
  if family is not None:
    if family not in FAMILIES:
      raise ConfigError(f"family: found {family!r}, expected {_one_of(str(family), FAMILIES)}")
    plain, _, reason = _written(FAMILIES[family], cfg, pinned)
    if plain is None:
      raise ConfigError(f"the family {family} has no model with these settings: {reason}")
    return FAMILIES[family], plain
  try:
    _converted(cfg, pinned, ())  # what no family has is an error of its own
  except ConfigError as error:
    raise ConfigError(f"{error}{_by_name(cfg)}") from None
  reasons = {}
  for one in FAMILIES.values():
    if one.remote:
      continue
    plain, *reasons[one.name] = _written(one, cfg, pinned)
    if plain is not None:
      return one, plain
  nearest = min(reasons, key=lambda name: reasons[name][0])
  raise ConfigError(
    f"transformers has no family with these settings; the nearest, {nearest}: {reasons[nearest][1]}{_by_name(cfg)}"
  )


def _written(one: Family, cfg: ModelConfig, pinned: bool = False) -> tuple[dict[str, Any] | None, int, str]:
  """(what a family writes, 0, ""), or (None, how far the model is from the family's, what the family cannot say)."""
  try:
    wanted = cfg if one.remote else as_transformers(cfg, pinned, one.ropes)
    plain = one.write(wanted) | _common(one, wanted)
    found = read_config(plain, f"what would be written for {one.name}")[1]
  except ConfigError as error:
    return None, 2, str(error)  # of a thing the family has not
  lines = differences(wanted, found)
  return (None, len(lines), "; ".join(lines)) if lines else (plain, 0, "")


def _by_name(cfg: ModelConfig) -> str:
  """What to add where only families of remote code have the model."""
  names = [one.name for one in FAMILIES.values() if one.remote and _written(one, cfg)[0] is not None]
  if not names:
    return ""
  asked = " or ".join(f"family={name!r}" for name in names)
  have = "families of remote code have it" if len(names) > 1 else "a family of remote code has it"
  return f".  But {have}, which transformers opens with its authors' code only: ask for it by name, {asked}"


def _common(family: Family, cfg: ModelConfig) -> dict[str, Any]:
  """What all families have.  bos and pad are the tokenizer's matter: their defaults may lie beyond a small vocabulary."""
  ids = list(cfg.eos_ids)
  none = -1 if isinstance(family.eos, tuple) else None
  return {
    "model_type": family.model_type,
    "architectures": [family.architecture],
    "tie_word_embeddings": cfg.tie_embeddings,
    "bos_token_id": None,
    "eos_token_id": (ids[0] if len(ids) == 1 else ids) if ids else none,
    "pad_token_id": None,
    "torch_dtype": cfg.dtype,
  }


def as_transformers(cfg: ModelConfig, pinned: bool = False, own: tuple[type[Rope], ...] = ()) -> ModelConfig:
  """cfg with each position method as transformers has it, `own` as they are; raises ConfigError for what it has nothing for."""
  return dataclasses.replace(cfg, layers=_converted(cfg, pinned, own))


def _converted(cfg: ModelConfig, pinned: bool, own: tuple[type[Rope], ...]) -> tuple[Layer, ...]:
  if isinstance(cfg.query_scale, LogN):
    raise ConfigError("query_scale: found LogN, expected none: transformers does not scale queries by log n")

  def converted(position: Position) -> Position:
    kept = type(position) in own
    return position if kept else rope.expressible(position, cfg.head_dim, cfg.context_length, pinned)

  return tuple(dataclasses.replace(layer, position=converted(layer.position)) for layer in cfg.layers)


def differences(wanted: ModelConfig, found: ModelConfig) -> list[str]:
  """The fields in which two configs have other logits, a line each."""
  a, b = comparable(wanted), comparable(found)
  names = [field.name for field in dataclasses.fields(a) if getattr(a, field.name) != getattr(b, field.name)]
  return [f"{name} would be {getattr(b, name)} instead of {getattr(a, name)}" for name in names]


def comparable(cfg: ModelConfig) -> ModelConfig:
  """cfg without what changes speed, rounding, training or information only: equal ones have the same logits."""

  def plain_norm(norm):
    return dataclasses.replace(norm, multiply_in="float32") if hasattr(norm, "multiply_in") else norm

  def plain_position(position):
    if not isinstance(position, Rope) or (position.program is not None and not position.two_dimensional):
      return position  # ReRoPE and its like, whose lengths are of their windows
    whole = position.rotary_dim == cfg.head_dim
    return dataclasses.replace(
      position,
      rotary_dim=None if whole else position.rotary_dim,
      original_length=position.original_length if position.needs_original_length else None,
    )

  def plain_mlp(mlp):
    if isinstance(mlp, Xielu):  # where its slopes start
      return dataclasses.replace(mlp, alpha_p=1.0, alpha_n=mlp.beta + 1)
    return dataclasses.replace(mlp, mlp_dim=mlp.mlp_dim or cfg.mlp_dim) if isinstance(mlp, Moe) else mlp

  def plain_layer(layer):
    mlp = None if layer.mlp == cfg.mlp or layer.mlp is None else plain_mlp(layer.mlp)
    return dataclasses.replace(layer, position=plain_position(layer.position), mlp=mlp)

  qk_norm = cfg.qk_norm and dataclasses.replace(cfg.qk_norm, norm=plain_norm(cfg.qk_norm.norm))
  usual = cfg.attention_scale == cfg.head_dim**-0.5
  return dataclasses.replace(
    cfg,
    layers=pattern(map(plain_layer, cfg.layers)),
    mlp=plain_mlp(cfg.mlp),
    norm=plain_norm(cfg.norm),
    qk_norm=qk_norm,
    attention_scale=None if usual else cfg.attention_scale,
    logit_scale=1 / (1 / cfg.logit_scale),  # as it comes back from its reciprocal
    biases=tuple(sorted(cfg.biases)),
    context_length=None,
    attention=Auto(),
    rope_precision="exact",
    embed_gradient=1.0,
    layer_scaling=False,
  )
