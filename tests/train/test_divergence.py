"""train.divergence: which step is looked into, on what, and in which order."""

import math

import pytest

from jaxllm.train import divergence, loop


def test_the_steps_before_the_bad_one_are_done_again(monkeypatch):
  """From the state of step 3, the batches of 3, 4 and 5 are gone through, and that of 6 is looked into."""
  done = []

  class Source:
    batch = staticmethod(lambda step: step)
    describe = staticmethod(lambda step: f"batch {step}")

  def step(state, batch):
    done.append(batch)
    return {"step": state["step"] + 1}, None

  monkeypatch.setattr(
    divergence, "first_bad", lambda model, config, state, batch: f"{state['step']}, {batch}"
  )
  found = divergence.explain(None, None, Source, lambda: {"step": 3}, step, lambda batch: 10 * batch, 6)
  assert done == [30, 40, 50] and found == "batch 6; 6, 60"


@pytest.mark.parametrize(
  ("last", "step"),
  [
    (({}, {"loss": math.nan}, {"loss": math.nan}), 8),
    (({}, {"grad_norm": math.inf}, {"loss": math.nan}), 8),
    (({}, {}, {}), 9),  # the update of the last step is what is not finite
    (({"grad_norm": math.inf, "skipped": 1}, {"loss": math.inf, "skipped": 1}, {"skipped": 1}), 8),
    (({"grad_norm": math.inf, "skipped": 1},) * 3, None),
  ],
)
def test_the_step_that_is_looked_into(last, step):
  """Of the steps from 7 to 9, counted from 0."""
  since = [{"loss": 1.0, "grad_norm": 1.0} | told for told in last]
  assert loop._culprit(since, 10) == step


def test_modules_come_in_the_order_of_a_pass():
  """What a module is made of before it, so that the first output that is not finite is that of the innermost."""
  order = [
    "embed",
    "layers/0/attn_norm",
    "layers/0/attn/q",
    "layers/0/attn",
    "layers/0/mlp_norm",
    "layers/0/mlp/up",
    "layers/0/mlp",
    "layers/0",
    "layers/1/attn",
    "layers/10/attn_norm",
    "final_norm",
  ]
  assert sorted(reversed(order), key=divergence._place) == order
