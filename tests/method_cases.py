"""Every position method while text is generated: their fields, and what a text is held against."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxllm.generate.loop import generate
from jaxllm.nn import Transformer
from jaxllm.position import LogN, Rope

core, slow = pytest.mark.core, pytest.mark.slow
NEW = 20
"""New tokens: prompts are 5, 11 and 16 long, and the trained length 12, so each row crosses it or starts beyond."""
METHODS = [  # name, fields, query scale; slow: those with a program of their own that is much like another one here
  pytest.param("nope", {}, None, marks=slow),
  pytest.param("sinusoidal", {"base": 2.0}, None, marks=slow),
  ("learned", {"max_length": 36}, None),  # to the last row: 16 tokens of a prompt and 20 new ones
  pytest.param("t5", {"max_distance": 20}, None, marks=slow),
  ("alibi", {}, None),
  pytest.param("rope", {}, None, marks=core),
  ("rope", {}, LogN(12)),
  ("pi", {"factor": 4.0}, None),
  ("ntk_old", {"factor": 4.0}, None),
  ("ntk", {"factor": 4.0}, None),
  ("ntk_fixed", {"factor": 4.0}, None),
  ("ntk_mixed", {"factor": 4.0}, None),
  ("dynamic_ntk", {"factor": 4.0}, None),
  pytest.param("yarn", {"factor": 4.0}, None, marks=core),
  ("ntk_by_parts", {"factor": 4.0}, None),
  ("llama3", {"factor": 4.0}, None),
  pytest.param(
    "longrope",
    {"factor": 4.0, "short_factor": (1.0,) * 8, "long_factor": (1.0, 1.2, 1.5, 2, 2.5, 3, 3.5, 4)},
    None,
    marks=slow,
  ),
  ("proportional", {"proportion": 0.5}, None),
  ("xpos", {"scale_base": 16.0}, None),
  ("rerope", {"window": 5}, None),
  pytest.param("leaky_rerope", {"window": 5, "leak": 4.0}, None, marks=slow),
  pytest.param("inv_leaky_rerope", {"window": 5, "factor": 2.0}, None, marks=slow),
  pytest.param("self_extend", {"window": 5, "group": 3}, None, marks=slow),
  ("streaming", {"window": 5, "sinks": 2}, None),
  pytest.param("rope_2d", {}, None, marks=slow),
]


@functools.partial(jax.jit, static_argnames="model")
def forward(model, params, tokens_BT, rope):
  """Logits [B, T, V] with no cache."""
  return model.apply({"params": params}, tokens_BT, rope=rope)[0]


def method_of(cfg, name, fields, query_scale=None):
  """The config of a trained model with another method."""
  return dataclasses.replace(cfg.with_position(name, **fields), query_scale=query_scale)


def learned(cfg):
  """Tables for methods that the trained model has none for."""
  draw = lambda shape: np.random.default_rng(0).standard_normal(shape).astype(np.float32)
  tables = {
    str(i): {name: draw(shape) for name, (shape, _) in method.params(cfg).items()}
    for i, method in enumerate(cfg.learned_positions)
  }
  return {"positions": tables} if tables else {}


def assert_argmax(logits_BTV, prompts, tokens):
  """Each new token is the argmax after all before it: by induction the text of token-by-token full passes."""
  for row, (prompt, new) in enumerate(zip(prompts, tokens, strict=True)):
    start = len(prompt) - 1
    np.testing.assert_array_equal(new, np.argmax(logits_BTV[row, start : start + len(new)], axis=-1))


def joined(prompts, tokens):
  """Prompts with their new tokens, right-padded, [B, T]: padding comes after all that is compared."""
  rows = [[*prompt, *new] for prompt, new in zip(prompts, tokens, strict=True)]
  return np.array([row + [0] * (max(map(len, rows)) - len(row)) for row in rows], np.int32)


def check_text(cfg, method, params, prompts, tolerance=1e-4, **arguments):
  """(error, text) of greedy text with a method on a trained model; of log-probabilities of all tokens, by the largest logit.

  They are those of one full forward pass over prompts and text, whose argmax each token is.  A method that is a set of
  frequencies is data for the program of the trained model.  With weights at twice their scale the full pass in float32 is
  itself off the float64 decoder by up to 1.7e-5, and two full passes, over the batch and over one of its rows, differ by
  3.4e-5 on a CPU with AVX-512: hence the tolerance.
  """
  position = method.layers[0].position
  if isinstance(position, Rope) and not (position.needs_raw_keys or position.two_dimensional):
    model, rope = Transformer(cfg), method.rope_tables()
    tables = rope
  else:
    model, rope, tables = Transformer(method), None, method.rope_tables(max_len=max(map(len, prompts)) + NEW)
    params = params | learned(method)
  usual = dict(max_new_tokens=NEW, stop_ids=(), rope=rope, logprobs=cfg.vocab_size)
  out = generate(model, params, prompts, **usual | arguments)
  assert out.reasons == ["length"] * len(prompts) and [len(new) for new in out.tokens] == [NEW] * len(prompts)
  logits_BTV = np.asarray(forward(model, params, joined(prompts, out.tokens), tables), np.float64)
  assert_argmax(logits_BTV, prompts, out.tokens)
  errors = []
  for row, prompt in enumerate(prompts):
    logits_TV = logits_BTV[row, len(prompt) - 1 :][:NEW]
    truth_TV = logits_TV - np.log(np.sum(np.exp(logits_TV), axis=-1, keepdims=True))
    found_TV = [[logprob for _, logprob in sorted(of_all)] for of_all in out.likeliest[row]]
    errors.append(np.max(np.abs(found_TV - truth_TV)) / np.max(np.abs(logits_TV)))
  assert max(errors) <= tolerance, errors
  return max(errors), out.tokens
