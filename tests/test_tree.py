"""Paths, the one selector, differences of trees, and what they say to a user."""

import numpy as np
import pytest

from jaxllm import tree
from jaxllm.errors import CheckpointError, ConfigError

TREE = {
  "embed": np.zeros((3, 2)),
  "layers": {"0": {"w": np.ones((2, 4)), "b": np.ones(4)}, "10": {"w": np.ones((2, 4))}},
}
RULES = [(r"embed", "table"), (r"layers/\d+/w", "kernel"), (r".*/w", "never"), (r"layers/.*", "rest")]


@pytest.mark.core
def test_flatten_and_unflatten():
  flat = tree.flatten(TREE)
  assert list(flat) == ["embed", "layers/0/w", "layers/0/b", "layers/10/w"]
  assert tree.unflatten(flat) == TREE
  assert tree.num_parameters(TREE) == 6 + 8 + 4 + 8


def test_the_first_rule_that_matches_the_whole_path():
  found = {path: tree.first_match(RULES, path) for path in tree.flatten(TREE)}
  assert found == {"embed": "table", "layers/0/w": "kernel", "layers/0/b": "rest", "layers/10/w": "kernel"}
  with pytest.raises(ConfigError, match=r"no rule matches the parameter 'embedding'; rules: embed, "):
    tree.first_match(RULES, "embedding")


def test_diff_names_everything_at_once():
  assert tree.diff(TREE, TREE) == []
  found = tree.unflatten(
    {
      "embed": np.zeros((3, 5)),
      "layers/0/w": np.ones((2, 4), np.float32),
      "layers/10/w": np.ones((2, 4)),
      "head": np.ones(1),
    }
  )
  lines = [
    "dtype: layers/0/w is float32, expected float64",
    "missing: layers/0/b (4,)",
    "shape: embed is (3, 5), expected (3, 2)",
    "unexpected: head (1,)",
  ]
  assert tree.diff(TREE, found) == lines
  with pytest.raises(CheckpointError) as error:
    tree.check_same(TREE, found, "run/step_3")
  assert str(error.value) == "run/step_3: the parameters do not fit the model\n  " + "\n  ".join(lines)
  tree.check_same(TREE, TREE, "run/step_3")


def test_a_long_list_of_differences_is_cut():
  many = {str(i): np.zeros(1) for i in range(50)}
  with pytest.raises(CheckpointError, match=r"(?s)missing: 0 .*\(\+30 more\)"):
    tree.check_same(many, {}, "file")
