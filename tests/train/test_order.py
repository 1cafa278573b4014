"""The order of a run: permutations, and streams of draws, that are functions of seed and place."""

import numpy as np
import pytest

from jaxllm.train.order import permuted, stream

SIZES = [*range(1, 130), 255, 256, 257, 1000, 1023, 1024, 1025, 4097, 65_536, 100_003]


@pytest.mark.core
def test_every_size_is_permuted():
  for count in SIZES:
    for epoch in (0, 1):
      found = permuted(np.arange(count), count, 7, epoch)
      assert found.dtype == np.int64 and (np.sort(found) == np.arange(count)).all(), (count, epoch)


def test_any_part_is_that_of_the_whole_and_epochs_may_be_mixed():
  whole = [permuted(np.arange(1000), 1000, 3, epoch) for epoch in range(3)]
  index, epoch = np.array([999, 0, 500, 3]), np.array([0, 2, 1, 0])
  assert (permuted(index, 1000, 3, epoch) == [whole[e][i] for e, i in zip(epoch, index, strict=True)]).all()
  assert all((a != b).mean() > 0.98 for a, b in ((whole[0], whole[1]), (whole[1], whole[2])))
  assert (permuted(np.arange(1000), 1000, 4, 0) != whole[0]).mean() > 0.98


def test_a_huge_set_takes_no_memory_and_stays_inside():
  count = 3 * 2**58 + 1
  found = permuted(np.arange(1000), count, 0)
  assert len(set(found.tolist())) == 1000 and found.min() >= 0 and found.max() < count


def test_orders_look_like_chance():
  """Places of neighbours and of single elements, over many seeds, against a uniform distribution: chi squared of 9 degrees."""
  count, seeds = 1000, 2000
  for index in (0, 1, 999):
    tenths = np.array([permuted(np.array([index]), count, seed)[0] for seed in range(seeds)]) // 100
    assert np.sum((np.bincount(tenths, minlength=10) - seeds / 10) ** 2) / (seeds / 10) < 27.9  # p = 0.001
  order = permuted(np.arange(100_000), 100_000, 5)
  steps = np.diff(order) % 100_000 // 10_000
  assert np.sum((np.bincount(steps, minlength=10) - 1e4) ** 2) / 1e4 < 27.9
  assert abs(np.corrcoef(order, np.arange(100_000))[0, 1]) < 0.015  # five standard deviations
  cycle = np.corrcoef(order[:-1], order[1:])[0, 1]
  assert abs(cycle) < 0.015


def test_streams_of_other_places_are_others():
  draws = {
    tuple(stream(seed, step, row, piece).integers(0, 2**62, 4))
    for seed in range(3)
    for step in range(5)
    for row in range(5)
    for piece in range(3)
  }
  flat = {x for four in draws for x in four}
  assert len(draws) == 225 and len(flat) == 900
  assert (stream(1, 2, 3, 4).random(9) == stream(1, 2, 3, 4).random(9)).all()
