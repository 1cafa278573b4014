"""First tokens of many rows of one prompt, through all of `generate`, against float64 probabilities."""

import filter_reference
import jax
import numpy as np
import pytest
from sampling_reference import check_drawn

from jaxllm.generate.loop import generate
from jaxllm.sampling import SAMPLERS, Chain

ROWS = 4000
"""A call; they go on with keys of their own."""
PROMPT = [5, 9, 33, 9, 5, 60]
NAMES = {
  "repetition_penalty": "penalty",
  "temperature": "temperature",
  "top_k": "k",
  "top_p": "p",
  "min_p": "min_p",
}
CELLS = [  # values of these, in order
  (1.0, 1.0, 0, 1.0, 0.0),
  (1.0, 0.7, 9, 0.9, 0.0),
  (1.5, 2.0, 0, 0.8, 0.05),
  (1.3, 3.0, 20, 1.0, 0.1),
  (1.3, 0.0, 0, 1.0, 0.0),
]
DEFAULT = {CELLS[1]: [], CELLS[2]: [pytest.mark.core], CELLS[4]: []}


@pytest.mark.parametrize(
  ("cell", "calls"),
  [pytest.param(cell, 1, marks=marks) for cell, marks in DEFAULT.items()]
  + [pytest.param(cell, 50, marks=pytest.mark.slow) for cell in CELLS],
)
def test_first_tokens_are_drawn_from_the_filtered_probabilities(shallow, cell, calls):
  model, params = shallow
  logits, _ = model.apply({"params": params}, np.array([PROMPT], np.int32), logits="last")
  filters = [(name, {field: value}) for (name, field), value in zip(NAMES.items(), cell, strict=True)]
  filtered_V, margin = filter_reference.chained(np.asarray(logits[0, 0], np.float64), PROMPT, 0, filters)
  assert margin > 1e-4
  sampler = Chain(tuple(SAMPLERS[name](**kw) for name, kw in filters))
  drawn = []
  for call in range(calls):
    out = generate(
      model,
      params,
      [PROMPT],
      copies=ROWS,
      sampler=sampler,
      key=jax.random.key(call),
      max_new_tokens=1,
      stop_ids=(),
    )
    drawn += [token for (token,) in out.tokens]
  check_drawn(np.array(drawn), filter_reference.softmax(filtered_V), "generate, rows of one prompt")
