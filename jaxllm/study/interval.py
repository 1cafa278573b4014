"""What a few seeds say about a mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  import numpy as np

# t such that |T| < t with probability 0.95, by degrees of freedom; 0.975 quantiles of Student's distribution.
T_95 = {
  1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306,
  9: 2.262, 10: 2.228, 11: 2.201, 12: 2.179, 13: 2.160, 14: 2.145, 15: 2.131, 16: 2.120,
  17: 2.110, 18: 2.101, 19: 2.093, 20: 2.086, 21: 2.080, 22: 2.074, 23: 2.069, 24: 2.064,
  25: 2.060, 26: 2.056, 27: 2.052, 28: 2.048, 29: 2.045, 30: 2.042, 40: 2.021, 60: 2.000,
  120: 1.980,
}  # fmt: skip


def mean(values: Sequence[float]) -> float:
  """The arithmetic mean, with the sum taken exactly, so that it does not depend on the order."""
  return math.fsum(values) / len(values)


def half_width(values: Sequence[float]) -> float:
  """Half the width of the 95 % interval of the mean: t(n - 1) * s / sqrt(n), s the sample deviation; n >= 2.

  Between the tabulated degrees of freedom the next smaller one is used, which errs to the wide side.
  Source of the quantiles: NIST/SEMATECH e-Handbook of Statistical Methods, section 1.3.6.7.2.
  """
  n = len(values)
  center = mean(values)
  deviation = math.sqrt(math.fsum((value - center) ** 2 for value in values) / (n - 1))
  return _t(n - 1) * deviation / math.sqrt(n)


def ratio(amounts: Sequence[float], sizes: Sequence[float]) -> tuple[float, float]:
  """(r, half the width of its 95 % interval) of r = sum y_i / sum x_i over n units: losses a byte of n stretches of text.

  half = t(n - 1) sqrt(n / (n - 1) sum (y_i - r x_i)^2) / sum x_i, which is `half_width` of the y_i / x where all x_i are equal;
  infinite for one unit.  Source: Cochran, Sampling Techniques (1977), section 2.11, without the finite population factor.
  """
  n, total = len(sizes), math.fsum(sizes)
  r = math.fsum(amounts) / total
  if n < 2:
    return r, math.inf
  squares = math.fsum((y - r * x) ** 2 for y, x in zip(amounts, sizes, strict=True))
  return r, _t(n - 1) * math.sqrt(n / (n - 1) * squares) / total


def bootstrap(
  statistic: Callable[[np.ndarray], np.ndarray], amounts: np.ndarray, draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
  """(low, high) of the 95 % percentile interval of statistic(sum of amounts_i) over n units i.

  amounts: [n, columns], a row a unit.  Units are drawn with replacement, n at a time, `draws` times: statistic takes
  [draws, columns] to [draws].  What is in one row, such as the losses of two models on the same text, is drawn together, so
  that a difference has the interval of pairs.  The interval of one unit is a point.
  Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 13.3.
  """
  import numpy as np

  amounts = np.asarray(amounts, np.float64)
  n = len(amounts)
  counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)
  low, high = np.quantile(statistic(counts @ amounts), (0.025, 0.975))
  return float(low), float(high)


def _t(degrees: int) -> float:
  return T_95[max(known for known in T_95 if known <= degrees)]
