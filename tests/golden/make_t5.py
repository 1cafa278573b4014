"""Writes t5.json: T5's buckets of the distances 0..20000 of a decoder, as transformers computes them.

A row is (num_buckets, max_distance, starts): the first distance of every bucket that has one, in order.  Buckets never
fall with the distance, so the starts hold all 20001 numbers.  transformers takes float32 logarithms, which may round
a distance that is exactly a threshold to the bucket below; where that happened is seen by comparing with integers.
Needs torch and transformers; the tests need only the JSON.  Run: python tests/golden/make_t5.py
"""

import json
from importlib.metadata import version
from pathlib import Path

import torch
from transformers.models.t5.modeling_t5 import T5Attention

LONGEST = 20000
CASES = [(32, 128), (32, 20), (32, 100), (16, 64), (64, 256), (32, 8192), (31, 200), (8, 64), (2, 10), (3, 7)]
CASES += [(128, 1000), (4, 32)]


def starts(num_buckets, max_distance):
  distance = torch.arange(LONGEST + 1)
  bucket = T5Attention._relative_position_bucket(
    -distance, bidirectional=False, num_buckets=num_buckets, max_distance=max_distance
  )
  assert (bucket.diff() >= 0).all() and bucket[0] == 0
  return {int(b): int(distance[bucket == b][0]) for b in bucket.unique()}


def main():
  rows = [
    {"num_buckets": n, "max_distance": m, "starts": {str(b): d for b, d in starts(n, m).items()}}
    for n, m in CASES
  ]
  made = {name: version(name) for name in ("torch", "transformers")}
  text = f'{{"made_with": {json.dumps(made)}, "longest": {LONGEST}, "rows": [\n'
  text += ",\n".join(map(json.dumps, rows)) + "\n]}\n"
  path = Path(__file__).with_name("t5.json")
  path.write_text(text)
  print(f"{len(json.loads(text)['rows'])} rows")


if __name__ == "__main__":
  main()
