"""The model families, and config.json to a ModelConfig and back.

Adding one is a file with its settings and the names of its tensors, a row in FAMILIES, and a row in tests/hf/family_cases.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxllm.config import DTYPES, ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.hf import rope
from jaxllm.hf.families.bloom import BLOOM
from jaxllm.hf.families.gemma import GEMMA, GEMMA2, GEMMA3
from jaxllm.hf.families.gpt2 import GPT2
from jaxllm.hf.families.gpt_neox import GPT_NEOX
from jaxllm.hf.families.granite import GRANITE
from jaxllm.hf.families.llama import LLAMA
from jaxllm.hf.families.mistral import MINISTRAL3, MISTRAL
from jaxllm.hf.families.mpt import MPT
from jaxllm.hf.families.olmo2 import OLMO2
from jaxllm.hf.families.phi3 import PHI3
from jaxllm.hf.families.qwen import QWEN2, QWEN3
from jaxllm.hf.families.relative import pattern
from jaxllm.hf.families.smollm3 import SMOLLM3
from jaxllm.hf.family import Family
from jaxllm.hf.settings import FLAG, IGNORED, TEXT, TOKENS, Settings, nearest, one_of
from jaxllm.ops.attention import Plain
from jaxllm.position import LogN, Rope

_ROWS = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, PHI3, OLMO2, GRANITE, SMOLLM3, MINISTRAL3)
_ROWS += (GPT_NEOX, BLOOM, MPT, GPT2)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ROWS}
"""By model_type, in the order in which `write_config` tries them."""

SETTLED = {
  "quantization_config": ((), "quantized checkpoints are not read"),
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
  """The family that model_type names; raises ConfigError with the nearest name for another."""
  name = s.take("model_type", TEXT)
  if name not in FAMILIES:
    near = nearest(name, FAMILIES, 0.4)
    raise s.error("model_type", f"one of {', '.join(FAMILIES)}{f' (nearest: {near})' if near else ''}")
  return FAMILIES[name]


def _check_architecture(s: Settings, family: Family) -> None:
  """architectures may name the decoder or the model without its head, in any spelling; the authors' code of MPT has its own."""
  base = family.architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
  allowed = {
    name.lower() for name in (family.architecture, f"{base}Model", f"{base}TextModel", f"{base}ForCausalLM")
  }
  found = s.plain.get("architectures")
  s.ignore("architectures")
  if found is None or found == []:
    return
  if not isinstance(found, list) or not all(isinstance(x, str) and x.lower() in allowed for x in found):
    raise s.error("architectures", f"[{family.architecture!r}], as only its head is read")


def _eos_ids(s: Settings, family: Family) -> tuple[int, ...]:
  found = s.take("eos_token_id", TOKENS, family.eos, null=None)
  ids = found if isinstance(found, list) else [] if found is None else [found]
  return tuple(one for one in ids if one >= 0)  # -1 stands for none


def write_config(
  cfg: ModelConfig, family: str | None = None, pinned: bool = False
) -> tuple[Family, dict[str, Any]]:
  """(family, settings of its config.json) whose reading is cfg but for what changes no logit beyond rounding.

  family: its model_type; None for the first of FAMILIES that has such a model.  Fixed frequencies of any method are written as
  LongRoPE's factors.  pinned: as `rope.expressible`.  Raises ConfigError, by name, for what no family, or not this one, can
  say.
  """
  if family is not None and family not in FAMILIES:
    Settings({"model_type": family}, "family").take("model_type", one_of(FAMILIES))
  wanted = as_transformers(cfg, pinned)
  reasons = {}
  for one in FAMILIES.values() if family is None else [FAMILIES[family]]:
    try:
      plain = one.write(wanted) | _common(one, wanted)
      found = read_config(plain, f"what would be written for {one.model_type}")[1]
    except ConfigError as error:
      reasons[one.model_type] = (2, str(error))  # of a thing the family has not
      continue
    if not (lines := differences(wanted, found)):
      return one, plain
    reasons[one.model_type] = (len(lines), "; ".join(lines))
  nearest = min(reasons, key=lambda name: reasons[name][0])
  who = "transformers has no family" if family is None else f"the family {family} has no model"
  raise ConfigError(f"{who} with these settings; the nearest, {nearest}: {reasons[nearest][1]}")


def _common(family: Family, cfg: ModelConfig) -> dict[str, Any]:
  """What all families have.  bos and pad are the tokenizer's matter: their defaults may lie beyond a small vocabulary."""
  ids = cfg.eos_ids
  return {
    "model_type": family.model_type,
    "architectures": [family.architecture],
    "tie_word_embeddings": cfg.tie_embeddings,
    "bos_token_id": None,
    "eos_token_id": (ids[0] if len(ids) == 1 else list(ids)) if ids else None,
    "pad_token_id": None,
    "torch_dtype": cfg.dtype,
  }


def as_transformers(cfg: ModelConfig, pinned: bool = False) -> ModelConfig:
  """cfg with each position method as transformers has it; raises ConfigError for what it has nothing for."""
  if isinstance(cfg.query_scale, LogN):
    raise ConfigError("query_scale: found LogN, expected none: transformers does not scale queries by log n")
  layers = [
    dataclasses.replace(
      layer, position=rope.expressible(layer.position, cfg.head_dim, cfg.context_length, pinned)
    )
    for layer in cfg.layers
  ]
  return dataclasses.replace(cfg, layers=tuple(layers))


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
    if not isinstance(position, Rope):
      return position
    whole = position.rotary_dim == cfg.head_dim
    return dataclasses.replace(
      position,
      rotary_dim=None if whole else position.rotary_dim,
      original_length=position.original_length if position.needs_original_length else None,
    )

  qk_norm = cfg.qk_norm and dataclasses.replace(cfg.qk_norm, norm=plain_norm(cfg.qk_norm.norm))
  layers = (dataclasses.replace(layer, position=plain_position(layer.position)) for layer in cfg.layers)
  usual = cfg.attention_scale == cfg.head_dim**-0.5
  return dataclasses.replace(
    cfg,
    layers=pattern(layers),
    norm=plain_norm(cfg.norm),
    qk_norm=qk_norm,
    attention_scale=None if usual else cfg.attention_scale,
    logit_scale=1 / (1 / cfg.logit_scale),  # as it comes back from its reciprocal
    biases=tuple(sorted(cfg.biases)),
    context_length=None,
    attention=Plain(),
    rope_precision="exact",
    embed_gradient=1.0,
    layer_scaling=False,
  )
