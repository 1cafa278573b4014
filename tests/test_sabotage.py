"""Known bugs of other codebases, put in one at a time: a property that is not about it must catch each.

A check proves something only if it can fail.  Each row first holds its check on the code as it is.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import model_checks
import numpy as np
import pytest
from model_cases import MODELS
from model_checks import (
  check_decode,
  check_finite_gradient,
  check_large_mean,
  check_later_tokens,
  check_oracle,
  check_ragged,
  check_shift,
  check_unused_slots,
)

from jaxllm.activation import Mlp
from jaxllm.nn import Context, context, transformer
from jaxllm.nn import attention as nn_attention
from jaxllm.norm import LayerNorm, RMSNorm
from jaxllm.ops import attention
from jaxllm.position import bias, phase, rope
from jaxllm.position.base import inner_products
from jaxllm.position.query_scale import LogN
from jaxllm.position.tables import QueryScale, RopeTable
from jaxllm.position.window import ReRope

OTHER = "yarn, and the rest otherwise"
BUGS = {}


def bug(check, *args):
  """Registers a patch of the package, and the check that must catch it."""

  def register(patch):
    BUGS[patch.__name__] = (patch, functools.partial(check, *args))
    return patch

  return register


def wrap(monkeypatch, owner, name, wrapper):
  """Replaces owner.name by wrapper(the original, *its arguments)."""
  monkeypatch.setattr(owner, name, functools.partial(wrapper, getattr(owner, name)))


def wrap_method(monkeypatch, owner, name, wrapper):
  original = getattr(owner, name)
  monkeypatch.setattr(owner, name, lambda *args, **kwargs: wrapper(original, *args, **kwargs))


@bug(check_oracle, "ntk_mixed", 4_000)
def positions_in_bfloat16(monkeypatch):
  rounded = lambda cos_sin, pos, hi, lo: cos_sin(pos.astype(jnp.bfloat16).astype(jnp.int32), hi, lo)
  wrap(monkeypatch, phase, "cos_sin", rounded)


@bug(check_oracle, "pi", 0)
def frequencies_in_bfloat16(monkeypatch):
  rounded = lambda words, f: words(np.asarray(jnp.asarray(f, jnp.bfloat16), np.float64))
  wrap(monkeypatch, phase, "words", rounded)


@bug(check_shift, "rope")
def angles_as_a_float32_product(monkeypatch):
  def product(pos, hi, lo):
    inv_freq = jnp.asarray(hi).astype(jnp.float32) * np.float32(2 * np.pi / 2**32)
    pos = pos.astype(jnp.float32)[..., None]
    angle = pos * jnp.expand_dims(inv_freq, range(pos.ndim - inv_freq.ndim))
    return jnp.cos(angle), jnp.sin(angle)

  monkeypatch.setattr(phase, "cos_sin", product)


@bug(check_oracle, "rope", 0)
def half_and_interleaved_swapped(monkeypatch):
  other = {"half": "interleaved", "interleaved": "half"}
  wrap(monkeypatch, rope, "rotate", lambda rotate, x, cos, sin, layout: rotate(x, cos, sin, other[layout]))


@bug(check_oracle, "yarn", 0)
def yarn_without_its_temperature(monkeypatch):
  monkeypatch.setattr(rope.YarnRope, "attention_scale", lambda self: 1.0)


@bug(check_oracle, "ntk", 0)
def ntk_by_the_old_exponent(monkeypatch):
  monkeypatch.setattr(rope.NtkRope, "frequencies", rope.NtkOldRope.frequencies)


@bug(check_oracle, "dynamic_ntk", 0)
def dynamic_ntk_with_rotated_keys_in_the_cache(monkeypatch):
  """Each key keeps the base of the length at which it was written."""

  def scores(self, q_BTNH, k_BSKH, q_pos_BT, k_pos_BS, table, p):
    def turn(x, pos):
      row = table.row(pos)
      return rope.rotate(x, *phase.cos_sin(pos, row.hi, row.lo), self.layout)

    return inner_products(turn(q_BTNH, q_pos_BT), turn(k_BSKH, k_pos_BS))

  monkeypatch.setattr(rope.DynamicNtkRope, "scores", scores)


@bug(check_decode, "dynamic_ntk")
def dynamic_ntk_with_one_base_a_call(monkeypatch):
  """The longest query decides for all: what a full forward pass does, and decoding does not."""

  def scores(self, q_BTNH, k_BSKH, q_pos_BT, k_pos_BS, table, p):
    row = table.row(jnp.max(q_pos_BT)[None])
    one = RopeTable(row.hi, row.lo, row.scale, table.start)
    return rope.Rope.scores(self, q_BTNH, k_BSKH, q_pos_BT, k_pos_BS, one, p)

  monkeypatch.setattr(rope.DynamicNtkRope, "scores", scores)


@bug(check_oracle, "rerope", 0)
def rerope_window_off_by_one(monkeypatch):
  clip = ReRope.clip.fget
  monkeypatch.setattr(ReRope, "clip", property(lambda self: clip(self) + 1))


@bug(check_oracle, "alibi", 0)
def alibi_slopes_from_zero(monkeypatch):
  slopes = lambda num_heads: 2.0 ** (-8.0 * np.arange(num_heads) / num_heads)
  monkeypatch.setattr(bias, "alibi_slopes", slopes)


@bug(check_oracle, "alibi", 0)
def alibi_bias_divided_by_the_root_of_head_dim(monkeypatch):
  wrap_method(monkeypatch, bias.Alibi, "bias", lambda add, *args: add(*args) / 4)


@bug(check_shift, "alibi")
def alibi_from_the_first_key_in_bfloat16(monkeypatch):
  """m j for m (j - i): equal in exact arithmetic, but the nearest keys get the largest numbers."""

  def from_zero(add, self, p, q_pos_BT, k_pos_BS, num_heads):
    absolute = add(self, p, jnp.zeros_like(q_pos_BT), k_pos_BS, num_heads)
    return absolute.astype(jnp.bfloat16).astype(jnp.float32)

  wrap_method(monkeypatch, bias.Alibi, "bias", from_zero)


@bug(check_oracle, "ntk_mixed, log-n", 0)
def log_n_from_zero(monkeypatch):
  wrap_method(monkeypatch, QueryScale, "__call__", lambda scale, self, q, pos: scale(self, q, pos - 1))


@bug(check_oracle, "rerope, log-n at test time", 0)
def log_n_below_one_at_test_time(monkeypatch):
  table = LogN.table
  monkeypatch.setattr(LogN, "table", lambda self: dataclasses.replace(table(self), floor=np.float32(0)))


@bug(check_oracle, "nope", 0)
def window_off_by_one(monkeypatch):
  wider = lambda allowed, q, k, window: allowed(q, k, None if window is None else window + 1)
  wrap(monkeypatch, attention, "allowed", wider)


@bug(check_later_tokens, "alibi")
def one_token_ahead(monkeypatch):
  later = lambda q: dataclasses.replace(q, index=q.index + 1)
  wrap(monkeypatch, attention, "allowed", lambda allowed, q, k, window: allowed(later(q), k, window))


@bug(check_finite_gradient, "rope")
def minus_infinity_as_mask(monkeypatch):
  masked = lambda scores, mask: jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))
  monkeypatch.setattr(attention, "masked_softmax", masked)


@bug(check_unused_slots, "rope")
def values_of_unused_slots_kept(monkeypatch):
  monkeypatch.setattr(attention, "zero_unused", lambda x_BSKH, valid_BS: x_BSKH)


@bug(check_decode, "rope")
def cache_written_one_slot_early(monkeypatch):
  early = lambda append, slots, new, length_B, valid: append(
    slots, new, length_B - (new.shape[1] == 1), valid
  )
  wrap(monkeypatch, context, "append", early)
  monkeypatch.setattr(nn_attention, "append", context.append)


@bug(check_decode, "rope")
def decoded_position_off_by_one(monkeypatch):
  def shifted(sides, ctx, cache, shape):
    if cache is not None and shape[1] == 1:
      ctx = dataclasses.replace(ctx, pos=cache.length[:, None] + 1)
    return sides(ctx, cache, shape)

  wrap(monkeypatch, transformer, "sides", shifted)


@bug(check_ragged, "nope")
def padding_counted_in_the_cache(monkeypatch):
  all_real = lambda sides, ctx, cache, shape: sides(Context(pos=ctx.pos), cache, shape)
  wrap(monkeypatch, transformer, "sides", all_real)


@bug(check_oracle, "rope", 0)
def query_heads_dealt_out_to_key_heads(monkeypatch):
  """Head n on key head n % K in place of n // G."""

  def dealt(q_BTNH, k_BSKH):
    K = k_BSKH.shape[2]
    order = np.arange(q_BTNH.shape[2]).reshape(-1, K).T.ravel()
    return inner_products(q_BTNH[:, :, order], k_BSKH)

  monkeypatch.setattr(nn_attention, "inner_products", dealt)


@bug(check_large_mean, OTHER)
def variance_as_a_difference_of_moments(monkeypatch):
  def fast(self, p, x):
    mean = jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(x * x, axis=-1, keepdims=True) - mean**2
    return (x - mean) * jax.lax.rsqrt(variance + self.eps) * p["scale"][None, None] + p["bias"][None, None]

  monkeypatch.setattr(LayerNorm, "__call__", fast)


@bug(check_oracle, "nope", 0)
def norm_weight_counted_from_one(monkeypatch):
  one_more = lambda norm, self, p, x: norm(self, {"scale": p["scale"] + 1}, x)
  wrap_method(monkeypatch, RMSNorm, "__call__", one_more)


@dataclasses.dataclass(frozen=True)
class TanhMlp(Mlp):
  """A class of its own, as JAX remembers what it has traced of the other."""

  def __call__(self, up):
    return jax.nn.gelu(up, approximate=True)


@bug(check_oracle, OTHER, 0)
def gelu_by_tanh(monkeypatch):
  monkeypatch.setitem(MODELS, OTHER, dataclasses.replace(MODELS[OTHER], mlp=TanhMlp()))


CORE = "window_off_by_one"


@pytest.mark.parametrize(
  "name", [pytest.param(name, marks=[pytest.mark.core] * (name == CORE)) for name in BUGS]
)
def test_the_bug_is_caught(monkeypatch, name):
  patch, check = BUGS[name]
  check()
  monkeypatch.setattr(model_checks, "PROGRAMS", {})
  monkeypatch.setattr(model_checks, "OPTIMIZED", None)
  patch(monkeypatch)
  with pytest.raises(AssertionError):
    check()
