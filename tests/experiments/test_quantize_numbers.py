"""experiments.quantize: decoding beside the weights as loaded, and the rows made of a ledger's, of numbers set by hand."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from experiments import decoding
from experiments.quantization import cells, joint, results
from experiments.quantization.cells import SIDES, Work
from experiments.scoring import Scoring
from jaxllm.study import methods, rows
from jaxllm.study.cells import Group

BATCH, PROMPT, NEW, ROUNDS, SECONDS = 3, 4, 6, 4, 6.0
TOOK = {"loaded": 2.0, "int8": 0.5}
"""Seconds of a reading; the first one of each takes 100 more."""


def test_each_side_is_read_compiled_and_all_its_tokens_count_and_each_is_first_in_turns(monkeypatch):
  seen = []

  def timed(model, params, prompts, new):
    assert np.asarray(prompts).tolist() == np.arange(BATCH * PROMPT).reshape(BATCH, PROMPT).tolist()
    assert new == NEW
    seen.append(params)
    return 50.0, TOOK[params] + 100.0 * (seen.count(params) == 1)

  monkeypatch.setattr(decoding, "timed", timed)
  monkeypatch.setattr(cells, "Transformer", lambda cfg: cfg)
  text = SimpleNamespace(ids=np.arange(100))
  source = SimpleNamespace(text=text, cfg=None, params=lambda: "loaded")
  asked = {"prompt": PROMPT, "batch": BATCH, "new": NEW, "rounds": ROUNDS, "seconds": SECONDS}
  work = Work(SimpleNamespace(asked=asked, source=source), None, None, SimpleNamespace(check=lambda: None))
  group = Group(
    "int8/decode", tuple({"turn": turn, "side": side} for turn in range(ROUNDS) for side in SIDES)
  )
  found = work._decode("int8", group)
  speed = {SIDES[0]: BATCH * (NEW - 1) / 2.0, SIDES[1]: BATCH * (NEW - 1) / 0.5}
  assert [(row["turn"], row["side"], row["value"]) for row in found] == [
    (turn, side, pytest.approx(speed[side])) for turn in range(ROUNDS) for side in SIDES
  ]
  times = 3  # readings of 2 s that fill 6
  assert sorted(seen[:2]) == ["int8", "loaded"] and len(seen) == 2 + 1 + 2 * times * ROUNDS
  first = []
  for turn in range(ROUNDS):
    both = seen[3 + 2 * times * turn :][: 2 * times]
    assert [both[:times].count(both[0]), both[times:].count(both[-1])] == [times, times]
    assert both[0] != both[-1]
    first.append(both[0])
  assert first[0] != first[1] and first == first[:2] * 2


class Numbers:
  """A plan of four stretches, of 2 tokens and 4 bytes each."""

  text = SimpleNamespace(sizes=np.full(8, 2))

  def cell(self, name):
    return {"quant": name}

  def scored(self, name):
    return Scoring(self.text, None, np.arange(0, 9, 2), 1, 1, name)


def ledger(bits, speeds):
  """The rows of schemes of so many bits a byte, in stretches of 4 bytes, and so many tokens a second, by turn and side."""
  windows, decode = {}, {}
  for name, amount in bits.items():
    nats = [rows.ok({"stretch": i, "metric": "nats"}, amount * math.log(2) * 4) for i in range(4)]
    windows[name] = nats + [rows.ok({"stretch": i, "metric": "hits"}, 0.0) for i in range(4)]
    decode[name] = [
      rows.ok({"turn": turn, "side": side}, value)
      for turn, values in enumerate(speeds)
      for side, value in zip(SIDES, values, strict=True)
    ]
  return {"weights": {name: [] for name in bits}, "windows": windows, "decode": decode}


def test_speed_is_a_multiple_of_that_as_loaded_and_bits_per_byte_are_bits():
  by_kind = ledger({"none": 1.0, "int8": 1.5}, [(10.0, 30.0), (20.0, 50.0), (5.0, 40.0)])
  found = {
    row["metric"]: (row["value"], row["low"], row["high"])
    for row in results.of_scheme(Numbers(), "int8", by_kind)
  }
  assert found["times_none"] == (3.0, 2.5, 8.0)
  assert found["tokens_per_second"] == (40.0, 30.0, 50.0)
  assert found["bpb_difference"] == pytest.approx((0.5, 0.5, 0.5))
  assert found["bpb"][0] == pytest.approx(1.5)
  # 4 bytes on 2 tokens: 2 ** (2 * 1.5) beside 2 ** 2
  assert found["perplexity"][0] == pytest.approx(8.0)
  assert found["perplexity_difference"] == pytest.approx((4.0, 4.0, 4.0))


def test_the_joint_difference_is_the_loss_above_that_of_none_of_the_same_method_length_and_window():
  losses = {
    ("none", "pi", 0): 2.0,
    ("int8", "pi", 0): 2.5,
    ("none", "yarn", 0): 3.0,
    ("int8", "yarn", 0): 2.75,
  }
  losses |= {("none", "pi", 1): 1.0, ("int8", "pi", 1): 3.0}
  swept = [
    rows.ok(
      {"quant": q, "method": m, "factor": 2.0, "length": 8, "window": w, "metric": methods.BY_WINDOW}, x
    )
    for (q, m, w), x in losses.items()
  ]
  found = {(row["quant"], row["method"], row["seed"]): row["value"] for row in joint.differences(swept)}
  assert found == {("int8", "pi", 0): 0.5, ("int8", "yarn", 0): -0.25, ("int8", "pi", 1): 2.0}
