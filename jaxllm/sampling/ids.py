"""Token ids a caller lists, as tables of one value a token: their number may change without compiling again."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from jaxllm.errors import SamplingError


def checked_ids(what, ids, vocab_size):
  """`ids` as a list of ints; raises SamplingError, which names `what`, for one that is no id below vocab_size."""
  ids = list(ids) if isinstance(ids, Iterable) and not isinstance(ids, (str, bytes)) else [ids]
  for token in ids:
    whole = isinstance(token, (int, np.integer)) and not isinstance(token, bool)
    if not whole or not 0 <= token < vocab_size:
      raise SamplingError(f"{what}: found token {token!r}, expected an integer from 0 to {vocab_size - 1}")
  return [int(token) for token in ids]


def token_mask(ids, vocab_size):
  """bool [vocab_size], True at each of `ids` (an id or a list of them).

  Raises SamplingError for what is no id.
  """
  mask_V = np.zeros(vocab_size, bool)
  mask_V[checked_ids("token_mask", ids, vocab_size)] = True
  return mask_V
