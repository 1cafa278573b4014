"""Writes families.npz: float32 logits of each row of tests/hf/family_cases.py, at 16 of its 600 positions.

They are transformers' or, of a family that it does not have, those of tests/hf/definitions.py.
Weights are NumPy's, by the names of the tensors, and so need no file.  python tests/golden/make_families.py
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent), str(HERE.parent / "hf")]

import definitions  # noqa: E402
import numpy as np  # noqa: E402
import theirs  # noqa: E402
from family_cases import GOLDEN, KEPT, REMOTE, ROWS, T, built, call_of, settings, tokens  # noqa: E402


def logits(row):
  """[1, T, V], by another's code than jaxllm's."""
  if row in REMOTE:
    return definitions.logits(settings(row), built(row).tensors, tokens(), **call_of(row, T)).astype(
      np.float32
    )
  return theirs.logits(theirs.row_model(row), tokens())


rows = {row: logits(row)[0, KEPT] for row in ROWS}
np.savez_compressed(GOLDEN, **rows)
print(
  f"{GOLDEN}: {len(rows)} rows of transformers {theirs.transformers.__version__}, {GOLDEN.stat().st_size} bytes"
)
