"""GLM's blank infilling: spans are cut out of a text and written after it, in any order, one token at a time."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from jaxllm.errors import ConfigError
from jaxllm.train.objectives.example import Example

Span = tuple[int, int]
"""First token of a span, and the one after its last."""


@dataclasses.dataclass(frozen=True)
class BlankInfilling:
  """-log p(s_ij | x_corrupt, the spans written before, s_i<j), for spans s_i that are cut out of a piece and shuffled.

  Part A is the text with a mask in the place of each span and is seen from both sides; part B is [sop] s_i for each span, with
  the labels s_i [eop], and sees A and what is before it.  Positions are those in part A, of a span that of its mask;
  block positions are 0 in A and 1, 2, ... in each span.  Three kinds of spans, of which each piece has one:

    mask: lengths of a Poisson distribution of mean_length without 0 and what is above `longest`, until `ratio` of the tokens
      are out, anywhere but touching.  A last length is cut where more than half of a piece would be out.
    sentence_mask (sentence_share of the pieces): whole sentences, each up to one of sentence_ends, until `ratio` is out.
    generation_mask (generation_share): the end of the piece, a share of it uniform in `generation`; no [eop], as the text
      goes on, or ends by its separator.

  The first two stop at 2 + 1.5 ratio n / mean_length spans, so that the slots of a piece are known before.
  two_dimensional=False is for GLM-130B, whose positions after generation_mask count on and after mask stay.
  mask, sentence_mask, generation_mask, sop, eop: ids, [MASK], [sMASK], [gMASK], and the first and last token of a span.

  Published values: Du et al. generation (0.5, 1); GLM-130B generation_share 0.7, generation (0.2, 1).
  Source: Du et al. (2022), GLM, sections 2.1 and 2.2 and figure 2; Zeng et al. (2022), GLM-130B, section 2.1; lengths of 1 to
  39, spans that do not touch and no [eop] after generation_mask are those of the authors' published code.
  """

  mask: int
  sop: int
  eop: int
  sentence_mask: int | None = None
  generation_mask: int | None = None
  sentence_share: float = 0.0
  generation_share: float = 0.0
  sentence_ends: tuple[int, ...] = ()
  ratio: float = 0.15
  mean_length: float = 3.0
  longest: int = 39
  generation: tuple[float, float] = (0.5, 1.0)
  two_dimensional: bool = True

  overlap: ClassVar[int] = 0
  prefixed: ClassVar[bool] = True
  plain: ClassVar[bool] = False

  def __post_init__(self):
    for name in ("mask", "sop", "eop", "sentence_mask", "generation_mask"):
      value, needed = getattr(self, name), name in ("mask", "sop", "eop")
      if (value is None and needed) or (value is not None and (type(value) is not int or value < 0)):
        raise ConfigError(f"BlankInfilling.{name}: found {value!r}, expected the id of a token")
    for kind in ("sentence", "generation"):
      share = getattr(self, f"{kind}_share")
      if not 0 <= share <= 1:
        raise ConfigError(f"BlankInfilling.{kind}_share: found {share!r}, expected from 0 to 1")
      if share and getattr(self, f"{kind}_mask") is None:
        raise ConfigError(f"BlankInfilling.{kind}_share: found {share!r} without {kind}_mask; give its id")
    if self.sentence_share + self.generation_share > 1:
      raise ConfigError("BlankInfilling: sentence_share and generation_share add to more than 1; lower one")
    if self.sentence_share and not self.sentence_ends:
      raise ConfigError("BlankInfilling.sentence_ends: found none, expected ids that end a sentence")
    if not 0 < self.ratio <= 0.5:
      raise ConfigError(f"BlankInfilling.ratio: found {self.ratio!r}, expected above 0 and at most 0.5")
    if not 0 < self.mean_length < math.inf:
      raise ConfigError(f"BlankInfilling.mean_length: found {self.mean_length!r}, expected a number above 0")
    if type(self.longest) is not int or not 1 <= self.longest <= 1000:
      raise ConfigError(f"BlankInfilling.longest: found {self.longest!r}, expected an integer from 1 to 1000")
    low, high = self.generation
    if not 0 <= low <= high <= 1:
      raise ConfigError(
        f"BlankInfilling.generation: found {self.generation!r}, expected two shares, the lower first"
      )

  @property
  def axes(self) -> int:
    return 1 + self.two_dimensional

  @property
  def vocab_size(self) -> int:
    ids = (self.mask, self.sop, self.eop, self.sentence_mask, self.generation_mask)
    return 1 + max(i for i in ids if i is not None)

  def slots(self, size: int) -> int:
    return size + 2 * self._most(size)

  def _most(self, size: int) -> int:
    return 2 + math.ceil(1.5 * self.ratio * size / self.mean_length)

  def example(self, ids: np.ndarray, rng: np.random.Generator) -> Example:
    kind = rng.random()
    if kind < self.generation_share:
      low, high = (math.ceil(share * len(ids)) for share in self.generation)
      cut = len(ids) - max(1, int(rng.integers(low, high, endpoint=True)))
      return self.filled(ids, [(cut, len(ids))], self.generation_mask, ended=False)
    if kind < self.generation_share + self.sentence_share:
      return self.filled(ids, self.sentences(ids, rng), self.sentence_mask)
    spans = self.spans(len(ids), rng)
    return self.filled(ids, [spans[i] for i in rng.permutation(len(spans))], self.mask)

  def spans(self, size: int, rng: np.random.Generator) -> list[Span]:
    """Spans of a piece of so many tokens for `mask`, from left to right."""
    k = np.arange(1, self.longest + 1)
    log = k * math.log(self.mean_length) - np.cumsum(
      np.log(k)
    )  # of the Poisson distribution, up to a constant
    total_K = np.cumsum(np.exp(log - log.max()))
    wanted, most = max(1, int(self.ratio * size)), max(1, size // 2)
    lengths: list[int] = []
    while sum(lengths) < wanted and len(lengths) < self._most(size):
      length = 1 + int(np.searchsorted(total_K, rng.random() * total_K[-1], side="right"))
      lengths.append(min(length, most - sum(lengths)))
    # spans go into different gaps between the tokens that stay, so that they do not touch
    gaps = np.sort(rng.choice(size - sum(lengths) + 1, len(lengths), replace=False))
    starts = gaps + np.cumsum([0, *lengths[:-1]])
    return [(int(start), int(start) + length) for start, length in zip(starts, lengths, strict=True)]

  def sentences(self, ids: np.ndarray, rng: np.random.Generator) -> list[Span]:
    """Sentences of a piece for `sentence_mask`, shuffled."""
    ends = [int(i) + 1 for i in np.flatnonzero(np.isin(ids, self.sentence_ends))]
    edges = sorted({0, *ends, len(ids)})
    found = list(itertools.pairwise(edges))
    wanted, taken, out = max(1, int(self.ratio * len(ids))), 0, []
    for i in rng.permutation(len(found)):
      if taken >= wanted or len(out) == self._most(len(ids)):
        break
      out.append(found[i])
      taken += found[i][1] - found[i][0]
    return out

  def filled(self, ids: np.ndarray, spans: Sequence[Span], mask: int, ended: bool = True) -> Example:
    """The example of a piece whose part B writes these spans in this order, each with [eop] at its end or not."""
    a, place = [], {}
    last = 0
    for start, end in sorted(spans):
      a += [*ids[last:start], mask]
      place[start] = len(a) - 1
      last = end
    a += [*ids[last:]]
    tokens, labels = list(a), [0] * len(a)
    pos, block = list(range(len(a))), [0] * len(a)
    for start, end in spans:
      span = [*ids[start:end]]
      written = span if ended else span[:-1]
      tokens += [self.sop, *written]
      labels += [*span, self.eop] if ended else span
      stays = self.two_dimensional or ended
      pos += [place[start]] * (1 + len(written)) if stays else list(range(len(a), len(tokens)))
      block += range(1, len(written) + 2)
    weights = np.zeros(len(tokens), np.float32)
    weights[len(a) :] = 1
    where = np.array(pos, np.int32)
    if self.two_dimensional:
      where = np.stack([where, np.array(block, np.int32)], -1)
    return Example(np.array(tokens, np.int32), np.array(labels, np.int32), weights, where, len(a))
