"""Writes families.npz: transformers' float32 logits of each row of tests/hf/family_cases.py, at 16 of its 600 positions.

Weights are NumPy's, by the names of the tensors, and so need no file.  python tests/golden/make_families.py
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent), str(HERE.parent / "hf")]

import numpy as np  # noqa: E402
import theirs  # noqa: E402
from family_cases import GOLDEN, KEPT, ROWS, tokens  # noqa: E402

rows = {row: theirs.logits(theirs.row_model(row), tokens())[0, KEPT] for row in ROWS}
np.savez_compressed(GOLDEN, **rows)
print(
  f"{GOLDEN}: {len(rows)} rows of transformers {theirs.transformers.__version__}, {GOLDEN.stat().st_size} bytes"
)
