import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import Layer, ModelConfig
from jaxllm.nn import Transformer
from jaxllm.position import Rope

LENGTHS = (5, 11, 16)


def build(num_layers):
  """(Transformer, params) with weights about twice their initial scale, so that the text varies."""
  model = Transformer(
    ModelConfig(
      vocab_size=64,
      embed_dim=32,
      num_layers=num_layers,
      num_heads=4,
      num_kv_heads=2,
      head_dim=16,
      mlp_dim=64,
      layers=(Layer(Rope(original_length=12)),),
    )
  )
  rng = np.random.default_rng(4)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
  draw = lambda leaf: np.float32(2 * rng.normal(size=leaf.shape) * leaf.shape[0] ** -0.5)
  return model, jax.tree.map(
    lambda leaf: draw(leaf) if leaf.ndim == 2 else 2 * np.ones(leaf.shape, "f"), shapes
  )


@pytest.fixture(scope="session")
def deep():
  """Three layers: what is wrong in the keys and values of one shows in the next."""
  return build(3)


@pytest.fixture(scope="session")
def shallow():
  """One layer: enough for all that happens around the model."""
  return build(1)


@pytest.fixture(scope="session")
def prompts():
  rng = np.random.default_rng(0)
  return [rng.integers(0, 64, length).tolist() for length in LENGTHS]
