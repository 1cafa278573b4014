"""Objectives against what their papers print, and against versions written from the definitions alone."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.errors import ConfigError
from jaxllm.ops.attention import Side, allowed
from jaxllm.position import glm_positions
from jaxllm.train.objectives import OBJECTIVES, BlankInfilling, Causal, PrefixLm
from jaxllm.train.order import stream

M, S, E, SM, GM = 90, 91, 92, 93, 94  # [MASK], [START], [END], [sMASK], [gMASK]
GLM = BlankInfilling(mask=M, sop=S, eop=E)
ALL = BlankInfilling(
  mask=M,
  sop=S,
  eop=E,
  sentence_mask=SM,
  generation_mask=GM,
  sentence_ends=(7,),
  sentence_share=0.3,
  generation_share=0.3,
)


def mask_of(example):
  """Which slots each slot sees, as the model has it."""
  t = np.arange(len(example.tokens))[None]
  side = Side(t, t, prefix=np.full_like(t, example.prefix))
  return np.asarray(allowed(side, side, None))[0]


@pytest.mark.core
def test_figure_2_of_the_paper():
  """Du et al. (2022), figure 2: x1 ... x6 with the spans [x3] and [x5, x6], of which the second is written first."""
  one = GLM.filled(np.arange(1, 7), [(4, 6), (2, 3)], M)
  assert one.tokens.tolist() == [1, 2, M, 4, M, S, 5, 6, S, 3]
  assert one.labels[5:].tolist() == [5, 6, E, 3, E]
  assert one.weights.tolist() == [0] * 5 + [1] * 5
  assert one.pos.T.tolist() == [
    [0, 1, 2, 3, 4, 4, 4, 4, 2, 2],  # the figure counts from 1: 1 2 3 4 5 5 5 5 3 3
    [0, 0, 0, 0, 0, 1, 2, 3, 1, 2],
  ]
  figure = """
    11111.....
    11111.....
    11111.....
    11111.....
    11111.....
    111111....
    1111111...
    11111111..
    111111111.
    1111111111"""
  assert (mask_of(one) == [[c == "1" for c in row] for row in figure.split()]).all()


def naive(ids, spans, order, mask, two_dimensional, ended):
  """Blank infilling a token at a time: every token knows its span, and slots are made one after another."""
  owner = {t: s for s, (a, b) in enumerate(spans) for t in range(a, b)}
  slots, at = [], {}
  for t, token in enumerate(ids):
    if t not in owner:
      slots.append((token, None, len(slots), 0))
    elif owner[t] not in at:
      at[owner[t]] = len(slots)
      slots.append((mask, None, len(slots), 0))
  a = len(slots)
  for s in order:
    read = S
    for count, t in enumerate([*range(*spans[s]), None], 1):
      if t is None and not ended:
        break
      said = E if t is None else ids[t]
      place = len(slots) if not two_dimensional and not ended else at[s]
      slots.append((read, said, place, count))
      read = said
  sees = np.array([[k < a or (q >= a and k <= q) for k in range(len(slots))] for q in range(len(slots))])
  return slots, a, sees


@given(
  n=st.integers(2, 200), seed=st.integers(0, 2**40), two=st.booleans(), name=st.sampled_from(["mask", "all"])
)
@settings(max_examples=200, deadline=None)
def test_infilling_is_the_naive_one(n, seed, two, name):
  objective = {"mask": GLM, "all": ALL}[name]
  objective = BlankInfilling(**{**vars(objective), "two_dimensional": two})
  ids = np.random.default_rng(seed).integers(1, 90, n).astype(np.int32)
  one = objective.example(ids, stream(seed))
  assert (
    len(one.tokens) <= objective.slots(n)
    and one.tokens.dtype == one.labels.dtype == one.pos.dtype == np.int32
  )
  mask = next(i for i in (M, SM, GM) if i in one.tokens)
  ended = mask != GM
  # part B says which spans there were and in which order; A must then be the rest
  said = one.labels[one.prefix :].tolist()
  parts = [[]]
  for token in said:
    parts[-1].append(token)
    if token == E:
      parts.append([])
  written = [part[:-1] for part in parts if part] if ended else [said]
  places = np.flatnonzero(one.tokens[: one.prefix] == mask)
  starts = np.flatnonzero(one.tokens[one.prefix :] == S)
  assert len(written) == len(places) == len(starts)
  where = one.pos.reshape(len(one.tokens), -1)[one.prefix :, 0][starts] if two or ended else places
  assert sorted(where) == places.tolist()
  by_place = dict(zip(where.tolist(), written, strict=True))
  restored, spans = [], []
  for t, token in enumerate(one.tokens[: one.prefix].tolist()):
    if token == mask:
      spans.append((len(restored), len(restored) + len(by_place[t])))
    restored += by_place[t] if token == mask else [token]
  assert restored == ids.tolist()
  order = [places.tolist().index(place) for place in where]
  slots, a, sees = naive(ids.tolist(), spans, order, mask, two, ended)
  tokens, labels, pos, block = zip(*slots, strict=True)
  assert one.prefix == a and one.tokens.tolist() == list(tokens)
  assert [x if w else None for x, w in zip(one.labels.tolist(), one.weights, strict=True)] == list(labels)
  assert one.pos.tolist() == ([list(p) for p in zip(pos, block, strict=True)] if two else list(pos))
  assert (mask_of(one) == sees).all()


@pytest.mark.parametrize("two", [True, False])
@pytest.mark.parametrize("kind", ["mask", "generation"])
def test_positions_are_those_of_a_prompt(two, kind):
  """A text with one span at its end is what a prompt of the family is: `glm_positions` is of its published code."""
  objective = BlankInfilling(**{**vars(ALL), "two_dimensional": two})
  ids = np.arange(10, 30)
  one = objective.filled(ids, [(12, 20)], M if kind == "mask" else GM, ended=kind == "mask")
  expected = glm_positions(one.tokens, bos=S, mask=M, gmask=GM, two_dimensional=two)
  assert one.pos.tolist() == expected.tolist()


def test_spans_have_the_lengths_places_and_number_of_the_definition():
  """Lengths against Poisson(3) without 0, places against uniform; 15 % of the tokens, and at most one span more."""
  n, lengths, starts = 512, [], np.zeros(512)
  for seed in range(1500):
    spans = GLM.spans(n, stream(seed))
    sizes = [b - a for a, b in spans]
    assert sum(sizes) >= int(0.15 * n) > sum(sizes) - max(sizes)
    assert all(b < a for (_, b), (a, _) in itertools.pairwise(spans))
    lengths += sizes[
      :-1
    ]  # the last of them in drawing order is the one at which it stops, which is a longer one
    for a, b in spans:
      starts[a:b] += 1
  top = 9
  pmf = np.array([math.exp(-3) * 3**k / math.factorial(k) for k in range(1, 40)]) / (1 - math.exp(-3))
  expected = np.array([*pmf[: top - 1], pmf[top - 1 :].sum()])
  observed = np.bincount(np.minimum(lengths, top), minlength=top + 1)[1:]
  assert np.abs(observed / observed.sum() - expected).max() < 0.012
  share = starts.reshape(16, 32).mean(1) / 1500
  assert np.abs(share[1:-1] - share.mean()).max() < 0.012 and 0.15 <= share.mean() < 0.162


def test_the_order_of_spans_is_shuffled():
  ids = np.arange(60, dtype=np.int32)
  firsts = []
  for seed in range(400):
    one = GLM.example(ids, stream(seed))
    places = np.flatnonzero(one.tokens[: one.prefix] == M)
    if len(places) >= 2:
      firsts.append(one.pos[one.prefix, 0] == places[0])
  assert len(firsts) > 300 and np.mean(firsts) < 0.6  # left to right it would be 1


def test_sentences_are_whole_and_generation_is_the_end():
  ids = np.array([1, 2, 7, 3, 7, 4, 5, 6, 7, 8, 9] * 4, np.int32)
  kinds = []
  for seed in range(300):
    one = ALL.example(ids, stream(seed))
    said = one.labels[one.prefix :].tolist()
    kinds.append(next(i for i in (M, SM, GM) if i in one.tokens))
    if kinds[-1] == SM:
      starts = [0, *[t + 1 for t in range(len(ids)) if ids[t] == 7]]
      whole = {tuple(ids[a:b].tolist()) for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)}
      parts = " ".join(map(str, said)).split(f" {E}")[:-1]
      assert {tuple(map(int, part.split())) for part in parts} <= whole
    if kinds[-1] == GM:
      assert len(said) >= 22 and said == ids[-len(said) :].tolist() and E not in one.labels
  counts = [kinds.count(i) / 300 for i in (M, SM, GM)]
  assert np.abs(np.array(counts) - (0.4, 0.3, 0.3)).max() < 0.09


def test_a_prefix_is_read_and_the_rest_is_said():
  ids, seen = np.arange(10, 20, dtype=np.int32), set()
  for seed in range(200):
    one = PrefixLm().example(ids, stream(seed))
    assert one.tokens.tolist() == ids[:-1].tolist() and one.labels.tolist() == ids[1:].tolist()
    assert one.labels[one.weights == 1].tolist() == ids[one.prefix :].tolist()
    sees = [[k < one.prefix or k <= q for k in range(9)] for q in range(9)]
    assert (mask_of(one) == sees).all()
    # what is said is never seen by the slot that says it
    for q in np.flatnonzero(one.weights):
      assert not mask_of(one)[q, q + 1 :].any()
    seen.add(one.prefix)
  assert seen == set(range(1, 10))


def test_causal_is_the_next_token():
  one = Causal().example(np.arange(5, dtype=np.int32), stream(0))
  assert one.tokens.tolist() == [0, 1, 2, 3] and one.labels.tolist() == [1, 2, 3, 4] and one.prefix == 0
  assert (mask_of(one) == np.tril(np.ones((4, 4), bool))).all() and set(OBJECTIVES) == {
    "causal",
    "prefix_lm",
    "glm",
  }


@pytest.mark.parametrize(
  ("changes", "reason"),
  [
    (dict(mask=None), "mask: found None, expected the id"),
    (dict(eop=-1), "eop: found -1"),
    (dict(generation_share=0.7), "generation_share: found 0.7 without generation_mask"),
    (dict(sentence_mask=1, sentence_share=0.1), "sentence_ends: found none"),
    (dict(generation_mask=1, generation_share=1.5), "from 0 to 1"),
    (
      dict(generation_mask=1, generation_share=0.7, sentence_mask=1, sentence_share=0.7, sentence_ends=(1,)),
      "more than 1",
    ),
    (dict(ratio=0.9), "ratio: found 0.9"),
    (dict(mean_length=0), "mean_length"),
    (dict(longest=0), "longest"),
    (dict(generation=(0.9, 0.5)), "the lower first"),
  ],
)
def test_impossible_infilling_is_refused(changes, reason):
  with pytest.raises(ConfigError, match=reason):
    BlankInfilling(**{**dict(mask=M, sop=S, eop=E), **changes})
