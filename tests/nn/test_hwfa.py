"""log-n acts where all keys are seen, and HWFA: windows below one full layer without positions."""

import dataclasses

import components
import numpy as np
import oracle
import pytest
from model_cases import SHAPE, Layer, ModelConfig, T, params, position, tokens
from model_checks import full, relative_error

from jaxllm.config import hwfa_layers
from jaxllm.errors import ConfigError
from jaxllm.position import LogN, NoPE
from jaxllm.tree import flatten, unflatten

L, WINDOW = 4, 5
LAYERS = hwfa_layers(L, WINDOW, position("rope"))
HWFA = ModelConfig(**SHAPE | dict(num_layers=L), layers=LAYERS, query_scale=LogN(8))
SEEN = (WINDOW - 1) * (L - 1) + 1


def test_the_pattern():
  rope = position("rope")
  assert list(LAYERS) == [Layer(rope, WINDOW)] * 3 + [Layer(NoPE())]
  with pytest.raises(
    ConfigError, match="hwfa_layers: found num_layers = 1, expected an integer of at least 2"
  ):
    hwfa_layers(1, WINDOW, rope)


@pytest.mark.core
@pytest.mark.parametrize("last_layer_attends", [True, False])
def test_receptive_field(last_layer_attends):
  """(w - 1) (L - 1) + 1 tokens by the windows, all of them by the last layer, and by nothing else."""
  ids = tokens()
  weights = flatten(params(HWFA))
  if not last_layer_attends:
    weights[f"layers/{L - 1}/attn/o/w"] = 0 * weights[f"layers/{L - 1}/attn/o/w"]
  weights = unflatten(weights)
  before, j = full(HWFA, ids, weights=weights), 2
  changed = ids.copy()
  changed[:, j] = (ids[:, j] + 1) % HWFA.vocab_size
  moved = np.any(full(HWFA, changed, weights=weights) != before, axis=(0, 2))
  reach = T if last_layer_attends else j + SEEN
  np.testing.assert_array_equal(moved, (np.arange(T) >= j) & (np.arange(T) < reach))


def test_log_n_leaves_windows_alone():
  """A model of windows only has equal logits with and without; one full layer makes the difference."""
  windows = dataclasses.replace(HWFA, layers=(Layer(position("rope"), WINDOW),))
  plain = dataclasses.replace(windows, query_scale=None)
  np.testing.assert_array_equal(full(windows, tokens()), full(plain, tokens()))
  without = full(dataclasses.replace(HWFA, query_scale=None), tokens())
  found = full(HWFA, tokens())
  assert relative_error(found, without) > 0.01
  error = relative_error(found, oracle.logits(HWFA, params(HWFA), tokens()))
  assert error <= 5e-6
  components.measured(HWFA, "float64", error)
