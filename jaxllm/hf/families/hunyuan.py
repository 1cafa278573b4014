"""Hunyuan (dense, V1): queries and keys normalised after the rotation, and NTK-aware RoPE by alpha."""

from __future__ import annotations

import dataclasses

from jaxllm.config import Layer, ModelConfig
from jaxllm.hf import rope
from jaxllm.hf.families import relative
from jaxllm.hf.family import Family, Key
from jaxllm.hf.settings import Settings
from jaxllm.norm import QkNorm
from jaxllm.position import NtkRope, Rope

TYPES = tuple(name for name in rope.TYPES if name not in ("dynamic", "longrope"))
"""Those whose keys are turned once: a norm after the rotation leaves no other."""
KIND = relative.Relative(eps=1e-5, attention_bias=True, head=dict(types=TYPES))
QK_NORMS = {"q": "query_layernorm", "k": "key_layernorm"}
BESIDE_ALPHA = ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
"""What files say next to alpha and transformers does not read there."""
ONLY = {
  **dict(
    use_qk_norm=(True,), use_rotary_pos_emb=(True,), use_cla=(False,), use_mla=(False,), num_experts=(1,)
  ),
  **dict(position_embedding_xdrope=(False,), norm_type=("rms", "hf_rms"), moe_topk=(1,)),
}
"""What the authors' files say of the architecture and transformers does all the same."""
_IGNORED = """
eod_token_id org_vocab_size pad_id mask_init_id im_start_id im_end_id im_newline_id text_start_id text_end_id
attention_head_dim cla_share_factor add_classification_head class_num pool_type dense_list enable_lm_head_fp32
"""
"""Ids, classifiers, sizes of what is off, head_dim by another name, and a type that changes rounding only."""


def read(s: Settings) -> ModelConfig:
  """Every layer alike."""
  for name, values in ONLY.items():
    s.settle(name, *values, why="transformers has nothing else in this family")
  cfg = relative.read(s, KIND, lambda num_layers, head: [Layer(read_rope(s, head))])
  return dataclasses.replace(cfg, qk_norm=QkNorm(cfg.norm, place="after"))


def read_rope(s: Settings, head: rope.Head) -> Rope:
  """A RoPE of type dynamic is here NTK-aware at every length: its base becomes base * alpha ** (R / (R - 2)), R = head_dim."""
  group = rope.group_of(s)
  if "dynamic" not in (group.plain.get("rope_type"), group.plain.get("type")):
    return rope.read_group(s, group, head)
  alpha = group.take("alpha", relative.NOT_NEGATIVE, 0)
  if not alpha:
    raise group.error(
      "alpha", "a number above 0: keys normalised after the rotation cannot be turned anew by length"
    )
  plain = dataclasses.replace(head, aliases={"dynamic": "default"}, extra=BESIDE_ALPHA)
  one = rope.read_group(s, group, plain)
  return NtkRope(one.base, one.rotary_dim, one.layout, one.original_length, factor=float(alpha))


def write(cfg: ModelConfig) -> dict:
  """The inverse of `read`."""
  method = relative.rope_of(cfg)
  if not isinstance(method, NtkRope):
    return relative.write(cfg, KIND)
  one = Rope(method.base, method.rotary_dim, method.layout, cfg.context_length)
  plain = relative.write(dataclasses.replace(cfg, layers=(Layer(one, cfg.layers[0].window),)), KIND)
  return plain | {"rope_scaling": {"rope_type": "dynamic", "alpha": method.factor, "factor": 1.0}}


def keys(cfg: ModelConfig) -> list[Key]:
  """With the names of its norms of queries and keys."""
  return relative.keys(cfg, qk_norms=QK_NORMS)


HUNYUAN = Family(
  "hunyuan_v1_dense",
  "HunYuanDenseV1ForCausalLM",
  read,
  write,
  keys,
  eos=2,
  ignored=tuple(_IGNORED.split()),
  ropes=(NtkRope,),
)
