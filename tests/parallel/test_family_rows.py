"""Every row of the table of model families, on every rule set: the models of tests/hf with heads that the meshes divide."""

import functools
import sys
from pathlib import Path

import pytest
from mesh_cases import as_loaded
from mesh_checks import MESHES, check_equal

sys.path.insert(0, str(Path(__file__).parents[1] / "hf"))

from family_cases import REMOTE, ROWS, build, settings

HEADS = ("num_attention_heads", "n_head", "n_heads")
KEY_HEADS = ("num_key_value_heads", "multi_query_group_num")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def dividing(row):
  """The row's settings with heads in fours, two layers and windows of five tokens; 199 tokens are padded, widths divide."""
  plain = settings(row)
  heads = {name: -(-plain[name] // 4) * 4 for name in HEADS if name in plain}
  for name in KEY_HEADS:
    if (kv := plain.get(name, 1)) > 1:
      heads[name] = 4 if kv == 2 else max(heads.values())
  lists = {name: plain[name][:2] for name in ("layer_types", "no_rope_layers") if name in plain}
  windows = {"sliding_window": 5} if plain.get("sliding_window") else {}
  wide = {"hidden_size": 96} if row in REMOTE else {}  # whose heads are shares of it that turn in pairs
  return plain | wide | heads | lists | windows | {name: 2 for name in LAYERS if name in plain}


@functools.cache
def model(row):
  """(config, a function that makes the parameters) of a row, matrices held as a checkpoint has them."""
  built = build(dividing(row))
  return built.cfg, functools.partial(as_loaded, built.params)


def marks(*row):
  return [pytest.mark.core if row == ("gemma3_text", "tensor", "data=2,tensor=4") else pytest.mark.slow]


@pytest.mark.parametrize(
  ("row", "rules", "axes"),
  [
    pytest.param(row, *mesh, marks=marks(row, *mesh), id=f"{row}-{mesh[0]}-{mesh[1]}")
    for row in ROWS
    for mesh in MESHES
  ],
)
def test_loss_logits_and_gradients(row, rules, axes):
  check_equal(*model(row), rules, axes)
