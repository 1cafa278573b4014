"""The tables of `pytest tests/train tests/flops tests/parallel tests/experiments/test_train_*.py --training`, a row a case.

`-m ""` beside it runs the slow rows too, which have the full counts.  Speed: `python -m experiments.training_speed`.
"""

from pytest import approx
from tables import COUNT, ERROR, MOST, TEXT, Kind, Numbered

SEVEN = (max, ".7g")
KINDS = {
  "scale": Kind(
    1,
    "Loss scales over random overflows, beside the libraries' own",
    "policy",
    {"steps": COUNT, "overflows": COUNT, "differ": COUNT},
  ),
  "precision": Kind(
    2,
    "Mixed precision: numbers beside those of float32, or of the format's definition",
    "what",
    {"compared": COUNT, "differ": COUNT, "largest difference": ERROR},
  ),
  "meshes": Kind(
    3,
    "Eight devices beside one, relative: the loss, its gradient, and 20 steps",
    "rules, mesh",
    {"loss": ERROR, "gradient": ERROR, "20 steps": ERROR},
  ),
  "bytes": Kind(
    4,
    "Bytes of the state on a device, beside the formula of ZeRO",
    "rules, devices",
    {name: MOST for name in ("parameters", "gradients", "optimizer", "formula")},
  ),
  "collectives": Kind(
    5,
    "Collectives of the compiled program",
    "rules, mesh, and what",
    {name: COUNT for name in ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "permute")},
  ),
  "resume": Kind(
    6,
    "Runs that were interrupted beside those that were not",
    "types, parts of a batch",
    {"runs": COUNT, "interruptions": COUNT, "losses": COUNT, "arrays": COUNT, "differ": COUNT},
  ),
  "faults": Kind(
    7,
    "Faults of a run: saved is what was announced as such",
    "fault",
    {"tried": COUNT, "while saving": COUNT, "lost": COUNT, "not noticed": COUNT, "bytes differ": COUNT},
  ),
  "order": Kind(
    8, "Order of the data: every row once an epoch", "property", {"examples": COUNT, "differ": COUNT}
  ),
  "accounting": Kind(
    9, "Published numbers, and those of the formulas", "number", {"found": SEVEN, "published": SEVEN}
  ),
  "topologies": Kind(
    10,
    "Compiled for TPUs that are not there, a chip",
    "model, topology",
    {"GB": (max, ".2f"), "of": (max, ".2f"), "fits": TEXT, "TFLOP": (max, ".4g"), "collectives": COUNT},
  ),
  "bad input": Kind(11, "Bad input", "case", {"error": TEXT, "says": TEXT}),
}


class Table(Numbered):
  """The plugin."""

  title, kinds = "training", KINDS


about, measured, refused = Table.about, Table.measured, Table.refused


def published(number, found, expected, digits=None, **tolerance):
  """A number is the published one, once it has as many digits or within a tolerance of `pytest.approx`; both are recorded."""
  about("accounting", number)
  shown = found if digits is None else round(found, digits)
  assert shown == (approx(expected, **tolerance) if tolerance else expected), (number, found, expected)
  measured("accounting", number, found=found, published=expected)
