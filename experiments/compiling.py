"""The step of a training run, and the tokens of decoding, compiled for a mesh of devices that may not exist: what they need.

Nothing is made but shapes: a model of any size takes a few megabytes here.
"""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from experiments.step_cost import count_of
from jaxllm import flops, parallel, quant, tree
from jaxllm.config import ModelConfig
from jaxllm.flops.collectives import totals
from jaxllm.flops.compiled import Compiled, compiled
from jaxllm.generate import loop, request
from jaxllm.nn import STORES, Transformer
from jaxllm.nn.shapes import expected_shapes
from jaxllm.ops.constrain import activation_spec
from jaxllm.parallel import topology
from jaxllm.sampling import Greedy
from jaxllm.study import files
from jaxllm.study.report import Table
from jaxllm.study.rows import not_applicable, ok
from jaxllm.train.layout import make_layout
from jaxllm.train.step import TrainConfig, init_state, make_step

COLUMNS = ("model", "job", "topology", "mesh", "rules", "quantity", "unit", "value", "status", "reason")


@dataclasses.dataclass(frozen=True)
class Target:
  """What is compiled for: a mesh, what its devices are, their topology's name if they are not at hand, the bytes that one may
  hold and its FLOP/s, None where unknown.
  """

  mesh: Mesh
  what: str
  topology: str = ""
  memory: float | None = None
  peak: float | None = None


def target(mesh: str, topology_name: str | None = None) -> Target:
  """The devices of a topology, "v5e:4x4", as a mesh; without one, those that this process has.

  Raises ConfigError as `topology.devices` and `make_mesh` do.
  """
  if topology_name is None:
    here = parallel.make_mesh(mesh)
    return Target(here, f"{here.size} {here.devices.flat[0].device_kind}")
  devices = topology.devices(topology_name)
  generation, _ = topology.parse(topology_name)
  chip = flops.DEVICES[generation.chip]
  return Target(
    parallel.make_mesh(mesh, devices),
    f"{len(devices)} devices of {topology_name}, {devices[0].device_kind}",
    topology_name,
    generation.memory * 2**30,
    chip.flops / generation.cores,
  )


@dataclasses.dataclass(frozen=True)
class Report:
  """What compiling has told.  formula: FLOPs of the products, of all devices, by `jaxllm.flops`; tokens: those of a call."""

  title: str
  target: Target
  rules: str
  program: Compiled
  formula: float
  tokens: int

  @property
  def fits(self) -> bool | None:
    """Whether each device has the memory; None where that is not known (`Compiled.fits`)."""
    return self.program.fits(self.target.memory)

  def rows(self) -> list[dict[str, Any]]:
    """A quantity a row: name, unit, and a value or the reason why there is none."""
    one, devices = self.program, self.target.mesh.size
    found = [
      ("arguments", "B/device", one.arguments),
      ("outputs", "B/device", one.outputs),
      ("aliased", "B/device", one.aliased),
      ("temporaries", "B/device", one.temporaries),
    ]
    found = [
      (name, unit, None if one.refused and name != "arguments" else size) for name, unit, size in found
    ]
    found += [("needed", "B/device", one.needed), ("memory", "B/device", self.target.memory)]
    found += [("fits", "", None if self.fits is None else int(self.fits))]
    found += [("FLOPs by formula", "FLOP/device", self.formula / devices)]
    found += [("FLOPs of the program's products", "FLOP/device", one.products and one.products / devices)]
    found += [("FLOPs by XLA, loops once", "FLOP/device", one.flops)]
    if self.target.peak is not None:
      found += [("time at peak FLOP/s", "s", self.formula / devices / self.target.peak)]
    found += [("tokens", "", self.tokens), ("compile time", "s", one.seconds)]
    for kind, total in totals(list(one.collectives)).items():
      found += [(f"{kind}, number", "", total.count), (f"{kind}, results", "B/device", total.bytes)]
    reason = one.refused or "the compiler does not say"
    reasons = {
      "fits": one.refused or self._doubt(),
      "memory": "the memory of a device is not known",
      "FLOPs of the program's products": "some are in branches, so that their number is not in the text",
    }
    cells = [(dict(quantity=name, unit=unit), value) for name, unit, value in found]
    return [
      not_applicable(cell, reasons.get(cell["quantity"], reason)) if value is None else ok(cell, value)
      for cell, value in cells
    ]

  def _doubt(self) -> str:
    """Why it is not known whether it fits."""
    if self.target.memory is None:
      return "the memory of a device is not known"
    return "not certain to fit: the compiler takes it, but what it sets aside is more than the memory"

  def tables(self) -> dict[str, Table]:
    """Tables by title: quantities, and the largest collectives with what they are of."""
    lines = tuple((row["quantity"], _written(row["value"], row["unit"])) for row in self.rows())
    verdict = {True: "fits", False: f"does not fit: {self.program.refused}", None: self._doubt()}[self.fits]
    shown = {f"{self.title}; {self.target.what}": Table(("quantity", "value"), lines, 1, (verdict,))}
    alike = collections.Counter()
    for one in self.program.collectives:
      alike[dataclasses.replace(one, count=1, once=False)] += one.count
    body = tuple(
      (
        one.kind,
        " ".join(f"{dtype}{list(shape)}" for dtype, shape in one.arrays[:2]),
        *(f"{count:,}", f"{count * one.bytes / 1e9:,.3g}", one.source[-70:]),
      )
      for one, count in sorted(alike.items(), key=lambda item: -item[1] * item[0].bytes)[:12]
    )
    if body:
      shown["The largest collectives"] = Table(("kind", "result", "times", "GB", "of"), body, 2, ())
    return shown

  def write(self, out: Path, model: str, job: str) -> None:
    """Print the tables, and write them to the directory: report.md, results.jsonl and results.csv."""
    shown = self.tables()
    for title, table in shown.items():
      table.show(title)
    body = "\n".join(f"## {title}\n\n{table.markdown()}" for title, table in shown.items())
    mesh = parallel.spell(self.target.mesh)
    said = dict(model=model, job=job, topology=self.target.topology, mesh=mesh, rules=self.rules)
    with files.Lock(out):
      files.write_results(out, [said | row for row in self.rows()], COLUMNS)
      files.write_text(out / "report.md", f"# {model}, {job}\n\n{body}")
    print(f"report and results: {out}")


def report_training(
  cfg: ModelConfig,
  config: TrainConfig,
  rules: str,
  on: Target,
  *,
  scan: bool = True,
  params: Any = None,
) -> Report:
  """The optimizer step that `train.step.make_step` makes, on tokens [batch_size, length + 1].

  scan: layers as one compiled body.  params: what training begins with, as `abstract_state` has it.
  """
  model, mesh = Transformer(cfg, scan=scan), on.mesh
  with jax.set_mesh(mesh):
    state = abstract_state(model, config, mesh, parallel.RULES[rules], params)
    tokens = _laid_out(jax.ShapeDtypeStruct((config.batch_size, config.length + 1), jnp.int32), "B-", mesh)
    program = compiled(make_step(model, config, mesh, parallel.RULES[rules]), state, tokens)
  count = count_of(cfg, config, parallel.batch_shards(mesh), params)
  tokens = config.batch_size * config.length
  how = f"{parallel.spell(mesh)}, {rules}, remat {config.remat}"
  title = f"training step, batch {config.batch_size} of {config.length:,}, {how}"
  return Report(title, on, rules, program, count.hardware * tokens, tokens)


def report_decoding(
  cfg: ModelConfig,
  scheme: Any,
  rules: str,
  on: Target,
  *,
  batch: int,
  length: int,
  store: str = "full",
) -> Report:
  """A token of `batch` rows by the program that `generate` draws with, from a cache for `length` tokens a row.

  scheme: of `quant.SCHEMES`, or None for weights as cfg.dtype has them.
  """
  model, mesh, sampler = Transformer(cfg), on.mesh, Greedy()
  with jax.set_mesh(mesh):
    params = tree.unflatten({p: jax.ShapeDtypeStruct(s, cfg.dtype) for p, s in expected_shapes(cfg).items()})
    params = params if scheme is None else quant.apply(params, scheme)
    params = parallel.layout(params, mesh, parallel.RULES[rules], cfg)
    settings = loop.Settings(model, length, min(loop.PART, length), STORES[store])
    tables, stop = cfg.rope_tables(max_len=length), np.zeros(cfg.vocab_size, bool)
    prompts = request.Prompts(
      *(np.zeros(shape, np.int32) for shape in ((batch, settings.part), (batch,))), stop
    )
    read = lambda *args: loop.prefill(settings, *args, sampler, prompts, request.Own(), None, None)
    state, _ = jax.eval_shape(read, params, tables)
    state = _state_on(state, mesh)
    tables, stop, limit = _whole((tables, stop, np.int32(length)), mesh)
    chunk = 32  # as `generate` has it: a loop of unknown length, as rows may end
    program = compiled(loop.decode, settings, params, tables, sampler, stop, None, limit, state, chunk)
  parts = flops.forward(cfg, 1)
  parts["attention"] *= length  # it reads all slots, used or not
  title = f"a token of {batch} rows, cache {store} of {length:,}, {parallel.spell(mesh)}, {rules}"
  # no time at peak FLOP/s: what takes time is to read the weights and the cache
  return Report(title, dataclasses.replace(on, peak=None), rules, program, batch * sum(parts.values()), batch)


def abstract_state(
  model: Transformer,
  config: TrainConfig,
  mesh: Mesh,
  rules: parallel.RuleSet,
  params: Any = None,
) -> Any:
  """The state of `init_state` on a mesh as jax.ShapeDtypeStructs, as `train.layout` lays it out.

  params: structs of those that training begins with; None: random ones.
  """
  layout = make_layout(
    model.cfg, mesh, rules, rows=config.batch_size // config.accumulate, length=config.length
  )
  begin = lambda params: init_state(model, config, 0, params)
  return layout.state(jax.eval_shape(begin, params))  # and no array: on such devices none can be


def _state_on(state: loop.State, mesh: Mesh) -> loop.State:
  """What decoding carries, where `nn.cache` lays it: rows over the batch's axes, heads over tensor."""
  letters = {4: "BKSH", 2: "BS", 1: "B", 0: ""}
  return jax.tree.map(lambda x: _laid_out(x, letters[x.ndim], mesh), state)


def _whole(values: Any, mesh: Mesh) -> Any:
  """Shapes of arrays that every device has whole."""
  return jax.tree.map(
    lambda x: _laid_out(jax.ShapeDtypeStruct(np.shape(x), x.dtype), "-" * x.ndim, mesh), values
  )


def _laid_out(x: jax.ShapeDtypeStruct, letters: str, mesh: Mesh) -> jax.ShapeDtypeStruct:
  spec = activation_spec(x.shape, letters, mesh.shape)
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))


def _written(value: Any, unit: str) -> str:
  if value is None:
    return "-"
  if unit == "B/device":
    return f"{value / 1e9:,.4g} GB"
  return f"{value:,.4g} {unit}".strip()
