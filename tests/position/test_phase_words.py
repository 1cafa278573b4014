"""The words of inv_freq / (2 pi) against Python's own big integers, bit for bit, and in little time."""

import time

import numpy as np
import pytest

from jaxllm.position import POSITIONS
from jaxllm.position.phase import _CONSTANT_BITS, _FRACTION_BITS, _INVERSE_TWO_PI, words


def reference(inv_freq):
  """floor(inv_freq / (2 pi) * 2**64) modulo 2**64, a number at a time."""
  found = []
  for f in np.asarray(inv_freq, np.float64).ravel():
    numerator, denominator = float(f).as_integer_ratio()
    found.append((numerator * _INVERSE_TWO_PI >> _CONSTANT_BITS - _FRACTION_BITS) // denominator % 2**64)
  return [
    np.array(part, np.uint32).reshape(inv_freq.shape)
    for part in np.transpose([divmod(n, 2**32) for n in found])
  ]


def check(inv_freq):
  hi, lo = words(inv_freq)
  assert hi.dtype == lo.dtype == np.uint32 and hi.shape == lo.shape == inv_freq.shape
  for found, expected in zip((hi, lo), reference(inv_freq), strict=True):
    np.testing.assert_array_equal(found, expected)


@pytest.mark.core
def test_every_exponent_with_random_mantissas():
  exponents = np.arange(-140, 60)
  mantissas = np.random.default_rng(0).uniform(0.5, 1.0, (50, 1))
  check(np.ldexp(mantissas, exponents))


def test_mantissas_of_ones_and_of_a_single_bit():
  exponents = np.arange(-80, 40)
  check(np.ldexp(np.array([[0.5], [1 - 2.0**-53], [0.5 + 2.0**-53], [0.75]]), exponents))


def test_nothing_and_next_to_nothing():
  check(np.array([0.0, 5e-324, 1e-300, 1e-40, 2.0**-64, 2 * np.pi, np.pi, 1.0]))


@pytest.mark.parametrize("base", [1.5, 10000.0, 1e6])
def test_frequencies_of_rope(base):
  check(POSITIONS["rope"](base=base).frequencies(128)[0])


def test_a_row_for_each_of_8192_lengths_takes_no_time():
  inv_freq = POSITIONS["rope"]().frequencies(128)[0] / np.linspace(1, 64, 8192)[:, None]
  start = time.process_time()
  hi, _ = words(inv_freq)
  assert time.process_time() - start < 1.5  # 0.1 s; a big integer at a time takes 3 s
  np.testing.assert_array_equal(hi[::512], reference(inv_freq[::512])[0])
