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
FEW = 20
"""Labels that a legend has room for at full size."""


Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""{label: (xs, ys)}; as bands, {label: (lows, highs)} around the line of the same label."""


def lines(
  path: str | os.PathLike,
  panels: Mapping[str, tuple[Series, Series]],
  xlabel: str,
  ylabel: str,
  title: str,
  xlog2: bool = True,
  ylog: bool = False,
  one_scale: bool = True,
) -> None:
  """Writes a PNG with a panel for each of `panels`, {name: (lines, bands)}, side by side, on one scale or each on its own.

  A label has one colour and marker in all panels, and one legend beside them. With `xlog2` the axis is
  logarithmic and labelled with the xs themselves, with `ylog` the other one, too. A NaN or None in ys breaks the line, and the
  band of a single point is a bar.
  """
  import matplotlib
  from matplotlib.figure import Figure

  labels = list(dict.fromkeys(label for series, _ in panels.values() for label in series))
  with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 10}):
    figure = Figure(figsize=(3.6 + 4.2 * max(1, len(panels)), 5.4), dpi=100, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    grid = figure.subplots(1, max(1, len(panels)), sharey=one_scale, squeeze=False)[0]
    for axes, (name, (series, bands)) in zip(grid, panels.items(), strict=False):
      for label, (xs, ys) in series.items():
        i = labels.index(label)
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]
        axes.plot(
          xs, [math.nan if y is None else y for y in ys], color=colour, linestyle=dash, linewidth=1.7, label=label,
          marker=MARKERS[i % len(MARKERS)], markersize=7, markeredgecolor="white", markeredgewidth=0.5,
        )  # fmt: skip
        if label in bands and len(xs) == 1:
          axes.vlines(xs, *bands[label], color=colour, linewidth=1.7)
        elif label in bands:
          axes.fill_between(xs, *bands[label], color=colour, alpha=0.14, linewidth=0)
      if xlog2:
        _label_powers(axes, sorted({x for xs, _ in series.values() for x in xs}))
      if ylog:
        axes.set_yscale("log")
      axes.set_title(name, fontsize=10)
      axes.set_xlabel(xlabel)
      axes.grid(color="#e3e6ea", linewidth=0.8)
      axes.set_axisbelow(True)
      axes.spines[["top", "right"]].set_visible(False)
    grid[0].set_ylabel(ylabel)
    handles = {t: h for axes in grid for h, t in zip(*axes.get_legend_handles_labels(), strict=True)}
    shown = [label for label in labels if label in handles]
    figure.legend(
      [handles[t] for t in shown],
      shown,
      loc="outside right upper",
      frameon=False,
      handlelength=3.2,
      labelspacing=0.6 if len(shown) <= FEW else 0.3,
      fontsize=10 if len(shown) <= FEW else 8,
    )
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})  # no version of matplotlib in the bytes
  files.write_bytes(path, image.getvalue())


def _label_powers(axes, xs: list[float]) -> None:
  axes.set_xscale("log", base=2)
  axes.set_xticks(xs, [f"{x:g}" if x < 1e6 else f"{x:.3g}" for x in xs])
  axes.minorticks_off()
