"""Tables, figures and files of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.quantization import joint, results, weights
from experiments.quantization.cells import Plan
from experiments.quantization.schemes import NONE
from jaxllm.quant import LlmInt8
from jaxllm.study import files, methods, plots
from jaxllm.study.report import Table

HEADER = (
  *("quant", "bits", "disk MB", "resident MB", "weight error", "largest, of", "perplexity"),
  *("difference to none", "bits per byte", "decode tok/s", "times none"),
)


def write(out: Path, plan: Plan, config: dict, done: Mapping[str, list[dict]]) -> None:
  """Write every result file into `out`, and show the tables."""
  by_kind: dict[str, dict[str, list[dict]]] = {}
  for group, found in done.items():
    name, kind = group.split("/")[:2]
    by_kind.setdefault(kind, {}).setdefault(name, []).extend(found)
  own = [row for name in plan.names for row in results.of_scheme(plan, name, by_kind)]
  swept = [{**results.BLANK, **row} for found in by_kind.get("sweep", {}).values() for row in found]
  listed = [row for row in swept if row["metric"] != methods.BY_WINDOW]
  files.write_results(out, own + listed, results.COLUMNS)
  tables = {"Schemes": summary(plan, own)} | joint.tables(plan, swept)
  figures = [_draw(out, plan, own), *joint.draw(out, plan, swept)]
  files.write_text(out / "report.md", _markdown(plan, config, tables, figures))
  for title, one in tables.items():
    one.show(title)
  print(f"Results, figures and report: {out}")


def summary(plan: Plan, own: Sequence[dict]) -> Table:
  """One line a scheme."""
  body, notes = [], []
  for name in plan.names:
    by_metric = {row["metric"]: row for row in own if row["quant"] == name and row["weight"] is None}
    each = [row for row in own if row["quant"] == name and row["metric"] == weights.EACH]
    largest = max(each, key=lambda row: row["value"] or 0.0)
    show = lambda metric, form, by_metric=by_metric: _show(by_metric[metric], form)
    ranged = lambda digits: lambda v, low, high: f"{v:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
    megabytes = lambda v, *_: f"{v / 1e6:.3f}"
    body.append(
      (
        name,
        show("bits", lambda v, *_: f"{v:.3f}"),
        *(show(metric, megabytes) for metric in weights.SIZES[1:]),
        show(weights.ERROR, lambda v, *_: f"{v:.5f}"),
        "-" if name == NONE else _show(largest, lambda v, *_, of=largest["weight"]: f"{v:.5f} {of}"),
        show("perplexity", lambda v, *_: f"{v:.4f}"),
        "-"
        if name == NONE
        else show("perplexity_difference", lambda v, low, high: f"{v:+.4f} ({low:+.4f} to {high:+.4f})"),
        show("bpb", lambda v, *_: f"{v:.4f}"),
        show("tokens_per_second", ranged(0)),
        show("times_none", ranged(2)),
      )
    )
    reasons = dict.fromkeys((row["status"], row["reason"]) for row in by_metric.values() if row["reason"])
    notes += [f"{status}: {name}: {reason}" for status, reason in reasons]
  notes += [f"left out: {name}: {reason}" for name, reason in plan.left_out.items()]
  return Table(HEADER, tuple(body), 1, tuple(notes))


def _show(row: dict, form) -> str:
  if row["status"] != "ok":
    return "failed" if row["status"] == "failed" else "n/a"
  return form(row["value"], row["low"], row["high"])


def _draw(out: Path, plan: Plan, own: Sequence[dict]) -> str:
  """Write the figure of bits and perplexity; its name."""
  points, bands = {}, {}
  for name in plan.chosen:
    by_metric = {row["metric"]: row for row in own if row["quant"] == name}
    bits, cost = by_metric["bits"], by_metric["perplexity_difference"]
    if bits["status"] == cost["status"] == "ok":
      points[name], bands[name] = ([bits["value"]], [cost["value"]]), ([cost["low"]], [cost["high"]])
  title = (
    f"Perplexity above that of `none`, windows of {plan.scoring.windows.length} {plan.source.models.unit}"
  )
  plots.lines(
    *(out / "cost.png", {"": (points, bands)}, "bits an element, scales counted", "perplexity above none"),
    title,
    xlog2=False,
  )
  return "cost.png"


def _markdown(plan: Plan, config: dict, tables: Mapping[str, Table], figures: Sequence[str]) -> str:
  source, windows, asked = plan.source, plan.scoring.windows, plan.asked
  parts = ["# Quantization: what it saves, and what it costs", ""]
  for title, one in tables.items():
    parts += [f"## {title}", "", one.markdown()]
  parts += [f"![{name.removesuffix('.png')}]({name})" for name in figures]
  parts += [
    *("", "## How it was measured", ""),
    f"- Model: {asked['model'] or source.scheme}, {config['settings']['dtype']} compute, trained at {source.train_length}; "
    f"{len(plan.quantized)} weights are quantized, {plan.quantized[0]} the first.",
    "- Bits: those of the quantized weights, scales counted.  Disk: the weights' files as hf.save writes them (a model of "
    "the sweep as experiments.export does).  Resident: all parameters in the memory of the devices.  MB: a million bytes.",
    "- Weight error: ||w - w'|| / ||w|| (Frobenius) over all quantized weights, and of the one where it is largest; of "
    "each in results.csv.",
    *_rules(asked),
    f"- Text: {len(source.text)} {source.models.unit}, all but the first scored once, in {len(windows)} windows of "
    f"{windows.length}.  Differences: 95 % by a bootstrap over {len(plan.scoring.edges) - 1} stretches of it, the same ones "
    "drawn for both.",
    f"- Decoding: {asked['new'] - 1} tokens after a prompt of {asked['prompt']}, batch {asked['batch']}; the median "
    f"of {asked['rounds']} readings of at least {asked['seconds']:g} s in turns with `none`, and their range; times none: the "
    "same of the ratios of turns.  The line of `none` is against itself, and says what is noise.",
    *([] if source.settings is None else [joint.note(plan)]),
    *_not_causal(plan),
    f"- {config['devices'][0]} with jax {config['libraries']['jax']}, Python {config['python']}.  All else is in config.json.",
    "",
  ]
  return "\n".join(parts)


def _rules(asked: Mapping) -> list[str]:
  given = [f"--weights={rule}" for rule in asked["weights"]]
  given += ["--quantize_head"] * asked["quantize_head"] + [f"--mesh={asked['mesh']}"] * bool(asked["mesh"])
  return [f"- Given: {' '.join(given)}."] if given else []


def _not_causal(plan: Plan) -> list[str]:
  held = {**plan.chosen, **{f"--weights={pattern}": value for pattern, value in plan.rules}}
  names = [name for name, scheme in held.items() if isinstance(scheme, LlmInt8)]
  if not names:
    return []
  return [
    f"- {', '.join(names)}: not causal within a call, as all rows that are multiplied at once decide which columns are "
    "outliers; its losses are of whole windows, several at a time, and of one token a row in decoding they would be others."
  ]
