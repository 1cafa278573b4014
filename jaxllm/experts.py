"""Mixtures of experts, as values: which feed-forward layers a token takes, and with which weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxllm.activation import ClampedGlu, Glu, Mlp
from jaxllm.errors import ConfigError, check_choice

EXPERTS = {"glu": Glu, "mlp": Mlp, "clamped_glu": ClampedGlu}
"""What an expert may be: the feed-forward layers without parameters of their own."""


@dataclasses.dataclass(frozen=True)
class SoftmaxRouter:
  """The k experts of the largest logits l, weighted by softmax(l) over all experts, or over those k if `renormalize`.

  p_e = exp(l_e) / sum_all exp(l); the weights of the k largest are p_e or, renormalised, p_e / sum_k p.  The latter is the
  softmax of the k largest logits: to choose before or after the softmax is the same (Mixtral does the one, GPT-OSS the other).
  Of equal logits the lower number comes first.  Raises ConfigError for a `renormalize` that is no boolean.
  Source: Shazeer et al. (2017), section 2.1 (renormalised); Jiang et al. (2024), Mixtral; `norm_topk_prob` of Qwen3-MoE.
  """

  renormalize: bool = True

  def __post_init__(self):
    check_choice(self, "renormalize", (True, False))

  def __call__(self, logits_CE: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array]:
    """(weights [C, k] float32, experts [C, k] int32) of float32 logits [C, E]."""
    top_Ck, index_Ck = jax.lax.top_k(logits_CE, top_k)
    if self.renormalize:
      return jax.nn.softmax(top_Ck, axis=-1), index_Ck
    total_C1 = jax.nn.logsumexp(logits_CE, axis=-1, keepdims=True)
    return jax.numpy.exp(top_Ck - total_C1), index_Ck


ROUTERS = {"softmax": SoftmaxRouter}
"""Rules of routing by name."""


@dataclasses.dataclass(frozen=True)
class Moe:
  """sum_e weight_e expert_e(x) over the top_k experts e of a token: num_experts feed-forward layers, of which each takes few.

  Logits of experts are x router (+ bias), float32; `router` makes experts and weights of them; no token is dropped, however
  many choose one expert.  expert: a Glu, an Mlp or a ClampedGlu; mlp_dim: the hidden width of one, None for the config's.
  Nothing balances the experts in training: a checkpoint's router_aux_loss_coef is not read.
  Raises ConfigError for a bad field, and for a top_k above num_experts.
  Source: Shazeer et al. (2017); Gale et al. (2022), MegaBlocks, for dropping none.
  """

  expert: Any = Glu()
  num_experts: int = 8
  top_k: int = 2
  router: Any = SoftmaxRouter()
  mlp_dim: int | None = None

  def __post_init__(self):
    for name, kinds in (("expert", EXPERTS), ("router", ROUTERS)):
      if type(getattr(self, name)) not in kinds.values():
        raise ConfigError(
          f"Moe.{name}: found {getattr(self, name)!r}, expected one of {', '.join(kind.__name__ for kind in kinds.values())}"
        )
    for name in ("num_experts", "top_k", *(() if self.mlp_dim is None else ("mlp_dim",))):
      if type(value := getattr(self, name)) is not int or value < 1:
        raise ConfigError(f"Moe.{name}: found {value!r}, expected an integer of at least 1")
    if self.top_k > self.num_experts:
      raise ConfigError(f"Moe.top_k: found {self.top_k}, expected at most num_experts = {self.num_experts}")

  @property
  def inputs(self) -> tuple[str, ...]:
    """What may have a bias, beside down."""
    return ("router", *self.expert.inputs)
