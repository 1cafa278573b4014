"""Writes alibi.json: ALiBi slopes for 1..128 heads, from two independent sources.

Source 1: the recipe of the ALiBi authors (Press, Smith, Lewis 2021, and their code), exactly: a slope is
2^(-e/16), so a head count is a list of integers e, beside one table of 2^(-e/16) rounded once to float64.
Source 2: transformers' BLOOM and MPT (float32), kept as the head counts on which they agree with the recipe:
all of them.  MPT reaches the same list by another road (also with an alibi_bias_max other than 8), and Falcon rounds
the same list to bfloat16, an exponent always to the same number.
Needs mpmath, torch and transformers; the tests need only the JSON.  Run: python tests/golden/make_alibi.py
"""

import json
from importlib.metadata import version
from pathlib import Path

import mpmath
import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.falcon.modeling_falcon import build_alibi_tensor as build_falcon_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

mpmath.mp.dps = 50
MOST = 128


def exponents(n):
  """Sixteenths e of the slopes 2^(-e/16).

  n a power of two: the geometric sequence that starts at 2^(-8/n) with that same ratio.  Otherwise the
  sequence for the power of two below n, then every other slope, from the first, of that for twice that power.
  """
  below = 1 << (n.bit_length() - 1)
  if n == below:
    return [MOST // n * (h + 1) for h in range(n)]
  return exponents(below) + exponents(2 * below)[0::2][: n - below]


def slope(e):
  return mpmath.mpf(2) ** (-mpmath.mpf(e) / 16)


def bloom(n):
  """BLOOM multiplies slopes by the position: position 1 shows them."""
  return build_alibi_tensor(torch.ones(1, 2), n, torch.float32)[:, 0, 1].tolist()


def mpt(n, bias_max=8):
  """MPT's bias is slope * (distance to the last key), negative."""
  return (-build_mpt_alibi_tensor(n, 2, bias_max)[:, 0, 0]).tolist()


def falcon(n):
  """Falcon multiplies bfloat16 slopes by the position: position 1 shows them."""
  return build_falcon_alibi_tensor(torch.ones(1, 2), n, torch.float32)[:, 0, 1].tolist()


FAR = (1, 100, 255, 256, 257, 259, 511, 2047, 100_003)
"""Positions that bfloat16 holds and such that it rounds."""


def falcon_products():
  """Falcon's slope * position for 12 heads at FAR, a list a head: slope, position and product rounded to bfloat16."""
  mask = torch.ones(
    1, max(FAR) + 1, dtype=torch.long
  )  # the model's: positions of a float mask are not rounded
  return build_falcon_alibi_tensor(mask, 12, torch.float32)[:, 0, list(FAR)].tolist()


def falcon_slopes():
  """{e: Falcon's slope}, from all head counts; each has one slope for an exponent."""
  found = {}
  for n in range(1, MOST + 1):
    for e, value in zip(exponents(n), falcon(n), strict=True):
      assert found.setdefault(e, value) == value, (n, e)
  return {e: found[e] for e in sorted(found)}


def agree(values, n, bias_max=8):
  power = mpmath.mpf(bias_max) / 8
  return max(abs(a / slope(e) ** power - 1) for a, e in zip(values, exponents(n), strict=True)) < 1e-6


def main():
  heads = range(1, MOST + 1)
  parts = {
    "made_with": {name: version(name) for name in ("mpmath", "torch", "transformers")},
    "slope_of_exponent": {e: float(slope(e)) for e in range(1, MOST + 1)},
    "bloom_agrees": [n for n in heads if agree(bloom(n), n)],
    "mpt_agrees": [n for n in heads if agree(mpt(n), n)],
    "mpt_agrees_with_bias_max": {m: [n for n in heads if agree(mpt(n, m), n, m)] for m in (4, 16)},
    "falcon_slope_of_exponent": falcon_slopes(),
    "falcon_positions": FAR,
    "falcon_products_of_12_heads": falcon_products(),
    "bloom": {n: [float(f"{v:.9g}") for v in bloom(n)] for n in (1, 2, 3, 8, 12, 40, 71, 112)},
  }
  text = "".join(f"{json.dumps(key)}: {json.dumps(value)},\n" for key, value in parts.items())
  text += '"exponents": {\n' + ",\n".join(f'"{n}": {json.dumps(exponents(n))}' for n in heads) + "\n}\n"
  path = Path(__file__).with_name("alibi.json")
  path.write_text("{\n" + text + "}\n")
  data = json.loads(path.read_text())
  print(f"BLOOM agrees on {len(data['bloom_agrees'])} head counts, MPT on {len(data['mpt_agrees'])}")


if __name__ == "__main__":
  main()
