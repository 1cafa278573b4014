"""A text as a model reads it: token ids, how many bytes each stands for, and the windows that are cut from it."""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxllm.errors import DataError, TokenizerError
from jaxllm.evaluate.windows import cut_windows


@dataclasses.dataclass(frozen=True)
class Text:
  """ids [n], and sizes [n]: the bytes of text that each token stands for (0 for a token that is no text, such as <s>).

  bos: the token that every window begins with, in place of its own first; None: windows are as they are cut.
  """

  ids: np.ndarray
  sizes: np.ndarray
  bos: int | None = None

  def __len__(self) -> int:
    return len(self.ids)

  def windows(self, length: int, longest: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [count, length + 1] int32, bytes of the labels [count, length]) of `cut_windows`."""
    tokens, sizes = (cut_windows(x, length, longest, count) for x in (self.ids, self.sizes))
    return self.begun(tokens), sizes[:, 1:]

  def begun(self, tokens: np.ndarray) -> np.ndarray:
    """Windows with the token that each begins with."""
    if self.bos is not None:
      tokens = tokens.copy()
      tokens[:, 0] = self.bos
    return tokens


def of_bytes(data: np.ndarray) -> Text:
  """The text of a model whose tokens are bytes, uint8 [n]."""
  return Text(data, np.ones(len(data), np.uint8))


def of_tokens(text: str, ids: np.ndarray, ends: np.ndarray, bos: int | None = None) -> Text:
  """The text of token ids [n], `ends` [n] being the end of each in `text`, in characters.

  A token stands for the bytes from the end of the one before it to its own; tokens that end at one place, as the parts of a
  character do, share theirs evenly; a special token, which ends at 0, has none.  So the sizes add up to the bytes of `text` up
  to the last token's end.
  """
  code = np.frombuffer(text.encode("utf-32-le"), np.uint32)
  width = 1 + (code >= 0x80).astype(np.int64) + (code >= 0x800) + (code >= 0x10000)  # UTF-8
  byte_of = np.concatenate([[0], np.cumsum(width)])
  (places,) = np.nonzero(ends)
  reached = byte_of[np.maximum.accumulate(ends[places])]
  # tokens in a row with one end are a run: token j of its k has bytes j b / k to (j + 1) b / k of its b
  starts = np.flatnonzero(np.diff(reached, prepend=0))
  counts = np.diff(starts, append=len(places))
  b, k = np.repeat(np.diff(reached[starts], prepend=0), counts), np.repeat(counts, counts)
  j = np.arange(len(places)) - np.repeat(starts, counts)
  sizes = np.zeros(len(ids), np.int64)
  sizes[places] = (j + 1) * b // k - j * b // k
  return Text(ids, sizes, bos)


def check_ids(ids: np.ndarray, vocab_size: int, source: str) -> None:
  """Raise DataError for no ids, TokenizerError for one outside the vocabulary: here, as JAX reads the last row instead."""
  if len(ids) == 0:
    raise DataError(f"{source}: found no tokens, expected a text of at least 2")
  wrong = np.flatnonzero((ids < 0) | (ids >= vocab_size))
  if len(wrong):
    raise TokenizerError(
      f"{source}: {len(wrong)} of {len(ids)} tokens are outside the vocabulary, the first is token {wrong[0]}: found id "
      f"{ids[wrong[0]]}, expected 0 to {vocab_size - 1}; the tokenizer is of another model"
    )
