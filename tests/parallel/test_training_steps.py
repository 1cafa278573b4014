"""Training by every rule set on eight devices is training on one."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mesh_cases import CASES
from mesh_checks import T, gradient_error, make_mesh, relative_error
from test_collectives import collectives
from training_runs import CFG, CONFIG, SETS, as_columns, batch, run, shard_bytes
from training_table import about, measured

from jaxllm import flops, parallel
from jaxllm.nn import Transformer
from jaxllm.train import lora
from jaxllm.train.layout import make_layout
from jaxllm.train.optimizers import Adafactor, Lion, Muon
from jaxllm.train.precision import POLICIES
from jaxllm.train.step import init_state, make_gradient, make_step

BOUND = 1e-5


def errors(found, truth, cfg=CFG):
  """(of the loss, of its gradient, of the losses and the last weights of all steps), relative."""
  plain = lambda params: lora.trained(parallel.unpad(params, cfg))
  cut = make_layout(cfg, make_mesh("data=8")).unpadded(found.grads, found.state["params"])
  steps = relative_error(found.losses, truth.losses)
  return {
    "loss": relative_error(found.loss, truth.loss),
    "gradient": gradient_error(cut, truth.grads),
    "20 steps": max(steps, gradient_error(plain(found.state["params"]), plain(truth.state["params"]))),
  }


@pytest.mark.parametrize(("rules", "axes"), SETS)
def test_a_run(rules, axes):
  row = f"{rules}, {axes}"
  about("meshes", row)
  found, truth = run(rules, axes), run()
  most = errors(found, truth)
  assert max(most.values()) <= BOUND, most
  assert truth.losses[-1] != truth.losses[0] and len(set(truth.losses)) == len(truth.losses)
  measured("meshes", row, **most)


@pytest.mark.parametrize(("rules", "axes"), SETS)
def test_the_first_state_has_the_same_bits(rules, axes):
  found, truth = run(rules, axes).start, run().start
  cut = parallel.unpad(found["params"], CFG)
  assert jax.tree.all(jax.tree.map(np.array_equal, cut, truth["params"]))
  for other in found.keys() - {"params"}:
    assert not any(np.any(x) for x in jax.tree.leaves(found[other]))


@pytest.mark.parametrize(("rules", "axes"), SETS)
def test_padding_stays_0(rules, axes):
  """And so does what the optimizer has of it."""
  state = jax.tree.map(np.asarray, run(rules, axes).state)
  head = state["params"]["head"]
  assert head.shape == (32, 64 if "tensor" in axes else 61)
  for leaf in jax.tree.leaves(state):
    if leaf.ndim and 64 in leaf.shape and "tensor" in axes:
      assert not np.any(np.take(leaf, range(61, 64), leaf.shape.index(64)))


def held(found):
  """What a run holds, by the names of the formulas."""
  return {"parameters": found.state["params"], "gradients": found.grads, "optimizer": found.state["opt"]}


@pytest.mark.parametrize(("rules", "axes"), SETS)
def test_bytes_that_devices_hold(rules, axes):
  """Of the arrays as they lie, beside those of a layout that is known before, and the formulas of ZeRO."""
  row = f"{rules}, {axes}, float32"
  about("bytes", row)
  found, layout = run(rules, axes), make_layout(CFG, make_mesh(axes), parallel.RULES[rules])
  state = layout.state(found.state)
  planned = {
    "parameters": state["params"],
    "gradients": layout.following(found.grads, found.state["params"], 2),
    "optimizer": state["opt"],
  }
  bytes_of = {name: shard_bytes(part) for name, part in planned.items()}
  for device in range(8):
    on_device = lambda part, d=device: sum(x.addressable_shards[d].data.nbytes for x in jax.tree.leaves(part))
    assert {name: on_device(part) for name, part in held(found).items()} == bytes_of
  scalars = [x for x in jax.tree.leaves(found.state["opt"]) if x.ndim == 0]
  count = sum(x.size for x in jax.tree.leaves(run().start["params"]))
  if "tensor" not in axes:
    formula = flops.states(count, 8, parallel.RULES[rules].stage, "float32")
    assert bytes_of == formula | {"optimizer": formula["optimizer"] + 4 * len(scalars)}
    bytes_of["formula"] = int(sum(formula.values()))
  measured("bytes", row, **bytes_of)


KINDS = {
  "data": {"all-reduce"},
  "zero1": {"all-reduce", "all-gather"},
  "zero2": {"all-reduce", "all-gather"},
  "fsdp": {"all-reduce", "all-gather"},
  "tensor": {"all-reduce"},
  "sequence": {"all-reduce", "all-gather"},
  "fsdp_tensor": {"all-reduce", "all-gather"},
}
"""What each has to send.  XLA for CPUs makes no reduce-scatter, but an all-reduce of which each device takes its part."""


@pytest.mark.parametrize(("rules", "axes"), SETS)
def test_what_a_step_sends(rules, axes):
  row = f"{rules}, {axes}: a step, one layer, CPU"
  about("collectives", row)
  found = collections.Counter(name for name, _ in collectives(run(rules, axes).step.as_text()))
  assert KINDS[rules] <= set(found), found
  if rules == "data":
    assert set(found) == {"all-reduce"}
  measured("collectives", row, **as_columns(found))


ODD = dict(rules="fsdp_tensor", axes="fsdp=2,tensor=4")
OTHERS = {
  "accumulation": (dict(accumulate=2), {}, ODD),
  "accumulation, zero2": (dict(accumulate=2), {}, dict(rules="zero2", axes="data=2,fsdp=2")),
  "lora": ({}, dict(rank=4), ODD),
  "lora, accumulation, zero1": (dict(accumulate=4), dict(rank=4), dict(rules="zero1", axes="fsdp=2")),
  "adafactor": (dict(rule=Adafactor(factored_from=8)), {}, ODD),
  "adafactor, zero1": (dict(rule=Adafactor(factored_from=8)), {}, dict(rules="zero1", axes="fsdp=8")),
  "lion": (dict(rule=Lion()), {}, ODD),
  "muon": (dict(rule=Muon(eps=1e-3)), {}, ODD),
  "muon, zero1": (dict(rule=Muon(eps=1e-3)), {}, dict(rules="zero1", axes="fsdp=8")),
  "remat": (dict(remat="full"), {}, dict(rules="sequence", axes="data=2,tensor=4")),
}
DEFAULT = ("accumulation", "adafactor")


@pytest.mark.parametrize(
  "name", [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in OTHERS]
)
def test_other_runs(name):
  """Three steps; Lion's update is a sign, which rounding decides where a momentum is 0."""
  about("meshes", name)
  fields, kind, mesh = OTHERS[name]
  config = dataclasses.replace(CONFIG, **fields)
  steps = 1 if name == "lion" else 3
  most = errors(run(**mesh, config=config, steps=steps, **kind), run(config=config, steps=steps, **kind))
  bound = {"lion": 1e-4}.get(name, BOUND)
  assert max(most.values()) <= bound, most
  measured("meshes", name, **{kind: error for kind, error in most.items() if kind != "20 steps"})


MODELS = ("gemma2", "gpt_oss", "qwen3_moe", "every other parameter", "opt", "gpt_neox", "olmo2")


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("rules", "axes"), [SETS[2], SETS[3], SETS[5], SETS[6]])
def test_other_models(name, rules, axes):
  cfg = CASES[name]
  config = dataclasses.replace(CONFIG, length=T)
  most = errors(run(rules, axes, cfg, config, steps=3), run(cfg=cfg, config=config, steps=3), cfg)
  assert max(most.values()) <= BOUND, most


@pytest.mark.parametrize(
  ("rules", "axes"), [("fsdp", "fsdp=8"), *(pytest.param(*row, marks=pytest.mark.slow) for row in SETS[4:])]
)
def test_overflow_of_one_part_skips_the_step_everywhere(rules, axes):
  """A loss scale at which the largest numbers of a gradient, that lie on few devices, are too large for 16 bits."""
  model, mesh, rules = Transformer(CFG), make_mesh(axes), parallel.RULES[rules]
  whole = max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(run().grads))
  policy = POLICIES["O2"]
  scale = dataclasses.replace(policy.loss_scale, initial=65504 * 1.1 / whole)
  config = dataclasses.replace(CONFIG, precision=dataclasses.replace(policy, loss_scale=scale))
  with jax.set_mesh(mesh):
    state = init_state(model, config, 0, mesh=mesh, rules=rules)
    ids = parallel.shard_batch(batch(0), mesh)
    _, grads = jax.jit(make_gradient(model, config, mesh, rules))(state["params"], ids, scale.init()["scale"])
    parts = [shard.data for g in jax.tree.leaves(grads) for shard in g.addressable_shards]
    infinite = {shard.device for shard in parts if not np.all(np.isfinite(shard))}
    old = jax.tree.map(np.asarray, state)
    state, _ = make_step(model, config, mesh, rules)(state, ids)
  assert 0 < len(infinite) < 8, infinite
  for name in ("params", "opt", "master"):
    assert jax.tree.all(jax.tree.map(np.array_equal, state[name], old[name])), name
    for leaf in jax.tree.leaves(state[name]):
      copies = {}
      for shard in leaf.addressable_shards:
        copies.setdefault(str(shard.index), []).append(np.asarray(shard.data))
      assert all(np.array_equal(first, x) for first, *rest in copies.values() for x in rest)
  assert (
    state["loss_scale"]["scale"] == np.float32(scale.initial) / 2 and int(state["loss_scale"]["skipped"]) == 1
  )
