"""Tables, figures and findings of the length-extrapolation sweep, all computed from its rows."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from jaxllm.evaluate.trigram import Trigram
from jaxllm.evaluate.windows import bits_per_byte, cut_windows
from jaxllm.study import files, interval, methods, plots
from jaxllm.study.findings import METRICS, compare
from jaxllm.study.report import series, table

NTK = ("ntk_old", "ntk", "ntk_fixed", "ntk_mixed", "dynamic_ntk")
PAIRS = (*((name, "none") for name in ("pi", *NTK)), *(("yarn", name) for name in NTK), ("rerope", "yarn"))
"""Methods of the RoPE model that the findings compare, and nothing about how it should come out."""
HEADINGS = {
  "bpb_last": "Bits per byte on the last block",
  "bpb": "Bits per byte on the whole window",
  "accuracy": "Next-byte accuracy on natural text",
  "accuracy_repeated": "Next-byte accuracy on one block repeated",
}


def write(out: Path, settings, config: dict, all_rows: list[dict], corpus) -> int:
  """Write every result file into `out` and show the main table; the exit code of the run."""
  curve = [row for row in all_rows if row["metric"] == methods.POSITION_CURVE]
  rows = [row for row in all_rows if row["metric"] != methods.POSITION_CURVE]
  files.write_results(out, rows)
  files.write_text(out / "positions.csv", _sheet(curve))
  labelled = _labelled(rows, settings.factors)
  _plots(out, settings, labelled, _labelled(curve, settings.factors))
  baseline = _trigram(settings, corpus)
  files.write_text(out / "report.md", _markdown(settings, config, rows, labelled, baseline))
  main = next(m for m in methods.METRICS if m in settings.metrics)
  table(_applicable(labelled), main).show(f"{HEADINGS[main]} (trained at {settings.train_length} bytes)")
  for line in _in_length(rows, settings, baseline):
    print(line)
  print(f"Results, figures and report: {out}")
  failed = [row for row in all_rows if row["status"] == "failed"]
  if failed:
    reasons = sorted({row["reason"] for row in failed})
    print(f"{len(failed)} cells failed: {'; '.join(reasons)}.  The same command tries them again.")
  return 1 if failed else 0


def _labelled(rows: list[dict], factors) -> list[dict]:
  """Rows whose factor is a label only where it was a choice, and not where it is length / train_length."""
  return rows if factors is not None else [{**row, "factor": None} for row in rows]


def _applicable(rows: list[dict]) -> list[dict]:
  return [row for row in rows if row["status"] != "not applicable"]


def _sheet(curve: list[dict]) -> str:
  out = io.StringIO()
  columns = ("scheme", "method", "factor", "train_length", "length", "position", "value", "seed", "status", "reason")
  writer = csv.DictWriter(out, columns, lineterminator="\n", extrasaction="ignore")
  writer.writeheader()
  writer.writerows(curve)
  return out.getvalue()


def _plots(out: Path, settings, rows: list[dict], curve: list[dict]) -> None:
  rows, curve = _applicable(rows), _applicable(curve)
  xlabel = f"test length in bytes (trained at {settings.train_length})"
  for name, metric, ylabel in (
    ("bpb_vs_length.png", "bpb_last", "bits per byte, last block"),
    ("accuracy_vs_length.png", "accuracy", "next-byte accuracy, natural text"),
  ):
    if metric in settings.metrics:
      lines, bands = series(rows, metric)
      plots.lines(out / name, lines, xlabel, ylabel, HEADINGS[metric], bands=bands)
  # a position takes the place of the length, so that the same series code serves
  by_position = [{**row, "length": row["position"]} for row in curve]
  lines, bands = series(by_position, methods.POSITION_CURVE)
  title = f"Bits per byte by position, windows of {max(settings.lengths)} bytes"
  plots.lines(out / "bpb_vs_position.png", lines, "position in bytes", "bits per byte", title, xlog2=False, bands=bands)


def _trigram(settings, corpus) -> float:
  """Bits per byte of the trigram model on the windows of the training length."""
  windows = cut_windows(corpus.validation, settings.train_length, max(settings.lengths), settings.windows)
  return bits_per_byte(Trigram(corpus.train).nats(windows))


def _in_length(rows: list[dict], settings, baseline: float) -> list[str]:
  """What the models reach at the training length, beside the trigram model."""
  found = []
  for scheme in settings.schemes:
    values = [
      row["value"]
      for row in rows
      if (row["scheme"], row["method"], row["metric"]) == (scheme, "none", "bpb")
      and row["length"] == settings.train_length
      and row["status"] == "ok"
    ]
    if values:
      found.append(f"{scheme} {interval.mean(values):.3f} ({settings.steps_of(scheme)} steps)")
  if not found:
    return []
  return [
    f"At the training length, in bits per byte on the whole window: {', '.join(found)}; "
    f"interpolated trigram model {baseline:.3f}."
  ]


def _findings(rows: list[dict], settings) -> list[str]:
  """Comparisons computed from the rows, on the loss of the last block."""
  if "bpb_last" not in settings.metrics:
    return []
  train, lengths = settings.train_length, settings.lengths
  at = 8 * train if 8 * train in lengths else max(lengths)
  sentences = []
  asked = set(settings.methods)
  if settings.factors is None and at > train:
    for scheme in settings.schemes:
      pick = lambda name, scheme=scheme, **more: {"scheme": scheme, "method": name, **more}
      pairs = [pair for pair in PAIRS if asked.issuperset(pair) and not any(methods.not_applicable(scheme, m) for m in pair)]
      sentences += [compare(rows, "bpb_last", at, pick(a), pick(b)) for a, b in pairs]
      if train in lengths and asked.issuperset(("rerope", "none")) and not methods.not_applicable(scheme, "rerope"):
        sentences.append(_across(rows, scheme, "rerope", at, train))
      sentences += [s for s in (_best(rows, scheme, at),) if s]
  for scheme in settings.schemes:
    if "none" in asked and train in lengths and max(lengths) > train:
      sentences.append(_across(rows, scheme, "none", max(lengths), train))
  return sentences


def _across(rows: list[dict], scheme: str, method: str, length: int, train: int) -> str:
  """A method at a long length against the model as trained at its own length."""
  here = _values(rows, scheme, method, length)
  there = _values(rows, scheme, "none", train)
  name = f"`{scheme} {method}` at length {length}"
  if not here or not there:
    return f"{name} and `{scheme} none` at length {train} cannot be compared: a value is missing."
  a, b = interval.mean(list(here.values())), interval.mean(list(there.values()))
  words, unit = METRICS["bpb_last"]
  word = "equals" if abs(a - b) <= 0.005 else "is above" if a > b else "is below"
  return f"The {words} of {name} {word} that of `{scheme} none` at the training length {train} ({a:.2f} against {b:.2f}{unit})."


def _best(rows: list[dict], scheme: str, length: int) -> str | None:
  """Which method has the lowest loss on the last block."""
  means = {
    method: interval.mean(list(found.values()))
    for method in methods.METHODS
    if (found := _values(rows, scheme, method, length))
  }
  if len(means) < 2:
    return None
  first, second = sorted(means, key=means.get)[:2]
  return (
    f"At length {length}, the lowest loss on the last block of `{scheme}` is that of `{first}` ({means[first]:.2f} bits per byte), "
    f"before `{second}` ({means[second]:.2f})."
  )


def _values(rows: list[dict], scheme: str, method: str, length: int) -> dict[int, float]:
  return {
    row["seed"]: row["value"]
    for row in rows
    if (row["scheme"], row["method"], row["length"], row["metric"]) == (scheme, method, length, "bpb_last")
    and row["status"] == "ok"
  }


def _markdown(settings, config: dict, rows: list[dict], labelled: list[dict], baseline: float) -> str:
  evaluation, corpus = config["evaluation"], config["corpus"]
  parts = ["# Length extrapolation: train short, test long", ""]
  parts += [*_in_length(rows, settings, baseline), ""]
  if found := _findings(rows, settings):
    parts += ["## Findings", "", *(f"- {sentence}" for sentence in found), ""]
  for metric in settings.metrics:
    parts += [f"## {HEADINGS[metric]}", "", table(_applicable(labelled), metric, 3).markdown()]
  skipped = {(r["scheme"], r["method"]): r["reason"] for r in rows if r["status"] == "not applicable"}
  if skipped:
    reasons: dict[str, list[str]] = {}
    for (scheme, method), reason in skipped.items():
      reasons.setdefault(f"{scheme}: {reason}", []).append(method)
    parts += ["Not applicable, and so not in the tables:", ""]
    parts += [f"- {', '.join(names)} on {reason}" for reason, names in reasons.items()] + [""]
  parts += ["![loss by length](bpb_vs_length.png)", "![loss by position](bpb_vs_position.png)"]
  parts += ["![accuracy by length](accuracy_vs_length.png)", "", "## How it was measured", ""]
  parts += [
    f"- Text: {corpus['source']}, {corpus['files']} files, {corpus['bytes']} bytes, {corpus['split']} "
    f"({corpus['train_bytes']} for training, {corpus['validation_bytes']} for validation), SHA-256 {corpus['sha256'][:16]}.",
    f"- Training: {', '.join(f'{s} {settings.steps_of(s)} steps' for s in settings.schemes)} of {settings.batch_size} x "
    f"{settings.train_length} bytes; {settings.seeds} seed(s); {config['settings']['dtype']} compute, float32 parameters.",
    f"- Model: {settings.num_layers} layers, width {settings.embed_dim}, {settings.num_heads} heads, SwiGLU of "
    f"{settings.mlp_dim}, RMSNorm, {config['platform']} with jax {config['jax']}, Python {config['python']}.",
    f"- Windows: {evaluation['windows']}, their ends {evaluation['stride']} bytes apart and the same for every length, so the "
    f"last block of {evaluation['last_block']} bytes is the same text with more or less before it.",
    "- The repeated text is each window's last block over and over; both accuracies count every position of the window.",
    "- `_logn`: queries times max(1, log of position + 1 to the base of the training length), at test time only.  `none`: as "
    "trained.  Factors: " + _factors(settings) + f"  dynamic_ntk: {evaluation['dynamic_ntk']}.",
    "- Everything needed to repeat the run is in config.json.",
    "",
  ]
  return "\n".join(parts)


def _factors(settings) -> str:
  if settings.factors is None:
    return "length / train_length, so methods are switched on beyond the training length only."
  return ", ".join(map(str, settings.factors)) + ", at every length."
