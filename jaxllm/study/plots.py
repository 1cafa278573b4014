"""Line plots for reports: the same numbers give the same bytes."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence

from jaxllm.study import files

# Dark enough for white paper, and far apart; with more lines than colours the dashes change as well.
COLOURS = ("#1f5fa8", "#d9480f", "#2b8a3e", "#9c36b5", "#c99700", "#0b8a94", "#c2255c", "#495057")
DASHES = ("-", (0, (5, 2)), (0, (1.2, 1.6)))
MARKERS = "osD^vPX<>phd8H*"


def lines(
  path: str | os.PathLike,
  series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
  xlabel: str,
  ylabel: str,
  title: str,
  xlog2: bool = True,
  bands: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
  y_limit: tuple[float, float] | None = None,
) -> None:
  """Writes a PNG with one line for each of `series`, {label: (xs, ys)}, and the legend beside it.

  `bands` are {label: (lows, highs)} around lines of the same label. With `xlog2` the axis is logarithmic and
  labelled with the xs themselves. Values outside `y_limit` are marked at the edge by arrows of the line's
  colour. A NaN or None in ys breaks the line.
  """
  import matplotlib
  from matplotlib.figure import Figure

  with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 10}):
    figure = Figure(figsize=(9.6, 5.4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for i, (label, (xs, ys)) in enumerate(series.items()):
      ys = [math.nan if y is None else y for y in ys]
      colour, dash = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]
      axes.plot(
        xs, ys, color=colour, linestyle=dash, linewidth=1.7, label=label,
        marker=MARKERS[i % len(MARKERS)], markersize=7, markeredgecolor="white", markeredgewidth=0.5,
      )  # fmt: skip
      if bands and label in bands:
        axes.fill_between(xs, *bands[label], color=colour, alpha=0.14, linewidth=0)
      if y_limit is not None:
        _mark_outside(axes, xs, ys, y_limit, colour)
    if y_limit is not None:
      axes.set_ylim(*y_limit)
    if xlog2:
      _label_powers(axes, sorted({x for xs, _ in series.values() for x in xs}))
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.grid(color="#e3e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, handlelength=3.2, labelspacing=0.6)
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})  # no version of matplotlib in the bytes
  files.write_bytes(path, image.getvalue())


def _label_powers(axes, xs: list[float]) -> None:
  axes.set_xscale("log", base=2)
  axes.set_xticks(xs, [f"{x:g}" if x < 1e6 else f"{x:.3g}" for x in xs])
  axes.minorticks_off()


def _mark_outside(axes, xs, ys, y_limit: tuple[float, float], colour: str) -> None:
  low, high = y_limit
  for edge, marker, outside in ((high, "^", lambda y: y > high), (low, "v", lambda y: y < low)):
    at = [x for x, y in zip(xs, ys, strict=True) if outside(y)]
    if at:  # an empty unclipped line would stretch the layout to the origin
      axes.plot(at, [edge] * len(at), marker, color=colour, markersize=8, clip_on=False, zorder=5)
