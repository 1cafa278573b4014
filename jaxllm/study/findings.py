"""Findings as sentences computed from result rows: if the numbers turn, the sentence turns."""

from __future__ import annotations

from collections.abc import Sequence

from jaxllm.study.interval import mean

METRICS = {  # the words after "a lower" or "in the", and the unit of a value
  "bpb_last": ("loss on the last block", " bits per byte"),
  "bpb": ("loss on the whole window", " bits per byte"),
  "perplexity": ("perplexity", ""),
  "accuracy": ("accuracy", ""),
  "accuracy_repeated": ("accuracy on the repeated part", ""),
}
NO_DIFFERENCE = 0.005  # of two means; values are shown with two decimals


def compare(rows: Sequence[dict], metric: str, length: int, a: str | dict, b: str | dict) -> str:
  """A sentence: which of `a` and `b` is lower in `metric` at `length`, by how much, and in how many seeds.

  `a` and `b` are methods, or columns that choose rows: {"scheme": "alibi", "method": "none"}. Seeds are
  compared in pairs, and those without both values are counted as left out. Means within 0.005 are no
  difference.
  """
  words, unit = METRICS[metric]
  found_a, found_b = (_by_seed(rows, metric, length, which) for which in (a, b))
  name_a, name_b = _name(a), _name(b)
  seeds = sorted(found_a.keys() | found_b.keys())
  paired = [seed for seed in seeds if _is_ok(found_a.get(seed)) and _is_ok(found_b.get(seed))]
  if not paired:
    absent = [_absence(name_a, found_a), _absence(name_b, found_b)]
    why = "; ".join(filter(None, absent)) or "no seed has both values"
    return f"At length {length}, {name_a} and {name_b} cannot be compared in the {words}: {why}."

  values = [(found_a[seed]["value"], found_b[seed]["value"]) for seed in paired]
  mean_a, mean_b = (mean(one) for one in zip(*values, strict=True))
  numbers = f"{mean_a:.3f} against {mean_b:.3f}{unit}"
  if abs(mean_a - mean_b) <= NO_DIFFERENCE:
    sentence = f"there is no difference between {name_a} and {name_b} in the {words} ({numbers})"
    agree = ""
  else:
    sign = 1 if mean_a > mean_b else -1
    sentence = (
      f"{name_a} has a {'higher' if sign > 0 else 'lower'} {words} than {name_b} "
      f"({numbers}, difference {abs(mean_a - mean_b):.3f})"
    )
    agree = f"; {sum(sign * (x - y) > 0 for x, y in values)} of {len(paired)} agree"
  if len(paired) > 1:
    sentence += f" in the mean of {len(paired)} seeds{agree}"
  if len(paired) < len(seeds):
    sentence += f"; {len(seeds) - len(paired)} of {len(seeds)} seeds left out, as a value is missing"
  return f"At length {length}, {sentence}."


def _by_seed(rows: Sequence[dict], metric: str, length: int, which: str | dict) -> dict[int, dict]:
  wanted = {"metric": metric, "length": length, **({"method": which} if isinstance(which, str) else which)}
  chosen = [row for row in rows if all(row[name] == item for name, item in wanted.items())]
  by_seed = {row["seed"]: row for row in chosen}
  assert len(by_seed) == len(chosen), (
    f"{which} chooses several rows a seed; name the scheme or the factor too"
  )
  return by_seed


def _name(which: str | dict) -> str:
  return f"`{which if isinstance(which, str) else ' '.join(map(str, which.values()))}`"


def _is_ok(row: dict | None) -> bool:
  return row is not None and row["status"] == "ok"


def _absence(name: str, found: dict[int, dict]) -> str:
  """Why `found` has no value at all; empty if it has one."""
  if not found:
    return f"{name} has no result"
  if any(map(_is_ok, found.values())):
    return ""
  row = next(iter(found.values()))
  return f"{name} {'failed' if row['status'] == 'failed' else 'is not applicable'} ({row['reason']})"
