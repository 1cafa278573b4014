"""Rows of an epoch: windows, packed documents, what is held out, and batches as functions of seed and step."""

import collections
import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.errors import ConfigError, DataError
from jaxllm.train.batches import batch, lay_out, take
from jaxllm.train.objectives import BlankInfilling, Causal, PrefixLm
from jaxllm.train.packing import documents, held_out, longest_piece, plan
from jaxllm.train.tokens import Text

END = 1
GLM = BlankInfilling(mask=300, sop=301, eop=302)
OBJECTIVES = {"causal": Causal(), "prefix_lm": PrefixLm(), "glm": GLM}


def text_of(lengths):
  """Documents of so many tokens, their end included, without two tokens alike."""
  count = 10 + sum(lengths)
  ids = np.arange(10, count, dtype=np.uint32)
  ids[np.cumsum(lengths) - 1] = END
  return Text(ids, count, END)


def equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.core
def test_windows_hold_every_token_once():
  text = Text(np.arange(100, dtype=np.uint8), 256)
  data = lay_out(text, Causal(), length=8, size=3)
  assert len(data.rows) == 12  # of (100 - 1) / 8
  one = take(data, range(12), seed=0)
  assert one.tokens.ravel().tolist() == list(range(96)) and one.labels.ravel().tolist() == list(range(1, 97))
  assert (one.weights == 1).all() and jax.tree.leaves(one.context) == []
  glm = lay_out(text, GLM, length=20, size=3).rows
  assert glm.size == glm.stride == longest_piece(GLM, 20) and GLM.slots(glm.size) <= 20 < GLM.slots(
    glm.size + 1
  )


@given(
  lengths=st.lists(st.integers(1, 40), min_size=1, max_size=40),
  name=st.sampled_from(list(OBJECTIVES)),
  length=st.integers(8, 24),
)
@settings(max_examples=100, deadline=None)
def test_documents_are_packed_whole_or_cut_into_full_rows(lengths, name, length):
  text, objective = text_of(lengths), OBJECTIVES[name]
  if max(lengths) < 2:
    with pytest.raises(DataError, match="expected at least"):
      lay_out(text, objective, length, 1)
    return
  rows = plan(text, documents(text), objective, length)
  pieces = [rows.pieces(r) for r in range(len(rows))]
  assert all(sum(objective.slots(n) for _, n in row) <= length and row for row in pieces)
  found = sorted(piece for row in pieces for piece in row)
  size, expected, start = longest_piece(objective, length), [], 0
  for n in lengths:
    at = 0
    while n - at >= 2:
      expected.append((start + at, min(size, n - at)))
      at += size - objective.overlap
    start += n
  assert found == [piece for piece in expected if piece[1] >= 2]
  # no two rows could have been one, as one document that fits is never put into a new row
  used = sorted(sum(objective.slots(n) for _, n in row) for row in pieces)
  assert len(used) < 2 or used[0] + used[1] > length


def test_packing_leaves_little_room():
  lengths = np.random.default_rng(0).geometric(1 / 60, 5000) + 1
  data = lay_out(text_of(lengths.tolist()), Causal(), length=256, size=8)
  one = take(data, range(len(data.rows)), seed=0)
  assert one.weights.mean() > 0.99  # documents in the order of the text, one row after another: 0.89
  assert len(data.rows.table) > 5000


def test_labels_do_not_cross_documents():
  data = lay_out(text_of([4, 3, 9]), Causal(), length=6, size=1)
  one = take(data, range(len(data.rows)), seed=0)
  # the last document, 17 ... 24 and its end, is a full row and a rest that begins with the last one's label
  assert one.tokens.tolist() == [[10, 11, 12, 14, 15, 0], [17, 18, 19, 20, 21, 22], [23, 24, 0, 0, 0, 0]]
  assert one.labels.tolist() == [[11, 12, END, 15, END, 0], [18, 19, 20, 21, 22, 23], [24, END, 0, 0, 0, 0]]
  assert one.weights.tolist() == [[1, 1, 1, 1, 1, 0], [1] * 6, [1, 1, 0, 0, 0, 0]]
  assert one.context.segment.tolist() == [[1, 1, 1, 2, 2, 0], [1] * 6, [1, 1, 0, 0, 0, 0]]
  assert one.context.pos.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5], [0, 1, 0, 0, 0, 0]]


@given(
  seed=st.integers(0, 2**63),
  size=st.integers(1, 7),
  count=st.integers(1, 30),
  epochs=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_every_row_once_an_epoch(seed, size, count, epochs):
  """Whatever the batch size, and where epochs end within a batch."""
  data = lay_out(Text(np.arange(count * 2 + 1, dtype=np.uint8), 256), Causal(), length=2, size=size)
  steps = -(-epochs * count // size)
  firsts = [first for step in range(steps) for first in batch(data, seed, step).tokens[:, 0].tolist()]
  for epoch in range(epochs):
    seen = firsts[epoch * count : (epoch + 1) * count]
    assert sorted(seen) == [2 * i for i in range(count)]
  if count >= 20:  # in another order
    assert firsts[:count] != firsts[count : 2 * count]


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("ended", [True, False])
def test_a_batch_is_a_function_of_seed_and_step(name, ended):
  """Computed alone, after others, or by several processes; and its shapes are those of every other."""
  lengths = np.random.default_rng(1).integers(1, 90, 200).tolist()
  text = text_of(lengths) if ended else Text(np.arange(9000) % 250, 250)
  data = lay_out(text, OBJECTIVES[name], length=64, size=6)
  one = batch(data, 5, 1000)
  np.random.default_rng(0).random(3)
  for step in (0, 1, 999):
    other = batch(data, 5, step)
    assert not np.array_equal(other.tokens, one.tokens)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), other) == jax.tree.map(
      lambda x: (x.shape, x.dtype), one
    )
  assert equal(batch(data, 5, 1000), one)
  parts = [batch(data, 5, 1000, part) for part in (slice(0, 2), slice(2, 6))]
  assert equal(jax.tree.map(lambda *x: np.concatenate(x), *parts), one)
  assert not np.array_equal(batch(data, 6, 1000).tokens, one.tokens)
  if name == "causal":  # which draws nothing: smaller batches are the same rows in more steps
    assert equal(batch(dataclasses.replace(data, size=3), 5, 2000), batch(data, 5, 1000, slice(0, 3)))
  assert (one.context.segment is not None) == ended and one.tokens.shape == (6, 64)
  assert (one.context.prefix is not None) == (name != "causal")


def test_draws_are_others_in_every_epoch():
  data = lay_out(Text(np.arange(300) % 250, 250), GLM, length=64, size=1)
  a, b = (take(data, [0], seed=3, step=step) for step in (0, 1))
  assert not np.array_equal(a.tokens, b.tokens) and equal(take(data, [0], 3, 1), b)


def test_held_out_documents_are_no_training_ones():
  text = text_of([5] * 200)
  ranges = documents(text)
  train, out = held_out(ranges, 0.1, seed=3)
  assert len(train) == 180 and len(out) == 20
  assert sorted(map(tuple, [*train.tolist(), *out.tolist()])) == sorted(map(tuple, ranges.tolist()))
  assert np.array_equal(held_out(ranges, 0.1, seed=3)[1], out)
  assert not np.array_equal(held_out(ranges, 0.1, seed=4)[1], out)
  rows = collections.Counter(lay_out(text, Causal(), 16, 2, train).rows.table[:, 0].tolist())
  assert set(rows) == set(train[:, 0].tolist())


@pytest.mark.parametrize("lengths", [[1000], [300, 400, 300], [990, 10]])
def test_the_end_is_held_out_of_few_documents(lengths):
  train, out = held_out(documents(text_of(lengths)), 0.05)
  both = [t for part in (train, out) for start, end in part for t in range(start, end)]
  assert both == list(range(1000)) and sum(end - start for start, end in out) == 50


def test_what_holds_nothing_is_refused():
  with pytest.raises(ConfigError, match=r"length: found 5, expected at least 8 for BlankInfilling"):
    longest_piece(GLM, 5)
  with pytest.raises(DataError, match=r"found 5 tokens in 1 documents, expected at least 9 in a row of 8"):
    lay_out(Text(np.arange(5), 256), Causal(), 8, 1)
  with pytest.raises(ConfigError, match=r"Data\.size: found 0"):
    lay_out(Text(np.arange(50), 256), Causal(), 8, 0)
  with pytest.raises(ConfigError, match="share"):
    held_out(np.array([[0, 9]]), 1.0)


def test_ids_of_the_objective_are_asked_of_the_model():
  text = Text(np.arange(100, dtype=np.uint8), 256)
  assert lay_out(text, GLM, 32, 1).vocab_size == 303 and lay_out(text, Causal(), 32, 1).vocab_size == 256
