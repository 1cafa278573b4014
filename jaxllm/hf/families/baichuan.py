"""Baichuan and Baichuan 2: Llama's block with queries, keys and values in one matrix, 13B with ALiBi, 2 with a normed head.

transformers has no such family.  From the authors' published code, as remembered, and from the table of families that this
project keeps: 7B and 13B have one model_type, and each a configuration class of its own, of which the 7B one has
`max_position_embeddings` and the 13B one `model_max_length` only (published 7B files may have both).  `W_pack` is [q; k; v].
RoPE is of halves, base 10,000, and has no setting; ALiBi has the usual slopes, no bias is divided by sqrt(H).  The class of
Baichuan 2 has a `z_loss_weight`, which files saved again hold, and its vocabulary is 125,696, where the first one's is 64,000.
"""

from __future__ import annotations

import dataclasses

from jaxllm.config import Layer, ModelConfig
from jaxllm.hf import rope
from jaxllm.hf.families import relative
from jaxllm.hf.families.relative import QKV
from jaxllm.hf.family import Family, Key, linear
from jaxllm.hf.settings import COUNT, FLAG, NUMBER, Settings
from jaxllm.position import Alibi, Rope

KIND = relative.Relative(context=4096)
ROPE_LENGTH, ALIBI_LENGTH = "max_position_embeddings", "model_max_length"
VOCABULARIES = {64000: False, 125696: True}
"""Those of Baichuan and Baichuan 2, and whether the head is normed."""
ONE_VALUE = (
  ("num_key_value_heads", (), "every head has keys and values of its own"),
  ("head_dim", (), "it is hidden_size / num_attention_heads"),
  ("rope_theta", (10000, 10000.0), "the authors' code has no other"),
  ("rope_scaling", (), "the authors' code has none"),
  ("rope_parameters", (), "the authors' code has none"),
)


def read(s: Settings) -> ModelConfig:
  """RoPE where there is max_position_embeddings, ALiBi where there is model_max_length only."""
  for name, values, why in ONE_VALUE:
    s.settle(name, *values, why=why)
  turned, length = s.has(ROPE_LENGTH), s.take(ALIBI_LENGTH, COUNT, None)
  if not turned and length is None:
    raise s.error(
      ROPE_LENGTH, f"the length of a 7B model, which has RoPE, or {ALIBI_LENGTH} of a 13B model: ALiBi"
    )
  spelled = s.plain.get("architectures")
  if not turned and isinstance(spelled, list) and "BaiChuanForCausalLM" in spelled:  # 13B has a small c
    raise s.error(
      ROPE_LENGTH, "an integer, as the architecture BaiChuanForCausalLM is that of the first 7B models"
    )
  cfg = relative.read(s, KIND, lambda L, head: [Layer(rope.read(s, head) if turned else Alibi())])
  return dataclasses.replace(
    cfg, norm_head=_normed(s, cfg.vocab_size), context_length=cfg.context_length if turned else length
  )


def _normed(s: Settings, vocab_size: int) -> bool:
  """Whether the head is normed: as norm_head says (a key of ours), or as z_loss_weight or the vocabulary tell."""
  second = s.take("z_loss_weight", NUMBER, None) is not None
  known = True if second else VOCABULARIES.get(vocab_size)
  given = s.take("norm_head", FLAG, known)
  if given is None:
    raise s.error(
      "norm_head", f"true for a Baichuan 2, false for the first: a vocabulary of {vocab_size} tells neither"
    )
  if known not in (None, given):
    raise s.error("norm_head", f"{str(known).lower()}, as {'z_loss_weight' if second else 'vocab_size'} says")
  return given


def write(cfg: ModelConfig) -> dict:
  """The inverse of `read`."""
  turned = isinstance(cfg.layers[0].position, Rope)
  return {
    "vocab_size": cfg.vocab_size,
    "hidden_size": cfg.embed_dim,
    "intermediate_size": cfg.mlp_dim,
    "num_hidden_layers": cfg.num_layers,
    "num_attention_heads": cfg.num_heads,
    "hidden_act": relative.activation_name(cfg.mlp),
    "rms_norm_eps": cfg.norm.eps,
    ROPE_LENGTH if turned else ALIBI_LENGTH: rope.context_of(cfg.ropes, cfg.context_length),
    **({"z_loss_weight": 0} if cfg.norm_head else {}),
    "norm_head": cfg.norm_head,
  }


def keys(cfg: ModelConfig) -> list[Key]:
  """Llama's but for the fused matrix."""
  at, ours = "model.layers.{i}.", "layers/{i}/"
  return [
    Key("model.embed_tokens.weight", ("embed",)),
    *linear(cfg, f"{at}self_attn.W_pack", *(f"{ours}attn/{name}" for name in "qkv"), layout=QKV),
    *linear(cfg, f"{at}self_attn.o_proj", f"{ours}attn/o"),
    *(key for name in relative.MLP for key in linear(cfg, f"{at}mlp.{name}_proj", f"{ours}mlp/{name}")),
    *relative.ends(cfg, at, relative.NORMS),
  ]


BAICHUAN = Family(
  "baichuan",
  "BaichuanForCausalLM",
  read,
  write,
  keys,
  eos=2,
  remote=True,
  ignored=("_from_model_config",),
  unused=relative.ROTARY,
)
