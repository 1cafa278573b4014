"""Angles are exact in every type: the same tokens a million positions on have the same logits."""

import dataclasses

import jax.numpy as jnp
import pytest
from model_cases import MODELS, Layer, is_relative, table_of_models
from model_checks import check_shift, full, relative_error, tokens

from jaxllm.position import Rope
from jaxllm.position.rope import rotate

RELATIVE = [name for name, cfg in MODELS.items() if is_relative(cfg)]
BFLOAT16 = 0.1
"""Relative, of logits: turned queries and keys have 8 bits, and a shifted call rounds them otherwise."""


@dataclasses.dataclass(frozen=True)
class RoundedRope(Rope):
  """A negative control, wrong on purpose: positions in bfloat16, which collide from 257 on."""

  def rotate_q(self, q_BTNH, pos_BT, table):
    return rotate(q_BTNH, *table.cos_sin(pos_BT.astype(jnp.bfloat16).astype(jnp.int32)), self.layout)

  rotate_k = rotate_q


@table_of_models(RELATIVE)
def test_float32(name):
  check_shift(name)


def bfloat16_model(name):
  return dataclasses.replace(MODELS[name], dtype="bfloat16")


@table_of_models(["rope", "pi", "ntk_mixed", "yarn", "alibi"])
def test_bfloat16(monkeypatch, name):
  monkeypatch.setitem(MODELS, name, bfloat16_model(name))
  check_shift(name, tolerance=0.0 if name == "alibi" else BFLOAT16)


@pytest.mark.parametrize("shift", [3_000, 1_000_000])
def test_rounded_positions_are_caught(monkeypatch, shift):
  layers = tuple(Layer(RoundedRope(base=100.0), layer.window) for layer in MODELS["rope"].layers)
  monkeypatch.setitem(MODELS, "rounded", dataclasses.replace(bfloat16_model("rope"), layers=layers))
  with pytest.raises(AssertionError, match="rounded shifted by"):
    check_shift("rounded", shift, BFLOAT16)


def test_bfloat16_is_near_float32():
  error = relative_error(
    full(bfloat16_model("rope"), tokens(), 1_000_000), full(MODELS["rope"], tokens(), 1_000_000)
  )
  assert 1e-4 < error <= BFLOAT16
