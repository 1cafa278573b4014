"""What a few seeds say about a mean."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
  t = T_95[max(degrees for degrees in T_95 if degrees <= n - 1)]
  return t * deviation / math.sqrt(n)
