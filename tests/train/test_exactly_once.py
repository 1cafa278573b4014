"""The order of the data as a property: every row once an epoch, whatever the places where a run went on."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_table import about, measured

from jaxllm.train.batches import Data, batch
from jaxllm.train.order import permuted

EXAMPLES = [pytest.param(30, id="30"), pytest.param(10_000, id="10000", marks=pytest.mark.slow)]


class Rows:
  """Stands in for the rows of a text, of which only the number counts here."""

  def __init__(self, count):
    self.count = count

  def __len__(self):
    return self.count


@pytest.fixture
def taken(monkeypatch):
  """{(seed, step): rows}: what `batch` takes from its data."""
  from jaxllm.train import batches

  monkeypatch.setattr(batches, "take", lambda data, rows, seed, step: np.asarray(rows))


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.usefixtures("taken")
def test_each_row_once_an_epoch(examples):
  """Of any number of rows and size of batch, from any seed, gone on anywhere, twice in one epoch, in any parts of a batch."""
  about("order", "rows of an epoch, with interruptions")

  @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
  @given(
    rows=st.integers(1, 500),
    extra=st.integers(0, 12),
    seed=st.integers(0, 2**63),
    epochs=st.integers(1, 3),
    cuts=st.lists(st.floats(0, 1), max_size=5),
    parts=st.integers(1, 4),
  )
  def holds(rows, extra, seed, epochs, cuts, parts):
    size = extra + max(1, epochs * rows // 25)  # so that there are not very many steps
    data = Data(None, None, Rows(rows), 8, size)
    steps = -(-epochs * rows // size)
    straight = [batch(data, seed, step) for step in range(steps)]
    places = sorted({0, steps, *(round(cut * steps) for cut in cuts)})
    resumed = [
      np.concatenate([batch(data, seed, step, slice(i, None, parts)) for i in range(parts)])
      for begin, end in itertools.pairwise(places)
      for step in range(begin, end)
    ]
    assert all((np.sort(a) == np.sort(b)).all() for a, b in zip(straight, resumed, strict=True))
    flat = np.concatenate(straight)
    for epoch in range(epochs):
      here = flat[epoch * rows : (epoch + 1) * rows]
      assert (np.sort(here) == np.arange(rows)).all()
      assert (here == permuted(np.arange(rows), rows, seed, epoch)).all()

  holds()
  measured("order", "rows of an epoch, with interruptions", examples=examples, differ=0)
