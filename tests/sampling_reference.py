"""The samplers' rules once more, in NumPy float64 over probabilities, and the chi-square test."""

import math

import numpy as np
from generation_table import about, measured


def distribution(logits_V, temperature=1.0, k=0, p=1.0):
  """(probabilities [V], margin): temperature, then top-k, then top-p.

  margin is the distance of p from the nearest cumulative probability: where it is below float32 rounding the
  support of a float32 filter is not determined.
  """
  z = np.asarray(logits_V, np.float64)
  if temperature == 0:
    probs = np.zeros_like(z)
    probs[np.argmax(z)] = 1.0
  else:
    z = z / temperature
    probs = np.exp(z - z.max())
  if k > 0:
    probs = np.where(probs >= np.sort(probs)[-min(k, probs.size)], probs, 0.0)
  probs /= probs.sum()
  order = np.argsort(-probs, kind="stable")
  upto = np.cumsum(probs[order])
  before = np.concatenate([[0.0], upto[:-1]])
  margin = np.abs(upto[:-1] - p).min() if 0 < p < 1 else np.inf
  if p < 1:
    dropped = order[1:][before[1:] >= p]
    probs[dropped] = 0.0
  return probs / probs.sum(), margin


def chi_square(tokens, probs):
  """(statistic, degrees of freedom) of the tokens' counts; cells expecting under 5 are pooled."""
  inside = probs > 0
  assert inside[tokens].all(), "a token outside the support was drawn"
  expected = probs[inside] * tokens.size
  counts = np.bincount(tokens, minlength=probs.size)[inside].astype(np.float64)
  order = np.argsort(expected)
  expected, counts = expected[order], counts[order]
  pooled = max(1, int(np.searchsorted(np.cumsum(expected), 5.0)) + 1, int(np.searchsorted(expected, 5.0)))
  expected = np.concatenate([[expected[:pooled].sum()], expected[pooled:]])
  counts = np.concatenate([[counts[:pooled].sum()], counts[pooled:]])
  return float(((counts - expected) ** 2 / expected).sum()), expected.size - 1


def chi_square_limit(freedom):
  """The value a chi-square variable exceeds with probability 1e-6, by Wilson and Hilferty (1931).

  (X / d)^(1/3) is nearly normal with mean 1 - 2 / (9 d) and variance 2 / (9 d), hence
  limit = d (1 - 2 / (9 d) + 4.7534 sqrt(2 / (9 d)))^3, 4.7534 the normal quantile of 1 - 1e-6.
  """
  if freedom == 0:
    return 0.0
  spread = 2 / (9 * freedom)
  return freedom * (1 - spread + 4.7534 * np.sqrt(spread)) ** 3


def chi_square_p(statistic, freedom):
  """The probability that a chi-square variable exceeds the statistic, by the same approximation."""
  if freedom == 0:
    return 1.0
  spread = 2 / (9 * freedom)
  return math.erfc(((statistic / freedom) ** (1 / 3) - 1 + spread) / math.sqrt(2 * spread)) / 2


def check_drawn(tokens, probs, grid):
  """Tokens are drawn from the probabilities at 1e-6, none outside the support, and all that are expected 20 times were seen."""
  row = f"{grid}, {tokens.size:,} a cell"
  about("chi-square", row)
  statistic, freedom = chi_square(tokens, probs)
  assert statistic <= chi_square_limit(freedom)
  # p < 1e-8 each, if one could not be drawn
  assert set(np.flatnonzero(probs * tokens.size > 20)) <= set(tokens)
  p, outside = chi_square_p(statistic, freedom), np.count_nonzero(probs[tokens] == 0)
  measured("chi-square", row, N=tokens.size, cells=1, worst_p=p, outside_the_support=outside)
