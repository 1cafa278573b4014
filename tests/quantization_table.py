"""The tables of `pytest tests/quant tests/train/test_lora.py --quantization`: what passed tests measured, a row a case.

`-m ""` beside it runs the slow rows too.  Bits, perplexity and speed beside each other: `python -m experiments.quantize`.
"""

import numpy as np
from tables import COUNT, ERROR, MOST, TEXT, Kind, Numbered

PARTS, LARGEST = (max, ".6f"), (max, ".4f")
KINDS = {
  "equal": Kind(
    1,
    "Beside another implementation, number by number, to the last bit",
    "by, and what",
    {"compared": COUNT, "differ": COUNT, "largest difference": ERROR},
    order=str,
  ),
  "errors": Kind(
    2,
    "Errors of a normal matrix beside those that bitsandbytes publishes, mean + 7 sigma",
    "levels",
    {name: PARTS for name in ("mean |error|", "at most", "mean |error / w|", "at most of it")},
  ),
  "int4": Kind(
    3, "4 bits beside each other, a normal matrix", "block", {"mean |error|": PARTS, "mean error^2": PARTS}
  ),
  "outliers": Kind(
    4,
    "Planted outlier features: the error of LLM.int8() over that of w8a8, below 0.2 with `features`, 0.18 to 0.26 by default",
    "rows",
    {"w8a8": LARGEST, "LLM.int8()": LARGEST, "ratio": LARGEST},
  ),
  "products": Kind(
    5,
    "Products of 1, 8 and 64 rows, compiled: temporary memory over the weight as float32, and arrays of half its size",
    "scheme",
    {"share of a float copy": LARGEST, "large arrays": COUNT, "programs": COUNT},
  ),
  "saved": Kind(
    6,
    "Checkpoints saved and opened again, alone and on other meshes, and the text that they generate",
    "scheme",
    {"arrays": COUNT, "differ": COUNT, "meshes": MOST, "tokens": COUNT, "other tokens": COUNT},
  ),
  "lora": Kind(
    7,
    "LoRA: logits at first and arrays after unmerge, to the last bit, and merged logits, relative",
    "base",
    {"logits": COUNT, "differ": COUNT, "merged": ERROR, "unmerged": COUNT, "differ of it": COUNT},
  ),
  "bad input": Kind(8, "Bad input", "case", {"error": TEXT, "says": TEXT}),
}
"""`largest difference` of the first, relative, is of sums and scales that are rounded in another order."""


class Table(Numbered):
  """The plugin."""

  title, kinds = "quantization", KINDS


about, measured, refused = Table.about, Table.measured, Table.refused


def differ(found, expected):
  """How many numbers of two arrays of one type and shape have other bits."""
  found, expected = np.ascontiguousarray(found), np.ascontiguousarray(expected)
  assert (found.dtype, found.shape) == (expected.dtype, expected.shape), (found.dtype, expected.dtype)
  bits = np.dtype(f"u{found.itemsize}")
  return np.sum(found.view(bits) != expected.view(bits))


def equal(what, found, expected, most=0):
  """Arrays have the same bits but for `most` numbers; how many were compared, and how many have others, is recorded."""
  about("equal", what)
  count = differ(found, expected)
  assert count <= most, f"{what}: {count} of {np.size(found)} numbers differ, expected at most {most}"
  measured("equal", what, compared=np.size(found), differ=count)


def nearest(what, found, exact):
  """Integers are the exact numbers rounded, either way where these are within 1e-4 of halfway; recorded as `equal` does."""
  found, away = np.asarray(found), np.abs(found - exact)
  equal(what, found, np.round(exact).astype(found.dtype), most=np.sum(np.abs(away - 0.5) < 1e-4))
  assert np.max(away) <= 0.5 + 1e-4, (what, np.max(away))


def close(what, found, expected, rtol, whole=False):
  """Numbers are the same within rtol of each (whole: of the largest), as some are rounded elsewhere; how near is recorded."""
  about("equal", what)
  found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
  size = np.max(np.abs(expected)) if whole else np.where(expected == 0, 1, np.abs(expected))
  off = np.abs(found - expected) / size
  assert np.max(off) <= rtol, (what, np.max(off))
  measured("equal", what, compared=off.size, differ=np.sum(off > 0), largest_difference=np.max(off))
