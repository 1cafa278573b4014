"""A byte trigram model with Witten-Bell interpolation: what a model of two bytes of context reaches on the same text."""

from __future__ import annotations

import numpy as np

V = 256


class Trigram:
  """P(c | a b) = (count(abc) + d(ab) P(c | b)) / (count(ab) + d(ab)), d the number of distinct bytes seen after a context.

  The same for P(c | b) over P(c), and for P(c) over 1/256; a context never seen falls through to the shorter one.
  Source: Witten and Bell (1991), method C; Chen and Goodman (1998), section 2.5.
  """

  def __init__(self, text: np.ndarray):
    codes = text.astype(np.int64)
    self._counts = [
      np.bincount(codes, minlength=V).reshape(1, V),
      np.bincount(codes[:-1] * V + codes[1:], minlength=V**2).reshape(V, V),
      np.bincount((codes[:-2] * V + codes[1:-1]) * V + codes[2:], minlength=V**3).reshape(V**2, V),
    ]
    self._totals = [counts.sum(axis=1) for counts in self._counts]
    self._distinct = [(counts > 0).sum(axis=1) for counts in self._counts]

  def nats(self, windows: np.ndarray) -> np.ndarray:
    """-ln P of every byte but the first of each window [W, T + 1], given what of the two bytes before it is in the window."""
    w = windows.astype(np.int64)
    label, before, earlier = w[:, 1:], w[:, :-1], np.pad(w[:, :-2], ((0, 0), (1, 0)))
    p = np.full(label.shape, 1.0 / V)
    for order, context in enumerate((np.zeros_like(label), before, earlier * V + before)):
      counts, total, distinct = (
        self._counts[order],
        self._totals[order][context],
        self._distinct[order][context],
      )
      mixed = (counts[context, label] + distinct * p) / np.maximum(total + distinct, 1)
      known = total + distinct > 0
      if order == 2:
        known[:, 0] = False  # the first label has one byte before it
      p = np.where(known, mixed, p)
    return -np.log(p)
