"""What a run leaves at its end: results, a figure, and the model."""

from __future__ import annotations

import math
from pathlib import Path

import jax

from experiments.training.settings import Settings
from experiments.training.setup import Setup
from jaxllm import hf, parallel, tree
from jaxllm.errors import ConfigError
from jaxllm.parallel import multihost
from jaxllm.study import files, plots, rows
from jaxllm.train import lora

COLUMNS = ("model", "objective", "steps", "metric", "value", "seed", "status", "reason")


def write(s: Settings, setup: Setup, out: Path, watch, state, first: bool) -> int:
  """Results, figure and model; prints where they are; 1 where a result is no number."""
  held = watch.evaluate(state["params"])
  found = {"held_out_loss": held["loss"], "perplexity": _exp(held["loss"])}
  if s.objective == "causal" and s.model is None and not (s.text or "").endswith(".bin"):  # a token is a byte
    found["bits_per_byte"] = held["loss"] / math.log(2)
  losses = [row for row in watch.rows if row["loss"] is not None]  # of the first process
  if losses:
    found["training_loss"] = losses[-1]["loss"]
  cell = dict(model=s.name, objective=s.objective, steps=s.steps, seed=s.seed)
  table = [rows.ok(cell | {"metric": name}, value) for name, value in found.items()]
  multihost.by_first(lambda: _results(s, out, table, losses), out)
  where, reason = _save(s, setup, out, state)
  if not first:
    return 0
  for name, value in found.items():
    print(f"{name}: {value:.4f}")
  print(f"metrics, results and figure: {out}")
  print(
    f"model: {where}"
    if reason is None
    else f"no model for transformers: {reason}; its checkpoint is in {out}/checkpoints"
  )
  return int(any(row["status"] == "failed" for row in table))


def _results(s: Settings, out: Path, table: list[dict], losses: list[dict]) -> None:
  files.write_results(out, table, COLUMNS)
  _figure(s, out, losses)


def _exp(loss: float) -> float:
  return math.exp(loss) if loss < 700 else math.inf


def _figure(s: Settings, out: Path, losses: list[dict]) -> None:
  held = [row for row in losses if row["held_out_loss"] is not None]
  series = {"training": ([row["step"] for row in losses], [row["loss"] for row in losses])}
  if held:
    series["held out"] = ([row["step"] for row in held], [row["held_out_loss"] for row in held])
  title = f"{s.name}: {s.batch_size} x {s.length} tokens a step"
  plots.lines(out / "loss.png", {"loss": (series, {})}, "step", "nats a label", title, xlog2=False)


def _save(s: Settings, setup: Setup, out: Path, state) -> tuple[Path, str | None]:
  """Writes the model: (where, None), or why there is none.  Factors of LoRA are added to what they are on."""
  params, cfg = state["params"], setup.model.cfg
  if "blocks" in params:
    params = tree.unstack_layers(params)
  if lora.has(params):
    params = lora.merge(params)
  params = parallel.unpad(params, cfg)
  directory = out / "model"
  try:
    hf.save(
      directory,
      cfg,
      jax.device_get(params) if jax.process_count() == 1 else params,
      setup.tokenizer,
      family=setup.family,
    )
  except ConfigError as e:
    return directory, str(e)
  return directory, None
