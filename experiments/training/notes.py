"""What is said before a run begins: where it lies, and what its user may not expect of what it leaves."""

from __future__ import annotations

import math

import jax

from experiments.compiling import abstract_state
from experiments.training.begin import QLORA, shapes_of, unquantized
from experiments.training.settings import Settings
from experiments.training.setup import Setup
from jaxllm import hf, parallel
from jaxllm.errors import ConfigError


def notes(s: Settings, setup: Setup) -> list[str]:
  """One line each."""
  return [*_layout(s, setup), *_quantized(s, setup), *_model(s, setup)]


def _layout(s: Settings, setup: Setup) -> list[str]:
  if setup.mesh is None:
    return []
  params, rules = shapes_of(s, setup.model.cfg), parallel.RULES[setup.rules]
  with jax.set_mesh(setup.mesh):
    state = abstract_state(setup.model, setup.config, setup.mesh, rules, params)
  sizes = [math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state)]
  return [
    f"mesh {parallel.spell(setup.mesh)}, rules {setup.rules}: parameters and the optimizer's state take "
    f"{sum(sizes) / 1e9:.4g} GB of each device"
  ]


def _quantized(s: Settings, setup: Setup) -> list[str]:
  left = unquantized(s, setup.model.cfg)
  if not left:
    return []
  more = "" if len(left) == 1 else f" and {len(left) - 1} more"
  return [
    f"not quantized: {left[0]}{more}, whose inputs blocks of {QLORA.block} do not divide; they get LoRA as they are"
  ]


def _model(s: Settings, setup: Setup) -> list[str]:
  said = []
  try:
    hf.families.write_config(setup.model.cfg, family=setup.family)
  except ConfigError as e:
    other = (
      "; --position=rope has one" if s.model is None and s.shape is None and s.position != "rope" else ""
    )
    return [
      f"no model for transformers will be written: {e}{other}; the parameters are in {s.out}/checkpoints"
    ]
  if s.objective != "causal":
    said.append(
      "the model will be written as one with a causal mask, as transformers has no prefix that sees itself: read there it "
      "gives other numbers on the prefix"
    )
  if setup.tokenizer is None:
    said.append(
      f"the model will be written without a tokenizer: the header of {s.text} names no directory of one; give --tokenizer=DIR"
    )
  return said
