"""Known bugs of norms, wirings, activations and features, each caught by a property that is not about it (sabotage.py)."""

import dataclasses
import functools

import jax.numpy as jnp
import pytest
from model_cases import MODELS
from model_checks import check_oracle, check_prefix, check_small_embeddings
from sabotage import must_be_caught, register, wrap, wrap_method

from jaxllm import experts, norm, wiring
from jaxllm.activation import Glu, gelu
from jaxllm.experts import SoftmaxRouter
from jaxllm.nn import attention as nn_attention
from jaxllm.nn import layers, transformer
from jaxllm.ops import attention
from jaxllm.ops import experts as ops_experts
from jaxllm.ops.head import Head

BUGS = {}
bug = functools.partial(register, BUGS)


@bug(check_small_embeddings, "rope")
def eps_outside_the_root(monkeypatch):
  root = lambda x, axis, eps: 1 / (jnp.sqrt(jnp.mean(jnp.square(x), axis=axis, keepdims=True)) + eps)
  monkeypatch.setattr(norm, "_inverse_root", root)


@bug(check_oracle, "sandwich")
def one_plus_w_forgotten(monkeypatch):
  wrap(monkeypatch, norm, "_gain", lambda gain, scale, p, x: gain("w", p, x))


@bug(check_oracle, "post_only")
def mean_not_removed(monkeypatch):
  monkeypatch.setattr(norm, "_standardised", lambda x, axis, eps: x * norm._inverse_root(x, axis, eps))


@bug(check_oracle, "rope")
def final_norm_missing(monkeypatch):
  monkeypatch.setattr(wiring.Pre, "final_norm", False)


@bug(check_oracle, "post_only")
def sum_normalised_where_only_what_is_added_should_be(monkeypatch):
  monkeypatch.setattr(wiring.PostOnly, "__call__", wiring.Post.__call__)


@bug(check_oracle, "sandwich")
def second_norm_of_a_sandwich_before_the_branch(monkeypatch):
  def call(self, x, norm, attention, feed_forward):
    h = x + attention(norm("attn_post_norm", norm("attn_norm", x)))
    return h + feed_forward(norm("mlp_post_norm", norm("mlp_norm", h)))

  monkeypatch.setattr(wiring.Sandwich, "__call__", call)


@bug(check_oracle, "parallel_two_norms")
def parallel_branches_one_after_the_other(monkeypatch):
  def call(self, x, norm, attention, feed_forward):
    h = x + attention(norm("attn_norm", x))
    return h + feed_forward(norm("mlp_norm", h))

  monkeypatch.setattr(wiring.ParallelTwoNorms, "__call__", call)


@bug(check_oracle, "deepnorm")
def alpha_on_the_branch(monkeypatch):
  def call(self, x, norm, attention, feed_forward):
    h = norm("attn_norm", x + self.alpha * attention(x))
    return norm("mlp_norm", h + self.alpha * feed_forward(h))

  monkeypatch.setattr(wiring.DeepNorm, "__call__", call)


@bug(check_oracle, "deepnorm_glm")
def residual_from_before_the_norm(monkeypatch):
  """DeepNet's bracketing of the residual with GLM-130B's norms."""

  def call(self, x, norm, attention, feed_forward):
    h = self.alpha * x + attention(norm("attn_norm", x))
    return self.alpha * h + feed_forward(norm("mlp_norm", h))

  monkeypatch.setattr(wiring.GlmDeepNorm, "__call__", call)


def replace_mlp(monkeypatch, name, call):
  """Model `name` with `call` as its feed-forward: a class of its own, as JAX remembers what it has traced of the other."""
  mlp = MODELS[name].mlp
  wrong = type(type(mlp).__name__, (type(mlp),), {"__call__": call})(**dataclasses.asdict(mlp))
  monkeypatch.setitem(MODELS, name, dataclasses.replace(MODELS[name], mlp=wrong))


@bug(check_oracle, "parallel")
def gelu_by_erf_for_the_tanh_form(monkeypatch):
  replace_mlp(monkeypatch, "parallel", lambda self, p, up: gelu(up))


@bug(check_oracle, "rope")
def wrong_half_of_a_glu_activated(monkeypatch):
  replace_mlp(monkeypatch, "rope", lambda self, p, gate, up: Glu()(p, up, gate))


def replace_router(monkeypatch, call):
  """The model of experts with `call` as its routing."""
  cfg = MODELS["experts"]
  wrong = type("SoftmaxRouter", (SoftmaxRouter,), {"__call__": call})(cfg.mlp.router.renormalize)
  monkeypatch.setattr(experts, "ROUTERS", {"softmax": type(wrong)})
  mlp = dataclasses.replace(cfg.mlp, router=wrong)
  monkeypatch.setitem(MODELS, "experts", dataclasses.replace(cfg, mlp=mlp))


@bug(check_oracle, "experts")
def weights_of_experts_that_add_up_to_one(monkeypatch):
  replace_router(monkeypatch, lambda self, logits, k: SoftmaxRouter(True)(logits, k))


@bug(check_oracle, "experts")
def one_expert_too_many(monkeypatch):
  replace_router(monkeypatch, lambda self, logits, k: SoftmaxRouter(False)(logits, k + 1))


@bug(check_oracle, "experts")
def the_smallest_logits_chosen(monkeypatch):
  def call(self, logits, k):
    weights, index = SoftmaxRouter(False)(logits, logits.shape[-1])
    return weights[:, -k:], index[:, -k:]

  replace_router(monkeypatch, call)


@bug(check_oracle, "experts")
def rows_put_back_in_the_order_they_were_taken(monkeypatch):
  wrap(monkeypatch, ops_experts, "permute", lambda permute, x, inverse, order: permute(x, order, inverse))


@bug(check_oracle, "experts")
def rows_sorted_from_the_last_expert_down(monkeypatch):
  downwards = lambda group, index, n: (jnp.argsort(-index, stable=True), *group(index, n)[1:])
  wrap(monkeypatch, ops_experts, "group", downwards)


@bug(check_oracle, "streaming, soft cap")
def soft_cap_of_masked_scores(monkeypatch):
  """-1e30 becomes -cap: the keys that a method hides are seen again."""
  monkeypatch.setattr(nn_attention, "MASKED", -jnp.inf)


@bug(check_oracle, "soft caps")
def soft_cap_before_the_division_by_the_root_of_head_dim(monkeypatch):
  wrap(monkeypatch, nn_attention, "soft_cap", lambda soft_cap, x, cap: soft_cap(4 * x, cap) / 4)


@bug(check_oracle, "sinks")
def share_of_the_sink_dealt_out_again(monkeypatch):
  """Weights normalised once more after the sink is dropped: as if there were none."""
  without = lambda core, *args: core(*args[:-1], None)
  wrap_method(monkeypatch, attention.Plain, "__call__", without)


@bug(check_oracle, "sinks")
def projections_clipped_once_more_after_the_rotation(monkeypatch):
  clip = lambda normed, self, place, name, x: (
    jnp.clip(x, -1.5, 1.5) if place == "after" else normed(self, place, name, x)
  )
  wrap_method(monkeypatch, nn_attention.Attention, "_normed", clip)


@bug(check_oracle, "qk_norm")
def queries_and_keys_normalised_after_the_rotation(monkeypatch):
  """Which keeps lengths, so that only the weights tell."""
  other = {"before": "after", "after": "before"}
  swapped = lambda normed, self, place, name, x: normed(self, other[place], name, x)
  wrap_method(monkeypatch, nn_attention.Attention, "_normed", swapped)


@bug(check_oracle, "deepnorm_glm")
def layer_scale_not_undone(monkeypatch):
  numbers = []

  def remember(call, self, x, shared, number, *rest):
    numbers.append(number)
    return call(self, x, shared, number, *rest)

  wrap_method(monkeypatch, nn_attention.Attention, "__call__", remember)
  wrap(monkeypatch, nn_attention, "inner_products", lambda dot, q, k: dot(q, k) / (numbers[-1] + 1))


@bug(check_oracle, "deepnorm")
def output_bias_added_twice(monkeypatch):
  """As where each of two devices adds it to its part of the sum."""
  twice = lambda weight, module, name, *args: (
    weight(module, name, *args) * (2 if (module.name, name) == ("o", "bias") else 1)
  )
  wrap(monkeypatch, layers, "weight", twice)


@bug(check_prefix, "rope")
def prefix_off_by_one(monkeypatch):
  longer = lambda q: dataclasses.replace(q, prefix=None if q.prefix is None else q.prefix + 1)
  wrap(monkeypatch, attention, "allowed", lambda allowed, q, k, window: allowed(longer(q), k, window))


@bug(check_oracle, "multipliers")
def logit_scale_after_the_soft_cap(monkeypatch):
  def call(self, x):
    bare = dataclasses.replace(self, scale=1.0)
    return Head.__call__(bare, x) * self.scale

  wrong = type("Head", (Head,), {"__call__": call})
  monkeypatch.setattr(transformer, "Head", wrong)


@bug(check_oracle, "multipliers")
def branch_scale_on_the_whole_stream(monkeypatch):
  def call(self, x, norm, attention, feed_forward):
    h = self.branch_scale * (x + attention(norm("attn_norm", x)))
    return self.branch_scale * (h + feed_forward(norm("mlp_norm", h)))

  monkeypatch.setattr(wiring.Pre, "__call__", call)


CORE = "one_plus_w_forgotten"
SLOW = list(BUGS)[1::2]
"""Every other one waits for the full counts, as each compiles a model of its own."""


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=[pytest.mark.core] * (name == CORE) + [pytest.mark.slow] * (name in SLOW))
    for name in BUGS
  ],
)
def test_the_bug_is_caught(monkeypatch, name):
  must_be_caught(monkeypatch, *BUGS[name])
