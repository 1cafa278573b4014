"""Every filter with its parameters as scalars and as one a row, and texts in which all of them act."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.sampling import SAMPLERS, token_mask

B, V = 6, 33
RNG = np.random.default_rng(3)
# of few tokens, so that they repeat; one of one token, one that repeats itself whole
PROMPTS = [[1, 2, 3, 1, 2], [4], [5, 6] * 4, [7, 8, 9, 7, 8, 9, 10, 7, 8], [3] * 6, [11, 0, 11, 0, 12, 11]]
DRAWN = [[3, 4, 5, 9, 3, 0], [1, 4, 6, 7, 3, 11], [2, 4, 5, 8, 3, 0]]  # one list a draw
BIAS = RNG.normal(size=(B, V)).astype(np.float32)
BIAS[:, 5] = -np.inf
MASK = RNG.random((B, V)) < 0.4

CASES = {  # name: parameters of each case
  "min_p": [{"min_p": 0.1}, {"min_p": [0.0, 0.02, 0.1, 0.5, 0.9, 1.0]}],
  "typical": [{"p": 0.7}, {"p": [0.0, 0.1, 0.5, 0.9, 0.99, 1.0]}],
  "epsilon": [{"epsilon": 0.02}, {"epsilon": [0.0, 3e-4, 9e-4, 0.05, 0.5, 1.0]}],
  "eta": [{"epsilon": 0.3}, {"epsilon": [0.0, 3e-4, 4e-3, 0.05, 0.5, 1.0]}],
  "top_n_sigma": [{"n": 1.0}, {"n": [0.0, 0.1, 0.5, 1.0, 2.0, 5.0]}],
  "repetition_penalty": [
    {"penalty": 1.3},
    {"penalty": [1.0, 1.1, 2.0, 0.5, 1.5, 3.0], "last_n": [-1, 0, 1, 3, 100, 4]},
  ],
  "presence_penalty": [
    {"penalty": 0.7},
    {"penalty": 0.7, "prompt": True},
    {
      "penalty": [0.5, 2.0, -2.0, 0.0, 1.0, 0.1],
      "prompt": [True, False] * 3,
      "last_n": [-1, 0, 1, 3, 100, 4],
    },
  ],
  "frequency_penalty": [
    {"penalty": 0.7},
    {"penalty": 0.7, "prompt": True, "last_n": 5},
    {
      "penalty": [0.5, 2.0, -2.0, 0.0, 1.0, 0.1],
      "prompt": [True, False] * 3,
      "last_n": [-1, 0, 1, 3, 100, 4],
    },
  ],
  "no_repeat_ngram": [{"n": 2}, {"n": [0, 1, 2, 3, 4, 1000]}],
  "logit_bias": [{"bias": BIAS[0]}, {"bias": BIAS}],
  "banned_tokens": [{"mask": MASK[0]}, {"mask": MASK}],
  "forced_tokens": [{"tokens": [-1, -1, -1, 7]}, {"tokens": [[7, -1, -1, 3 * i - 1] for i in range(B)]}],
  "min_new_tokens": [
    {"number": 4, "stop": token_mask([2, 9], V)},
    {"number": [0, 1, 2, 3, 4, 5], "stop": MASK},
  ],
  "xtc": [
    {"probability": 1.0, "threshold": 0.1},
    {"probability": 0.5, "threshold": 0.06, "keep": token_mask([4, 9, 20, 30], V)},
    {"probability": [0.0, 1.0, 1.0, 1.0, 1.0, 0.5], "threshold": [0.1, 0.0, 0.05, 0.5, 1.0, 0.02]},
  ],
  "dry": [
    {"multiplier": 0.8},
    {"multiplier": 0.8, "base": 1.2, "allowed_length": 1, "breakers": token_mask([2, 9], V)},
    {
      "multiplier": [0.0, 0.5, 1.0, 2.0, 0.8, 0.8],
      "base": [1.0, 1.1, 2.0, 3.0, 1.75, 4.0],
      "allowed_length": [1, 1, 2, 1, 2, 1],
      "last_n": [-1, 0, 8, 5, 100, -1],
      "breakers": np.stack([token_mask([row + 20] if row < 5 else [11], V) for row in range(B)]),
    },
  ],
  "mirostat": [{"tau": 1.5}, {"tau": [0.01, 0.5, 1.0, 2.0, 3.0, 5.0], "eta": [0.0, 0.1, 0.2, 1.0, 0.5, 2.0]}],
}
FLAT = [(name, index) for name, cases in CASES.items() for index in range(len(cases))]


def logits(seed=0, shape=(B, V), scale=2.0):
  return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32)


def keys(seed=0, rows=B):
  return jax.random.split(jax.random.key(seed), rows)


def build(name, index):
  """The sampler of a case."""
  return SAMPLERS[name](**CASES[name][index])


def padded(prompts, width=None):
  """(tokens [B, T], lengths [B]), padded with a token that occurs, which only a wrong mask would count."""
  width = width or max(map(len, prompts))
  return np.array([row + [1] * (width - len(row)) for row in prompts]), np.array(list(map(len, prompts)))


@functools.cache
def case(name, index):
  """(sampler, its state) of a case."""
  sampler = build(name, index)
  return sampler, started(sampler)


def started(sampler, rows=range(B), width=None):
  """The sampler's state at the fourth draw: after the prompts and DRAWN of these rows, its coins tossed."""
  state = sampler.init(*padded([PROMPTS[row] for row in rows], width), 8)
  for step, drawn in enumerate(DRAWN):
    tokens_B = jnp.asarray([drawn[row] for row in rows], jnp.int32)
    state = sampler.update(tokens_B, state, logits(10 + step)[np.array(rows)])
  return sampler.toss(keys(5)[np.array(rows)], state)


def text(row):
  """The ids of a row at that draw."""
  return PROMPTS[row] + [drawn[row] for drawn in DRAWN]


def parameters(name, index, row):
  """The parameters of one row of a case."""
  shapes = {"bias": 2, "mask": 2, "tokens": 2, "stop": 2, "keep": 2, "breakers": 2}
  pick = lambda key, value: value[row] if np.ndim(value) == shapes.get(key, 1) else value
  return {key: pick(key, value) for key, value in CASES[name][index].items()}


def one_row(sampler, row):
  """The sampler of one row alone."""
  cut = lambda leaf: leaf[row : row + 1] if np.ndim(leaf) and np.shape(leaf)[0] == B else leaf
  return jax.tree.map(cut, sampler)
