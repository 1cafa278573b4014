"""The component table of `pytest --components`, from the tests themselves: what each passed test exercised and measured.

A component is a name of one of the package's tables, or a feature of ModelConfig.  A test exercises those that its parameters
hold (a name, a value, or a key of one of its module's tables), those of its mark `component`, and those it measures.
"""

import dataclasses
import inspect
import math
import re
import textwrap
from collections import defaultdict
from pathlib import Path

import pytest
import tables

from jaxllm.activation import ACTIVATIONS
from jaxllm.config import _KINDS, ModelConfig
from jaxllm.experts import ROUTERS
from jaxllm.nn.attention import Attention
from jaxllm.nn.context import Context
from jaxllm.nn.store import Quantized
from jaxllm.norm import NORMS, BatchNorm, QkNorm
from jaxllm.ops.head import Head, shrink_gradient, soft_cap
from jaxllm.position import POSITIONS
from jaxllm.position.tables import Float32Table
from jaxllm.sampling import SAMPLERS
from jaxllm.wiring import WIRINGS, Pre

ROOT = Path(__file__).parents[1]
HEADER = ("component", "file", "source", "golden error", "tests")
EXERCISED, MEASURED = "components exercised", "component measured"

# name: what defines it, what its docstring calls it where it has several sources, whether a config has it on
FEATURES = {
  "attention_softcap": (soft_cap, "", lambda cfg: cfg.attention_softcap is not None),
  "logit_softcap": (soft_cap, "", lambda cfg: cfg.logit_softcap is not None),
  "attention_sinks": (Attention, "sinks", lambda cfg: cfg.attention_sinks),
  "clip_qkv": (Attention, "clipping", lambda cfg: cfg.clip_qkv is not None),
  "layer_scaling": (Attention, "layer scaling", lambda cfg: cfg.layer_scaling),
  "attention_scale": (ModelConfig, "attention scale", lambda cfg: cfg.attention_scale is not None),
  "logit_scale": (ModelConfig, "logit scale", lambda cfg: cfg.logit_scale != 1),
  "embed_norm": (ModelConfig, "embedding norm", lambda cfg: cfg.embed_norm),
  "embed_width": (ModelConfig, "embedding width", lambda cfg: cfg.embed_width is not None),
  "branch_scale": (Pre, "branch scale", lambda cfg: getattr(cfg.wiring, "branch_scale", 1) != 1),
  "rope_precision": (Float32Table, "", lambda cfg: cfg.rope_precision != "exact"),
  "norm_head": (Head, "normed head", lambda cfg: cfg.norm_head),
  "embed_gradient": (shrink_gradient, "", lambda cfg: cfg.embed_gradient != 1),
  "prefix": (Context, "prefix", lambda cfg: False),  # an argument of a call
}
QK_NORMS = {f"qk_norm {place}": QkNorm for place in ("before", "after")}
KINDS = (
  *(
    POSITIONS,
    _KINDS["query_scale"],
    NORMS,
    {"batch": BatchNorm},
    WIRINGS,
    ACTIVATIONS,
    _KINDS["mlp"],
    ROUTERS,
  ),
  *(_KINDS["attention"], SAMPLERS),
)
INTEGERS = {"int8": Quantized, "int4": Quantized}
NAMES = {thing: name for kinds in KINDS for name, thing in kinds.items()}
COMPONENTS = {name: (thing, "") for kinds in (*KINDS, QK_NORMS, INTEGERS) for name, thing in kinds.items()}
COMPONENTS |= {name: (thing, topic) for name, (thing, topic, _) in FEATURES.items()}


def named(value):
  """The names of the components that a value is, names or holds."""
  if isinstance(value, str):
    return {value} & COMPONENTS.keys()
  if isinstance(value, (tuple, list)):
    return set().union(*map(named, value))
  if isinstance(value, dict):
    return named(list(value.values()))
  if inspect.isclass(value) or inspect.isfunction(value):
    return {NAMES[value]} if value in NAMES else set()
  if not dataclasses.is_dataclass(value):
    return set()
  found = named([getattr(value, field.name) for field in dataclasses.fields(value)]) | named(type(value))
  if isinstance(value, QkNorm):
    found.add(f"qk_norm {value.place}")
  if isinstance(value, ModelConfig):
    found |= {name for name, (_, _, is_on) in FEATURES.items() if is_on(value)}
  return found


def exercised(item):
  """The components of a test: of its parameters, of the rows they name in tables of its module, and of its marks."""
  found = set()
  if item.module.__name__ == "test_components":  # which names all of them, and tries none
    return found
  for mark in item.iter_markers("component"):
    assert set(mark.args) <= COMPONENTS.keys(), f"{item.nodeid}: no component {mark.args}"
    found |= set(mark.args)
  tables = [x for name, x in vars(item.module).items() if isinstance(x, dict) and not name.startswith("_")]
  for value in item.callspec.params.values() if hasattr(item, "callspec") else ():
    found |= named(value)
    if isinstance(value, str):
      found |= named([table[value] for table in tables if value in table])
  return found


def measured(what, source, error):
  """Record for the running test the error of a component, or of all that a value holds, against a source other than jaxllm.

  Called where the error is known to be within its bound, so that what a sabotaged package measures is not recorded.
  """
  names, error = named(what), float(error)
  assert names and math.isfinite(error), (what, source, error)
  for name in sorted(names):
    tables.record(MEASURED, [name, source, error])


def measured_close(what, source, found, expected, rtol=0.0, atol=0.0):
  """np.testing.assert_allclose, its error measured: relative to the largest number, or to each where rtol alone is given."""
  import numpy as np

  found, expected = (np.asarray(x, np.float64) for x in (found, expected))
  np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol)
  error, size = np.abs(found - expected), np.abs(expected)
  measured(
    what, source, np.max(error) / np.max(size) if atol else np.max(error / np.where(error == 0, 1, size))
  )


def file(name):
  """Where the component is defined, from the root of the repository."""
  return Path(inspect.getsourcefile(COMPONENTS[name][0])).relative_to(ROOT).as_posix()


def source(name):
  """The first clause after `Source:` (or `Source of the <topic>:`) in the component's docstring; "" where there is none."""
  thing, topic = COMPONENTS[name]
  heading = f"Source of the {topic}: " if topic else "Source: "
  _, _, text = " ".join((thing.__doc__ or "").split()).partition(heading)
  text = re.split(r";| \((?!\d{4})|(?<!al)\.(?=\s|$)", text)[0]
  return textwrap.shorten(re.sub(r"(\(\d{4}\)).*", r"\1", text), 44, placeholder=" ...")


class Table(tables.Plugin):
  """The plugin: a row a component."""

  title = "components"

  def __init__(self, path=""):
    super().__init__(path)
    self.passed, self.errors = defaultdict(int), defaultdict(dict)

  def begin(self, item):
    item.user_properties.append((EXERCISED, sorted(exercised(item))))

  def add(self, properties):
    names = set()
    for key, value in properties:
      if key == EXERCISED:
        names |= set(value)
      elif key == MEASURED:
        name, against, error = value
        names.add(name)
        self.errors[name][against] = max(error, self.errors[name].get(against, 0.0))
    for name in names:
      self.passed[name] += 1

  def error(self, name):
    """The largest error against each source, float64 models last."""
    by_source = sorted(self.errors[name].items(), key=lambda pair: pair[0] == "float64")
    return ", ".join(
      f"{error:.1e} vs {against}" if error else f"0 vs {against}" for against, error in by_source
    )

  def rows(self):
    """One a component, as HEADER has it."""
    return [
      (name, file(name), source(name) or "-", self.error(name) or "-", str(self.passed[name] or "-"))
      for name in COMPONENTS
    ]

  def missing(self):
    """Components that no test passed with, or that nothing was measured of."""
    return [row[0] for row in self.rows() if "-" in row[2:]]

  def text(self):
    return tables.aligned([HEADER, *self.rows()])

  def markdown(self):
    return tables.markdown(HEADER, self.rows(), left=4)

  def pytest_sessionfinish(self, session, exitstatus):
    if is_whole(session.config) and self.missing() and exitstatus == pytest.ExitCode.OK:
      session.exitstatus = pytest.ExitCode.TESTS_FAILED

  def pytest_terminal_summary(self, terminalreporter, config):
    super().pytest_terminal_summary(terminalreporter)
    if is_whole(config) and self.missing():
      terminalreporter.write_line(f"without a passed test or a measured error: {', '.join(self.missing())}")


def is_whole(config):
  """Whether all tests that run by default were asked for: no path below tests, no selection, no early end."""
  option = config.option
  paths = {(config.invocation_params.dir / arg.split("::")[0]).resolve() for arg in config.args}
  selected = option.keyword or option.deselect or option.ignore or option.ignore_glob or option.maxfail
  selected = selected or getattr(option, "lf", False) or option.collectonly
  return (
    paths <= {ROOT, ROOT / "tests"}
    and not any("::" in arg for arg in config.args)
    and not selected
    and option.markexpr in ("", "not slow")
  )
