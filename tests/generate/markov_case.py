"""A model whose text is a Markov chain: what generation makes of it has a closed form."""

import jax
import numpy as np

from jaxllm.config import Layer, ModelConfig
from jaxllm.nn import Transformer
from jaxllm.position import NoPE


def markov(logits_VV):
  """(Transformer, params) whose logits after token v are logits_VV[v]: attention and MLP add nothing to its embedding."""
  V = len(logits_VV)
  one = dict(num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2, mlp_dim=2)
  model = Transformer(ModelConfig(vocab_size=V, embed_dim=V, layers=(Layer(NoPE()),), **one))
  shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
  params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
  params["embed"] = np.eye(V, dtype=np.float32)
  params["final_norm"]["scale"] += np.float32(V**-0.5)  # the norm makes one coordinate sqrt(V)
  params["head"] = np.asarray(logits_VV, np.float32)
  return model, params


def softmax(logits):
  """Of the last axis, in float64; 0 for -inf."""
  p = np.exp(logits - np.max(logits, axis=-1, keepdims=True))
  return p / p.sum(axis=-1, keepdims=True)


def texts(probs_VV, start, steps):
  """Probabilities of all texts of so many tokens after `start`, [V ** steps]: the first token counts most in a text's place."""
  p = probs_VV[start]
  for _ in range(steps - 1):
    p = p[..., None] * probs_VV.reshape(*[1] * (p.ndim - 1), *probs_VV.shape)
  return p.ravel()
