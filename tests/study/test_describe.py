"""What a model is said to be: a line for what not every decoder has."""

import dataclasses

import pytest
from model_cases import MODELS

from jaxllm.study.describe import model_lines

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
