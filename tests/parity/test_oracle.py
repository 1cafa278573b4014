"""float32 logits against the float64 decoder of oracle.py, at positions to a million."""

import json
from pathlib import Path

import numpy as np
import oracle
import pytest
from model_cases import MODELS, T, each_model, tokens
from model_checks import check_large_mean, check_oracle, check_small_embeddings, full

from jaxllm.position import POSITIONS

GOLDEN = Path(__file__).parents[1] / "golden"


@each_model
@pytest.mark.parametrize("offset", [0, 4_000, 32_000, 131_000, 1_000_000])
def test_logits(name, offset):
  limit = MODELS[name].length_limit
  if (
    limit is not None and offset + T > limit
  ):  # a learned table has no such rows: nothing but NaN comes of it
    assert np.isnan(full(MODELS[name], tokens(), offset)).all()
  else:
    check_oracle(name, offset)


def test_learned_positions_from_the_last_rows_of_their_table():
  check_oracle("learned", MODELS["learned"].length_limit - T)


def test_layer_norm_of_a_large_mean():
  check_large_mean("yarn, and the rest otherwise")


@pytest.mark.parametrize("name", ["rope", "yarn, and the rest otherwise"])
def test_norms_of_small_embeddings(name):
  check_small_embeddings(name)


def test_the_oracle_has_the_golden_frequencies():
  for row in json.loads((GOLDEN / "rope.json").read_text())["frequencies"]:
    found, scale = oracle.inv_freq(
      POSITIONS[row["method"]](**row["kw"]), row["rotary_dim"], row["seq_len"] or 1
    )
    np.testing.assert_allclose(found, row["inv_freq"], rtol=1e-12, err_msg=str(row["kw"]))
    np.testing.assert_allclose(scale, row["scale"], rtol=1e-12, err_msg=str(row["kw"]))
