"""Damaged headers and settings at random: only errors for the user come out, soon, and in little memory.

`pytest -m slow -s tests/hf/test_fuzz.py` shows what came of the full counts.
"""

import json

import fuzz
import ml_dtypes
import numpy as np
import pytest
from family_cases import ROWS, settings
from safetensors.numpy import save

from jaxllm.errors import ConfigError
from jaxllm.hf import files, header, sizes
from jaxllm.hf.families import read_config
from jaxllm.hf.plain import parse_json

SEED = 0
counts = lambda few, many: pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)])


@counts(5_000, 100_000)
def test_headers(tmp_path, count):
  """By the reader of files, from one that is written over; what is accepted can be viewed whole."""
  tensors = {
    "model.embed_tokens.weight": np.ones((5, 3), np.float32),
    "model.layers.0.mlp.up_proj.weight": np.ones((4, 3), ml_dtypes.bfloat16),
    "b": np.ones((2, 1, 2), np.float16),
    "c": np.zeros((0, 3), np.int8),
    "d": np.array(1, np.int64),
  }
  data = save(tensors, metadata={"format": "pt"})
  size = int.from_bytes(data[:8], "little")
  plain, values = json.loads(data[8 : 8 + size]), data[8 + size :]
  path = tmp_path / files.SINGLE
  path.touch()

  def read(case):
    with open(path, "r+b") as file:  # written over: to make one anew takes longer than to read it
      file.write(case)
      file.truncate()
    found = files.Checkpoint(tmp_path)
    for name, stored in found.tensors.items():
      assert stored.stop <= len(case) and found.view(name).nbytes == stored.stop - stored.start

  outcomes = fuzz.run(count, SEED, lambda rng: fuzz.header_case(rng, plain, values), read)
  assert 0.05 * count < outcomes["loaded"] < 0.5 * count and len(outcomes) > 12


@counts(2_000, 20_000)
def test_settings(count):
  """Of every row of the families; a config that is read is a value, and its size is told."""
  rows = [dict(settings(row)) for row in ROWS]

  def read(case):
    cfg = read_config(parse_json(case, "config.json", ConfigError))[1]
    hash(cfg)
    assert sizes.at_least(cfg) > 0 and cfg.num_layers <= 10_000

  outcomes = fuzz.run(count, SEED, lambda rng: fuzz.config_case(rng, rows), read)
  assert 0.05 * count < outcomes["loaded"] < 0.5 * count and len(outcomes) > 12


def test_the_seed_tells_the_case():
  """The same cases in every run, so that a number names one."""
  import random

  make = lambda i: fuzz.config_case(random.Random(f"{SEED}/{i}"), [dict(settings("llama"))])
  assert [make(i) for i in range(20)] == [make(i) for i in range(20)]
  assert len({make(i) for i in range(20)}) > 10
  assert max(len(make(i)) for i in range(20)) < header.HEADER_LIMIT
