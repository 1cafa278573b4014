"""Prints, as JSON, what programs of training send when they are compiled for eight TPU chips, which need not be there."""

import collections
import dataclasses
import json
import re
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from jaxllm import parallel
from jaxllm.config import Layer, ModelConfig
from jaxllm.nn import Transformer
from jaxllm.position import Rope
from jaxllm.train.layout import make_layout
from jaxllm.train.optimizers import AdamW
from jaxllm.train.step import TrainConfig, init_state, make_gradient, make_step

B, T, D, V = 8, 128, 256, 4096
CFG = ModelConfig(V, D, 1, 8, 8, 32, 1024, layers=(Layer(Rope()),), dtype="bfloat16")
CONFIG = TrainConfig(steps=10, batch_size=B, length=T, rule=AdamW())
COLLECTIVE = re.compile(
  r"= (\(.*?\)|\S+) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)


def sent(text):
  """{"name shape": count}; a fusion there of an all-reduce and each device's part of it is a reduce-scatter."""
  found, inside, channels = collections.Counter(), "", set()
  for line in text.splitlines():
    if not line.startswith(" "):
      inside = line.removeprefix("%")
    if match := COLLECTIVE.search(line):
      channel = re.search(r"channel_id=(\d+)", line)[1]
      if channel in channels:  # the steps of a fusion that goes on meanwhile show one several times
        continue
      channels.add(channel)
      name = "reduce-scatter" if inside.startswith("all-reduce-scatter") else match[2]
      shapes = re.findall(r"\[([\d,]*)\]", match[1])
      if match[3] and name == "all-gather":
        shapes = shapes[len(shapes) // 2 :]
      found[f"{name} {' '.join(shapes)}"] += 1
  return found


def compiled(rules, axes, layers, chips, whole):
  """What the gradient sends, or the step."""
  model = Transformer(dataclasses.replace(CFG, num_layers=layers))
  mesh, rules = parallel.make_mesh(axes, chips), parallel.RULES[rules]
  with jax.set_mesh(mesh):
    state = jax.eval_shape(lambda: init_state(model, CONFIG, 0))
    state = make_layout(model.cfg, mesh, rules).state(state)
    rows = jax.sharding.NamedSharding(mesh, jax.P(tuple(axis for axis in mesh.shape if axis != "tensor")))
    ids = jax.ShapeDtypeStruct((B, T + 1), jnp.int32, sharding=rows)
    if whole:
      program = make_step(model, CONFIG, mesh, rules).lower(state, ids)
    else:
      program = jax.jit(make_gradient(model, CONFIG, mesh, rules)).lower(state["params"], ids)
    return sent(program.compile().as_text())


if __name__ == "__main__":
  chips = topologies.get_topology_desc(
    platform="tpu",
    topology_name="v5e:2x4",
    chip_config_name="default",
    chips_per_host_bounds=(2, 2, 1),
    num_slices=1,
  ).devices
  rows = [row.split(":") for row in sys.argv[1:]]
  print(
    json.dumps(
      [compiled(rules, axes, int(layers), chips, kind == "step") for kind, rules, axes, layers in rows]
    )
  )
