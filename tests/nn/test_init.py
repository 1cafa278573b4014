"""What a model starts from."""

import dataclasses

import jax
import numpy as np
import pytest
from model_cases import MODELS, tokens

from jaxllm.nn import Transformer
from jaxllm.tree import flatten


@pytest.mark.core
def test_the_scale_of_every_matrix():
  """fan_in ** -0.5, times (2 L) ** -0.5 for the two that add to the residual; norms are the identity."""
  cfg = dataclasses.replace(MODELS["rope"], num_layers=1, layers=MODELS["rope"].layers[:1])
  init = jax.jit(lambda key: Transformer(cfg).init(key, tokens())["params"])
  for path, x in flatten(init(jax.random.key(0, impl="rbg"))).items():
    assert x.dtype == np.float32, path
    if "norm" in path:
      np.testing.assert_array_equal(x, 1)
      continue
    expected = (cfg.embed_dim if path == "embed" else x.shape[0]) ** -0.5
    if path.endswith(("o/w", "down/w")):
      expected *= (2 * cfg.num_layers) ** -0.5
    assert abs(np.std(x) / expected - 1) < 5 * (2 * x.size) ** -0.5, path  # five standard errors
    assert abs(np.mean(x)) < 5 * expected * x.size**-0.5, path
