"""What a model takes as tokens, and what it refuses before anything is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import MODELS, params

from jaxllm.errors import DataError, TokenizerError
from jaxllm.nn import Transformer

CFG = MODELS["rope"]
LARGE = CFG.vocab_size


@pytest.mark.parametrize(
  ("tokens", "error", "said"),
  [
    pytest.param([[1, 2]], DataError, r"found list of shape \(1, 2\), expected an array", id="a list"),
    pytest.param(np.array([1, 2]), DataError, r"found int64 of shape \(2,\), .* \[B, T\]", id="one text"),
    pytest.param(np.ones((1, 2), np.float32), DataError, "found float32", id="no integers"),
    pytest.param(np.array([[0, 1], [LARGE, -1]]), TokenizerError, rf"\[1, 0\]: found {LARGE}, .* {LARGE - 1}", id="large"),
    pytest.param(jnp.array([[3, -1]]), TokenizerError, r"tokens\[0, 1\]: found -1", id="negative"),
  ],
)  # fmt: skip
def test_what_is_no_token_is_refused(tokens, error, said):
  with pytest.raises(error, match=said):
    Transformer(CFG).apply({"params": params(CFG)}, tokens)


def test_what_is_traced_is_refused_by_shape():
  apply = jax.jit(lambda tokens: Transformer(CFG).apply({"params": params(CFG)}, tokens))
  with pytest.raises(DataError, match="found int32"):
    apply(jnp.zeros((3,), jnp.int32))


@pytest.mark.parametrize("kind", [np.int64, np.uint8])
def test_any_integers_and_no_rows_are_tokens(kind):
  compiled = jax.jit(lambda weights, tokens: Transformer(CFG).apply({"params": weights}, tokens)[0])
  apply = lambda tokens: compiled(params(CFG), tokens)
  assert apply(np.zeros((0, 3), kind)).shape == (0, 3, LARGE)
  np.testing.assert_array_equal(
    apply(np.array([[1, LARGE - 1]], kind)), apply(np.array([[1, LARGE - 1]], np.int32))
  )
