"""What every test of checkpoints shares: the shapes of a model are traced once, however many tests load and save it."""

import functools

import pytest

from jaxllm.hf import match, saving

SHAPES = functools.cache(match.expected_shapes)


@pytest.fixture(autouse=True)
def traced_once(monkeypatch):
  """`expected_shapes` with a memory."""
  for module in (match, saving):
    monkeypatch.setattr(module, "expected_shapes", lambda cfg: dict(SHAPES(cfg)))
