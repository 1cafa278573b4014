"""A checkpoint that hf.load has read generates with every position method, past its trained length."""

import dataclasses

import numpy as np
import pytest
import varied
from generation_table import about, measured
from method_cases import METHODS, check_text

from jaxllm.position import POSITIONS

DEFAULT = {"yarn": [pytest.mark.core], "dynamic_ntk": []}
LENGTHS = (5, 11, 16)
"""Of prompts; with the trained length 12 each row crosses it or starts beyond."""


def row(case):
  name, fields, _ = getattr(case, "values", case)
  return pytest.param(name, fields, marks=DEFAULT.get(name, [pytest.mark.slow]))


@pytest.mark.parametrize(
  ("name", "fields"), [row(case) for case in METHODS if getattr(case, "values", case)[2] is None]
)
def test_decoding_is_the_full_forward_pass_with_another_method(checkpoint, name, fields):
  about("cache", name)
  cfg, params = checkpoint
  known = {field.name for field in dataclasses.fields(POSITIONS[name])}
  fields = fields | {
    key: x for key, x in {"original_length": 12, "base": 500.0}.items() if key in known and key not in fields
  }
  if name == "longrope":  # a factor a frequency, of which heads of 20 have ten
    fields |= {"short_factor": (1.0,) * 10, "long_factor": tuple(np.linspace(1, 4, 10))}
  rng = np.random.default_rng(6)
  prompts = [rng.integers(8, cfg.vocab_size, n).tolist() for n in LENGTHS]
  error, text = check_text(cfg, cfg.with_position(name, **fields), params, prompts)
  assert min(len(set(new)) for new in text) >= 5
  measured("cache", name, loaded=error)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """(cfg, params), weights as [out, in]."""
  return varied.saved("llama", tmp_path_factory.mktemp("llama"))
