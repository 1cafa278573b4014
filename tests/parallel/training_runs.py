"""Runs of the training step on a mesh or one device: what is computed, where it lies, and what is sent."""

import dataclasses
import functools
import math

import jax
import numpy as np
from mesh_cases import CASES
from mesh_checks import B, T, make_mesh

from jaxllm import parallel
from jaxllm.nn import Transformer
from jaxllm.train import lora
from jaxllm.train.optimizers import AdamW
from jaxllm.train.step import TrainConfig, init_state, make_gradient, make_step

SETS = (
  ("data", "data=8"),
  ("zero1", "fsdp=8"),
  ("zero2", "fsdp=8"),
  ("fsdp", "fsdp=8"),
  ("tensor", "data=2,tensor=4"),
  ("sequence", "data=2,tensor=4"),
  ("fsdp_tensor", "fsdp=2,tensor=4"),
)
"""Every rule set, on eight devices."""

STEPS = 20
CONFIG = TrainConfig(steps=STEPS, batch_size=B, length=T, warmup=0.1, rule=AdamW(eps=1e-3))
"""With AdamW's own eps the direction of a gradient that is 0 but for rounding is that of the rounding."""
CFG = dataclasses.replace(CASES["odd llama"], num_layers=1)
"""Key heads and a vocabulary that a tensor axis of four does not divide."""


def shard_bytes(structs):
  """Bytes of arrays, abstract ones too, on one device."""
  leaves = jax.tree.leaves(structs)
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize for x in leaves)


def as_columns(counts):
  """Counts of collectives by name, as the table has them."""
  names = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")
  return {name: counts.get(name, 0) for name in names} | {"permute": counts.get("collective-permute", 0)}


def batch(step):
  """Random tokens [B, T + 1]."""
  return np.random.default_rng(step).integers(0, CFG.vocab_size, (B, T + 1), np.int32)


@dataclasses.dataclass(frozen=True)
class Run:
  """Of a run: its first state, the gradient of the first batch, the losses of all steps, and the last state.

  step, gradient: the compiled programs.
  """

  start: dict
  loss: jax.Array
  grads: dict
  losses: list
  state: dict
  step: jax.stages.Compiled
  gradient: jax.stages.Compiled


@functools.cache
def run(rules=None, axes=None, cfg=CFG, config=CONFIG, rank=0, steps=STEPS):
  """A run from random weights, by rules on the mesh of `axes`, or on one device; rank: that of LoRA, where it has some."""
  model, given = Transformer(cfg), None
  mesh = None if axes is None else make_mesh(axes)
  rules = None if rules is None else parallel.RULES[rules]
  if rank:
    given = init_state(model, config, 0)["params"]
    given = lora.apply(given, rank=rank, alpha=rank, key=jax.random.key(1))
  place = np.asarray if mesh is None else functools.partial(parallel.shard_batch, mesh=mesh)
  with jax.set_mesh(mesh or make_mesh("data=1")):
    state = init_state(model, config, 0, given, mesh, rules)
    start = jax.tree.map(np.asarray, state)
    program = jax.jit(make_gradient(model, config, mesh, rules))
    gradient = program.lower(state["params"], place(batch(0))).compile()
    loss, grads = gradient(state["params"], place(batch(0)))
    # as it is compiled for this layout, it would not take a state with another one
    step = make_step(model, config, mesh, rules).lower(state, place(batch(0))).compile()
    losses = []
    for i in range(steps):
      state, value = step(state, place(batch(i)))
      losses.append(float(value))
  return Run(start, loss, grads, losses, state, step, gradient)
