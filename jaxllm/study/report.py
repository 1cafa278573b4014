"""Tables computed from result rows: methods by lengths, with what is missing said below."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from jaxllm.study.interval import half_width, mean

LABELS = (
  "scheme",
  "quant",
  "train_length",
  "method",
  "factor",
)  # what tells rows apart, beside length and seed


@dataclasses.dataclass(frozen=True)
class Table:
  """A table of text: a header and a body whose first `labels` columns are names, and notes below."""

  header: tuple[str, ...]
  body: tuple[tuple[str, ...], ...]
  labels: int
  notes: tuple[str, ...]

  def markdown(self) -> str:
    """Aligned Markdown: names to the left, numbers to the right, the notes as a list."""
    columns = list(zip(self.header, *self.body, strict=True))
    widths = [max(3, *map(len, column)) for column in columns]
    rule = ["-" * w if i < self.labels else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    lines = []
    for line in (self.header, rule, *self.body):
      cells = [
        cell.ljust(w) if i < self.labels else cell.rjust(w)
        for i, (cell, w) in enumerate(zip(line, widths, strict=True))
      ]
      lines.append(f"| {' | '.join(cells)} |\n")
    notes = ["\n", *(f"- {note}\n" for note in self.notes)] if self.notes else []
    return "".join(lines + notes)

  def show(self, title: str) -> None:
    """Prints the table on the terminal; anywhere else as wide as it is, as rich would drop what passes 80 columns."""
    import rich.box
    import rich.console
    import rich.table

    grid = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    for i, name in enumerate(self.header):
      grid.add_column(name, justify="left" if i < self.labels else "right", no_wrap=True)
    for line in self.body:
      grid.add_row(*line)
    console = rich.console.Console()
    if not sys.stdout.isatty():
      whole = console.options.update(width=sys.maxsize)
      console.width = max(console.width, console.measure(grid, options=whole).maximum)
    console.print(title, style="italic", markup=False, highlight=False, soft_wrap=True)
    console.print(grid)
    for note in self.notes:
      console.print(f"  {note}", markup=False, highlight=False)


def table(rows: Sequence[dict], metric: str, digits: int = 2) -> Table:
  """Methods by lengths for one metric, in the order of the rows.

  A cell is the mean over seeds, with the half width of its 95 % interval if there are several. Columns that
  tell rows apart beside the method (scheme, factor, ...) are there if they vary. "n/a": not applicable; "-":
  no row; "failed": no seed has a value. Notes list the failures and, collapsed, what is not applicable.
  """
  rows = [row for row in rows if row["metric"] == metric]
  names = _telling(rows)
  lengths = sorted({row["length"] for row in rows})
  body = tuple(
    (*label, *(_cell([row for row in own if row["length"] == length], digits) for length in lengths))
    for label, own in _by_label(rows, names).items()
  )
  return Table((*names, *map(str, lengths)), body, len(names), tuple(_notes(rows, names)))


def series(rows: Sequence[dict], metric: str) -> tuple[dict, dict]:
  """For `plots.lines`: lines {label: (lengths, means)} and bands {label: (lows, highs)} of 95 % intervals.

  A length without a value is left out of its line, and a label without any is left out; bands are there for
  labels that have several seeds at every length.
  """
  rows = [row for row in rows if row["metric"] == metric]
  lines, bands = {}, {}
  for label, own in _by_label(rows, _telling(rows)).items():
    values: dict[int, list[float]] = {}
    for row in sorted(own, key=lambda row: row["length"]):
      if row["status"] == "ok":
        values.setdefault(row["length"], []).append(row["value"])
    if not values:
      continue
    name, means = " ".join(label), [mean(found) for found in values.values()]
    lines[name] = (list(values), means)
    if all(len(found) > 1 for found in values.values()):
      spreads = [half_width(found) for found in values.values()]
      low_high = [(m - s, m + s) for m, s in zip(means, spreads, strict=True)]
      bands[name] = tuple(map(list, zip(*low_high, strict=True)))
  return lines, bands


def _telling(rows: Sequence[dict]) -> tuple[str, ...]:
  """The columns that name a line of the table: the method, and those of LABELS that tell rows apart.

  A factor that follows the length (length / train_length, as a sweep has it by default) tells nothing apart.
  """
  names = [name for name in LABELS[:-1] if name == "method" or len({row[name] for row in rows}) > 1]
  cells = {tuple(row[name] for name in (*names, "length", "seed")) for row in rows}
  if len(cells) < len(rows):
    names.append("factor")
    cells = {tuple(row[name] for name in (*names, "length", "seed")) for row in rows}
  assert len(cells) == len(rows), "two rows for one cell"
  return tuple(names)


def _by_label(rows: Sequence[dict], names: tuple[str, ...]) -> dict[tuple[str, ...], list[dict]]:
  groups: dict[tuple[str, ...], list[dict]] = {}
  for row in rows:
    groups.setdefault(_label(row, names), []).append(row)
  return groups


def _label(row: dict, names: tuple[str, ...]) -> tuple[str, ...]:
  return tuple(f"{row[name]:g}" if isinstance(row[name], float) else str(row[name]) for name in names)


def _cell(rows: list[dict], digits: int) -> str:
  values = [row["value"] for row in rows if row["status"] == "ok"]
  if not values:
    statuses = {row["status"] for row in rows}
    return "failed" if "failed" in statuses else "n/a" if statuses else "-"
  text = f"{mean(values):.{digits}f}"
  if len(values) > 1:
    text += f" ± {half_width(values):.{digits}f}"
  return text if len(values) == len(rows) else f"{text} ({len(values)} of {len(rows)} seeds)"


def _notes(rows: Sequence[dict], names: tuple[str, ...]) -> list[str]:
  notes = [
    f"failed: {' '.join(_label(row, names))} at {row['length']}, seed {row['seed']}: {row['reason']}"
    for row in rows
    if row["status"] == "failed"
  ]
  lengths: dict[tuple[str, str], set[int]] = {}  # of a label and a reason
  for row in rows:
    if row["status"] == "not applicable":
      lengths.setdefault((" ".join(_label(row, names)), row["reason"]), set()).add(row["length"])
  labels: dict[tuple[str, tuple[int, ...]], list[str]] = {}  # of a reason and all its lengths
  for (label, reason), found in lengths.items():
    labels.setdefault((reason, tuple(sorted(found))), []).append(label)
  for (reason, found), named in labels.items():
    notes.append(f"not applicable: {', '.join(named)} at {', '.join(map(str, found))}: {reason}")
  return notes
