"""Two-dimensional RoPE: the published positions of GLM prompts, two turns a head, and decoding that goes on with them."""

import components
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from model_cases import MODELS, params, tokens
from model_checks import relative_error

from jaxllm.config import ModelConfig
from jaxllm.errors import ConfigError, DataError
from jaxllm.nn import Context, Transformer, init_cache
from jaxllm.position import POSITIONS, glm_positions, next_glm_positions
from jaxllm.position.rope import base_power

IDS = dict(bos=130004, mask=130000, gmask=130001)
GMASK, MASK = [5, 74874, 130001, 130004], [5, 130000, 74874, 130004]
CFG = MODELS["rope_2d"]
SOME = [7, 8, 9]
PROMPT = 10
POSITIONS_2D = glm_positions([5] * 8 + GMASK[2:] + [6] * 14, **IDS)
"""A ChatGLM-6B prompt of ten tokens, which ends with its mask and bos, and fourteen generated ones: T = 24."""


@pytest.mark.core
def test_the_published_prompt():
  np.testing.assert_array_equal(glm_positions(GMASK, **IDS).T, [[0, 1, 2, 2], [0, 0, 0, 1]])
  np.testing.assert_array_equal(glm_positions(MASK, **IDS).T, [[0, 1, 2, 1], [0, 0, 0, 1]])


@pytest.mark.core
def test_glm_130b_freezes_for_mask_only():
  one = dict(IDS, two_dimensional=False)
  np.testing.assert_array_equal(glm_positions(GMASK + SOME, **one), np.arange(7))
  np.testing.assert_array_equal(glm_positions(MASK + SOME, **one), [0, 1, 2, 1, 1, 1, 1])


def test_gmask_wins_over_mask_and_the_first_counts():
  both = [5, 130000, 130001, 6, 130001, 130004, 7]
  np.testing.assert_array_equal(glm_positions(both, **IDS).T, [[0, 1, 2, 3, 4, 2, 2], [0, 0, 0, 0, 0, 1, 2]])


@pytest.mark.parametrize("two_dimensional", [True, False])
@pytest.mark.parametrize("prompt", [GMASK, MASK], ids=["gmask", "mask"])
def test_the_next_positions_are_those_of_the_longer_text(prompt, two_dimensional):
  fields = dict(IDS, two_dimensional=two_dimensional)
  whole = glm_positions(prompt + SOME, **fields)
  np.testing.assert_array_equal(next_glm_positions(glm_positions(prompt, **fields), 3), whole[4:])
  for t in range(4, 7):
    np.testing.assert_array_equal(next_glm_positions(whole[:t]), whole[t : t + 1])


@pytest.mark.parametrize(
  ("ids", "message"), [([5, 130001], "no bos = 130004"), ([5, 130004, 130001], "neither gmask = 130001")]
)
def test_prompts_that_are_none(ids, message):
  with pytest.raises(DataError, match=message):
    glm_positions(ids, **IDS)


def test_frequencies_are_those_of_half_the_dimension():
  """Exponents of R/2, not of R: 64 of ChatGLM-6B's 128."""
  inv_freq, scale = POSITIONS["rope_2d"]().frequencies(128)
  np.testing.assert_array_equal(inv_freq, np.tile(base_power(10000.0, 64), 2))
  assert scale == 1.0 and inv_freq[31] == pytest.approx(10000 ** (-62 / 64), rel=1e-14)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_each_half_is_a_rope_of_its_own(layout, table_of):
  """A head of 20 with 16 turned: 8 by the position, 8 by the block, 4 not at all."""
  rope_2d, rope = POSITIONS["rope_2d"](layout=layout), POSITIONS["rope"](layout=layout)
  x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 3, 20)), jnp.float32)
  pos = jnp.asarray(np.random.default_rng(1).integers(0, 1000, (2, 5, 2)), jnp.int32)
  found = rope_2d.rotate_q(x, pos, table_of(rope_2d, 16))
  for axis in (0, 1):
    part = slice(8 * axis, 8 * axis + 8)
    expected = rope.rotate_q(x[..., part], pos[..., axis], table_of(rope, 8))
    np.testing.assert_array_equal(found[..., part], expected)
  np.testing.assert_array_equal(found[..., 16:], x[..., 16:])
  flat = rope_2d.rotate_k(x, pos[..., 0], table_of(rope_2d, 16))  # no block: block 0
  np.testing.assert_array_equal(flat[..., :8], found[..., :8])
  np.testing.assert_array_equal(flat[..., 8:], x[..., 8:])


@jax.jit
def step(p, tokens, context, cache):
  return Transformer(CFG).apply({"params": p}, tokens, context, cache, CFG.rope_tables())


def apply(tokens, context, cache=None):
  return step(params(CFG), tokens, context, cache)


def test_a_model_with_blocks_is_the_oracle_and_decodes():
  ids, context = tokens(), Context(pos=POSITIONS_2D[None])
  full, _ = apply(ids, context)
  truth = oracle.logits(CFG, params(CFG), ids, POSITIONS_2D)
  error = relative_error(full, truth)
  assert error <= 5e-6
  components.measured(CFG, "float64", error)
  assert (
    relative_error(full, oracle.logits(CFG, params(CFG), ids, POSITIONS_2D[:, 0])) > 0.05
  )  # blocks matter
  cache, seen = init_cache(CFG, *ids.shape), POSITIONS_2D[:PROMPT]
  logits, cache = apply(ids[:, :PROMPT], Context(pos=seen[None]), cache)
  found = [logits]
  for t in range(PROMPT, ids.shape[1]):
    new = next_glm_positions(seen)
    logits, cache = apply(ids[:, t : t + 1], Context(pos=new[None]), cache)
    seen = np.concatenate([seen, new])
    found.append(logits)
  assert relative_error(np.concatenate(found, axis=1), full) <= 1e-5
  np.testing.assert_array_equal(cache.pos[0], np.broadcast_to(POSITIONS_2D[:, 0], ids.shape))


def test_what_does_not_fit():
  pos = np.zeros((1, 24, 2), np.int32)
  with pytest.raises(ConfigError, match=r"context.pos: found \[B, T, 2\], expected \[B, T\]"):
    Transformer(MODELS["rope"]).apply({"params": params(MODELS["rope"])}, tokens(), Context(pos=pos))
  with pytest.raises(ConfigError, match=r"context.pos: found shape \(1, 24, 3\)"):
    apply(tokens(), Context(pos=np.zeros((1, 24, 3), np.int32)))
  with pytest.raises(ConfigError, match=r"Rope2d.rotary_dim: found 6, expected a multiple of 4"):
    POSITIONS["rope_2d"](rotary_dim=6)
  with pytest.raises(
    ConfigError, match="rotary_dim: found 18, expected a multiple of 4 of at most head_dim = 18"
  ):
    ModelConfig(
      **CFG.to_dict()
      | dict(layers=CFG.layers, norm=CFG.norm, mlp=CFG.mlp, attention=CFG.attention, head_dim=18)
    )
  with pytest.raises(ConfigError, match="no global RoPE layer"):
    CFG.with_position("ntk", factor=2.0)
