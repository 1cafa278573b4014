"""What a model is said to be: a line for what not every decoder has."""

import dataclasses

import jax
import pytest
from model_cases import MODELS

from jaxllm.study.describe import model_lines, products

ROPE = MODELS["rope"]


@pytest.mark.parametrize(
  ("cfg", "line"),
  [
    (MODELS["rope_2d"], "block positions: 0 throughout a text, which is read causally"),
    (dataclasses.replace(ROPE, norm_head=True), "head of its own, each token normalised"),
    (dataclasses.replace(ROPE, logit_scale=0.25), "scales and caps: logit scale 0.25"),
  ],
)
def test_what_is_unusual_has_words(cfg, line):
  assert line in "\n".join(model_lines(cfg)) and line not in "\n".join(model_lines(ROPE))


@pytest.mark.parametrize(
  ("backend", "asked", "words"),
  [
    (
      "gpu",
      None,
      "products in TF32, where the GPU has it (JAX_DEFAULT_MATMUL_PRECISION=highest for float32); ",
    ),
    ("tpu", "default", "products in bfloat16 (JAX_DEFAULT_MATMUL_PRECISION=highest for float32); "),
    ("gpu", "tensorfloat32", "products in tensorfloat32 (jax_default_matmul_precision); "),
    ("gpu", "highest", ""),
    ("cpu", None, ""),
  ],
)
def test_products_in_less_than_float32_are_said(monkeypatch, backend, asked, words):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  with jax.default_matmul_precision(asked):
    assert products("float32") == words and products("bfloat16") == ""
