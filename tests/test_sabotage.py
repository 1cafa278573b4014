"""Known bugs of positions, masks and caches, each caught by a property that is not about it (sabotage.py)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
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
from sabotage import must_be_caught, register, wrap, wrap_method

from jaxllm.activation import Mlp
from jaxllm.nn import Context, store, transformer
from jaxllm.nn import attention as nn_attention
from jaxllm.norm import LayerNorm, RMSNorm
from jaxllm.ops import attention
from jaxllm.position import absolute, bias, phase, rope, rope_2d, scalings
from jaxllm.position.base import inner_products
from jaxllm.position.query_scale import Llama4Scale, LogN
from jaxllm.position.tables import QueryScale, RopeTable
from jaxllm.position.window import LeakyReRope, ReRope, SelfExtendRope, StreamingRope, XPosRope

OTHER = "yarn, and the rest otherwise"
BUGS = {}
bug = functools.partial(register, BUGS)


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


@bug(check_oracle, "leaky_rerope", 0)
def leaky_rerope_without_the_window_before_the_steps(monkeypatch):
  """(i - j) / leak for w + (i - j - w) / leak."""

  def rows(self, rotary_dim, max_len=None, seq_len=None, frequencies=None):
    inv_freq, scale = self.frequencies(rotary_dim)
    return 0, [(inv_freq, scale), (inv_freq * self.step, scale), (0 * inv_freq, 1.0)]

  monkeypatch.setattr(LeakyReRope, "rows", rows)


@bug(check_oracle, "self_extend", 0)
def self_extend_without_the_shift_of_its_queries(monkeypatch):
  def far_scores(self, q_BTNH, k_BSKH, q_pos_BT, k_pos_BS, table):
    sides = ((q_BTNH, q_pos_BT), (k_BSKH, k_pos_BS))
    return inner_products(*(self.turn(x, pos // self.size, table) for x, pos in sides))

  monkeypatch.setattr(SelfExtendRope, "far_scores", far_scores)


@bug(check_oracle, "streaming", 0)
def streaming_at_positions_of_the_text(monkeypatch):
  """Sinks as far away as they are in the text, beyond what was trained, in place of in the cache."""

  def scores(self, q_BTNH, k_BSKH, q_pos_BT, k_pos_BS, table, p):
    found = rope.Rope.scores(self, q_BTNH, k_BSKH, q_pos_BT, k_pos_BS, table, p)
    seen_BTS = (q_pos_BT[:, :, None] - k_pos_BS[:, None] < self.clip) | (k_pos_BS < self.sinks)[:, None]
    return jnp.where(seen_BTS[:, None, None], found, attention.MASKED)

  monkeypatch.setattr(StreamingRope, "scores", scores)


@bug(check_decode, "longrope")
def longrope_with_one_list_a_call(monkeypatch):
  """The longest query decides for all: what a full forward pass does, and decoding does not."""

  def scores(self, q_BTNH, k_BSKH, q_pos_BT, k_pos_BS, table, p):
    row = table.row(jnp.max(q_pos_BT)[None])
    one = RopeTable(row.hi, row.lo, row.scale, table.start)
    return rope.Rope.scores(self, q_BTNH, k_BSKH, q_pos_BT, k_pos_BS, one, p)

  monkeypatch.setattr(scalings.LongRope, "scores", scores)


@bug(check_shift, "xpos")
def xpos_counted_from_position_0(monkeypatch):
  """Factors of zeta ** (i / scale_base) overflow far into a text."""

  def scores(self, q_BTNH, k_BSKH, q_pos_BT, k_pos_BS, table, p):
    log_zeta = self.log_zeta(2 * table.hi.shape[-1]).astype(np.float32)[None, None]

    def turn(x, pos, sign):
      cos, sin = table.cos_sin(pos)
      decay = jnp.exp(sign * pos[..., None] * log_zeta)
      return rope.rotate(x, cos * decay, sin * decay, self.layout)

    return inner_products(turn(q_BTNH, q_pos_BT, 1), turn(k_BSKH, k_pos_BS, -1))

  monkeypatch.setattr(XPosRope, "scores", scores)


@bug(check_oracle, "alibi", 0)
def alibi_slopes_from_zero(monkeypatch):
  slopes = lambda num_heads, bias_max: 2.0 ** (-bias_max * np.arange(num_heads) / num_heads)
  monkeypatch.setattr(bias, "alibi_slopes", slopes)


@bug(check_oracle, "alibi", 0)
def alibi_bias_divided_by_the_root_of_head_dim(monkeypatch):
  wrap_method(monkeypatch, bias.Alibi, "bias", lambda add, *args: add(*args) / 4)


@bug(check_shift, "alibi")
def alibi_from_the_first_key_in_bfloat16(monkeypatch):
  """m j for m (j - i): equal in exact arithmetic, but the nearest keys get the largest numbers."""

  def from_zero(add, self, p, q_pos_BT, k_pos_BS, num_heads, head_dim):
    absolute = add(self, p, jnp.zeros_like(q_pos_BT), k_pos_BS, num_heads, head_dim)
    return absolute.astype(jnp.bfloat16).astype(jnp.float32)

  wrap_method(monkeypatch, bias.Alibi, "bias", from_zero)


@bug(check_oracle, "t5", 0)
def t5_buckets_of_an_encoder(monkeypatch):
  """Half of the buckets are for keys that come after, which a decoder never sees."""
  halved = lambda buckets, self, distance: buckets(
    bias.T5Bias(self.num_buckets // 2, self.max_distance), distance
  )
  wrap_method(monkeypatch, bias.T5Bias, "buckets", halved)


@bug(check_decode, "learned")
def embeddings_that_count_from_zero_in_every_call(monkeypatch):
  again = lambda embed, self, x, pos, p: embed(self, x, jnp.arange(x.shape[1])[None], p)
  wrap_method(monkeypatch, absolute.Learned, "embed", again)


@bug(check_oracle, "learned, after two rows", 0)
def positions_from_the_first_row(monkeypatch):
  first = lambda embed, self, *args: embed(dataclasses.replace(self, offset=0), *args)
  wrap_method(monkeypatch, absolute.Learned, "embed", first)


@bug(check_oracle, "alibi of Falcon", 0)
def slopes_rounded_and_products_not(monkeypatch):
  monkeypatch.setattr(bias, "_rounded", lambda x: jnp.asarray(x, jnp.float32))


@bug(check_oracle, "sinusoidal", 0)
def sines_and_cosines_swapped(monkeypatch):
  wrap(monkeypatch, phase, "cos_sin", lambda cos_sin, *args: cos_sin(*args)[::-1])


@bug(check_oracle, "rope_2d", 0)
def rope_2d_with_the_exponents_of_the_whole_head(monkeypatch):
  both = lambda self, rotary_dim, seq_len=None: (
    np.tile(rope.base_power(self.base, rotary_dim)[: rotary_dim // 4], 2),
    1.0,
  )
  monkeypatch.setattr(rope_2d.Rope2d, "frequencies", both)


@bug(check_oracle, "ntk_mixed, log-n", 0)
def log_n_from_zero(monkeypatch):
  wrap_method(monkeypatch, QueryScale, "__call__", lambda scale, self, q, pos, w: scale(self, q, pos - 1, w))


@bug(check_oracle, "yarn, llama4", 0)
def llama4_scale_on_layers_without_a_window_only(monkeypatch):
  table = Llama4Scale.table
  monkeypatch.setattr(
    Llama4Scale, "table", lambda self: dataclasses.replace(table(self), windowed=np.bool_(False))
  )


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
  early = lambda write, slots, at, new: write(slots, at - (at.shape[1] == 1), new)
  wrap(monkeypatch, store, "write", early)


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

  def __call__(self, p, up):
    return jax.nn.gelu(up, approximate=True)


@bug(check_oracle, OTHER, 0)
def gelu_by_tanh(monkeypatch):
  monkeypatch.setitem(MODELS, OTHER, dataclasses.replace(MODELS[OTHER], mlp=TanhMlp()))


CORE = "window_off_by_one"


@pytest.mark.parametrize(
  "name", [pytest.param(name, marks=[pytest.mark.core] * (name == CORE)) for name in BUGS]
)
def test_the_bug_is_caught(monkeypatch, name):
  must_be_caught(monkeypatch, *BUGS[name])
