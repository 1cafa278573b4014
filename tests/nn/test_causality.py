"""No token sees a later one, and a window sees exactly its width: by gradient, and to the last bit."""

import dataclasses

import model_checks
import numpy as np
from model_cases import MODELS, SHAPE, B, T, each_model, each_structure, position
from model_checks import check_finite_gradient, check_later_tokens, gradient

from jaxllm.config import Layer


def reach(name, num_layers=1):
  """bool [T, T]: whether the loss of token t depends on the embedding of token j, by gradient."""
  ids = np.broadcast_to(np.random.default_rng(0).permutation(SHAPE["vocab_size"])[:T], (B, T)).astype(
    np.int32
  )
  rows = []
  for t in range(T):
    weights = np.zeros((B, T), np.float32)
    weights[0, t] = 1
    d_embed = np.asarray(
      gradient(name, ids, weights, num_layers=num_layers)["embed"]
    )  # no id twice: a row of the table is a token of the row
    rows.append(np.any(d_embed[ids[0]] != 0, axis=-1))
  return np.stack(rows)


@each_structure
def test_the_loss_of_t_depends_on_tokens_up_to_t(name):
  np.testing.assert_array_equal(reach(name), np.tri(T, dtype=bool))


@each_model
def test_later_tokens_do_not_change_a_bit(name):
  check_later_tokens(name)


@each_structure
def test_gradients_are_finite_beside_a_row_of_padding(name):
  check_finite_gradient(name)


def test_a_window_reaches_exactly_its_width(monkeypatch):
  """A window of w is w - 1 tokens back, and over two layers twice that."""
  one = MODELS["rope"]
  cfg = dataclasses.replace(one, num_layers=2, layers=(Layer(position("rope"), 4),))
  monkeypatch.setitem(MODELS, "two windows", cfg)
  seen = reach("two windows", num_layers=2)
  np.testing.assert_array_equal(seen, np.tri(T, dtype=bool) & ~np.tri(T, k=-7, dtype=bool))


def test_programs_are_shared():
  """A guard of this suite's own speed: methods that differ in data have one program."""
  fixed = ("rope", "pi", "ntk_old", "ntk", "ntk_fixed", "ntk_mixed", "yarn", "ntk_mixed, log-n")
  assert len({id(model_checks.program("forward", MODELS[name])) for name in fixed}) == 1
