"""The tables of `pytest --generation`: what passed tests measured of generated text, numbered, a row a case.

`pytest tests/generate tests/nn tests/sampling tests/hf/test_greedy_parity.py tests/parallel --generation -m ""` runs the slow
counts too.  The fifth table, speed, is a benchmark: `python -m experiments.decoding`.
"""

from cache_cases import CACHES
from tables import COUNT, ERROR, LEAST, MOST, TEXT, Kind, Numbered

KINDS = {
  "cache": Kind(
    1,
    "Cache exactness: logits of prefill and decoding against the full forward pass, by the largest",
    "position method or block",
    {name: ERROR for name in (*CACHES, "text", "loaded")},
    order=lambda row: (row != "bound", row),
  ),
  "samplers": Kind(
    2,
    "Filters against transformers' processors, element by element, relative",
    "sampler",
    {"worst difference": ERROR, "logits": COUNT, "cases": COUNT},
  ),
  "chi-square": Kind(
    3,
    "Draws against float64 probabilities, chi-square",
    "grid",
    {"N": MOST, "cells": COUNT, "worst p": (min, ".1e"), "outside the support": COUNT},
  ),
  "greedy": Kind(
    4,
    "Greedy text against transformers' generate, float32",
    "family",
    {"tokens compared": COUNT, "distinct a row": LEAST, "near ties": COUNT, "widest near tie": ERROR},
  ),
  "compilations": Kind(
    6, "Compilations of a second call", "what differs", {"compiled": MOST, "expected": MOST}
  ),
  "bad input": Kind(7, "Bad input", "case", {"compiled": MOST, "error": TEXT, "says": TEXT}),
  "same text": Kind(8, "What changes no token", "what differs", {"texts": COUNT, "tokens": COUNT}),
}
"""`text` of the first: log-probabilities while generating, past the trained length; `loaded`: those of a checkpoint."""


class Table(Numbered):
  """The plugin."""

  title, kinds = "generation", KINDS


about, measured, refused = Table.about, Table.measured, Table.refused


def same_text(row, found, expected):
  """Texts, each a list of ids, are the same; how many of how many tokens is recorded for the row."""
  about("same text", row)
  assert found == expected, row
  measured("same text", row, texts=len(found), tokens=sum(map(len, found)))
