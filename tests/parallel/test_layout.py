"""Layouts of training's state before there is one: the formulas of ZeRO exactly, what stays whole, and what cannot be."""

import dataclasses
import math
import re

import jax
import pytest
from mesh_cases import CASES
from mesh_checks import make_mesh
from training_runs import CFG, CONFIG, shard_bytes
from training_table import about, measured, refused

from jaxllm import flops, parallel
from jaxllm.errors import ConfigError
from jaxllm.nn import Transformer
from jaxllm.train import lora
from jaxllm.train.layout import make_layout
from jaxllm.train.optimizers import Adafactor
from jaxllm.train.precision import POLICIES, Policy
from jaxllm.train.step import init_state, make_gradient, make_step

PRECISIONS = {
  "float32": POLICIES["model"],
  "megatron": Policy(((r".+", "bfloat16"),), compute="bfloat16"),
}
"""By their names in `flops.PRECISIONS`: gradients are float32 in both, as their sums over microbatches are."""


def abstract_state(cfg, config=CONFIG):
  return jax.eval_shape(lambda: init_state(Transformer(cfg), config, 0))


def planned(cfg, rules, axes, config=CONFIG):
  """The state as it lies, and the gradients."""
  layout, state = make_layout(cfg, make_mesh(axes), parallel.RULES[rules]), abstract_state(cfg, config)
  grads = jax.eval_shape(config.precision.wide, state["params"])
  return layout.state(state), layout.following(grads, state["params"], 2)


def array_bytes(structs):
  return shard_bytes([x for x in jax.tree.leaves(structs) if x.ndim])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rules", ["data", "zero1", "zero2", "fsdp"])
def test_bytes_are_those_of_the_formulas(rules, precision):
  """Of all arrays; beside them the optimizer has the numbers of its steps."""
  config = dataclasses.replace(CONFIG, precision=PRECISIONS[precision])
  count = sum(math.prod(x.shape) for x in jax.tree.leaves(abstract_state(CFG)["params"]))
  for n in (1, 2, 4, 8):
    row = f"{rules}, {n} devices, {precision}"
    about("bytes", row)
    state, grads = planned(CFG, rules, f"{'data' if rules == 'data' else 'fsdp'}={n}", config)
    optimizer = [state["opt"], state.get("master")]
    found = {
      name: array_bytes(part)
      for name, part in (("parameters", state["params"]), ("gradients", grads), ("optimizer", optimizer))
    }
    formula = flops.states(count, n, parallel.RULES[rules].stage, precision)
    assert found == formula
    assert shard_bytes(optimizer) - found["optimizer"] == 4 * 2  # of AdamW's steps, and of the schedule's
    measured("bytes", row, **found, formula=int(sum(formula.values())))


@pytest.mark.parametrize("name", CASES)
def test_what_no_size_divides_stays_whole(name):
  """And it is counted: all else is an eighth, and of all sets the parameters lie as their rules say, or are divided further."""
  cfg = CASES[name]
  state, grads = planned(cfg, "fsdp", "fsdp=8")
  for part in (state["params"], grads, state["opt"]):
    for x in jax.tree.leaves(part):
      divisible = any(size % 8 == 0 for size in x.shape)
      held = math.prod(x.sharding.shard_shape(x.shape))
      assert held == (math.prod(x.shape) // 8 if divisible else math.prod(x.shape)), (x.shape, x.sharding)


def test_of_the_dimensions_that_divide_the_largest_is_divided():
  """As the rest of an array is then in the fewest pieces, and a vocabulary before a width."""
  state, _ = planned(dataclasses.replace(CFG, vocab_size=60), "zero1", "fsdp=4")
  found = {
    (tuple(x.shape), x.sharding.spec.index("fsdp")) for x in jax.tree.leaves(state["opt"]) if x.ndim == 2
  }
  assert {((60, 32), 0), ((32, 60), 1), ((32, 48), 1), ((48, 32), 0), ((32, 128), 1)} <= found
  assert all(at == shape.index(max(shape)) for shape, at in found)


def test_divided_further_where_rules_divide_already():
  """With a tensor axis too: a matrix over both, a vector of the hidden width over both in its one dimension."""
  cfg = dataclasses.replace(CASES["gpt_neox"], num_layers=1)
  state, _ = planned(cfg, "fsdp_tensor", "fsdp=2,tensor=4")
  layer = state["params"]["layers"]["0"]["mlp"]
  assert layer["up"]["w"].sharding.spec == jax.P("fsdp", "tensor")
  assert layer["up"]["bias"].sharding.spec == jax.P(("tensor", "fsdp"))
  assert layer["down"]["bias"].sharding.spec == jax.P("fsdp")


def test_means_of_rows_and_columns_lie_as_what_they_are_means_of():
  config = dataclasses.replace(CONFIG, rule=Adafactor(factored_from=8))
  state, _ = planned(CFG, "tensor", "tensor=4", config)
  flat = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(state["opt"])}
  means = {path: x for path, x in flat.items() if "up" in path}
  row, column = (next(x for path, x in means.items() if name in path) for name in ("v_row", "v_col"))
  sizes = {row.shape: row.sharding.spec, column.shape: column.sharding.spec}
  assert sizes == {(32,): jax.P(), (48,): jax.P("tensor")}
  padded = {x.shape for path, x in flat.items() if "head" in path and x.ndim}
  assert (64,) in padded and (61,) not in padded


def test_the_state_of_lora_is_of_its_factors():
  params = lora.apply(abstract_params(), rank=4, alpha=4, key=jax.random.key(0))
  state = jax.eval_shape(lambda: init_state(Transformer(CFG), CONFIG, 0, params))
  placed = make_layout(CFG, make_mesh("fsdp=2,tensor=4"), parallel.RULES["fsdp_tensor"]).state(state)
  up = placed["params"]["layers"]["0"]["mlp"]["up"]["w"]
  assert (up.a.sharding.spec, up.b.sharding.spec) == (jax.P("fsdp"), jax.P("fsdp", "tensor"))
  moments = [x for x in jax.tree.leaves(placed["opt"]) if x.ndim]
  factors = jax.tree.leaves(lora.adapters(placed["params"]))
  assert sorted(map(repr, moments)) == sorted(2 * list(map(repr, factors)))


def abstract_params():
  return init_state(Transformer(CFG), CONFIG, 0)["params"]


BAD = {
  "zero1 without fsdp": (
    ("zero1", "data=8"),
    {},
    "rules: found zero1, which split over fsdp, on the mesh data=8, .* nearest are the mesh fsdp=8, or the rules data",
  ),
  "tensor without tensor": (
    ("tensor", "fsdp=8"),
    {},
    "found tensor, which split over tensor, .* the mesh tensor=8, or the rules zero1 or zero2 or fsdp",
  ),
  "sequence without tensor": (
    ("sequence", "data=4,fsdp=2"),
    {},
    "the mesh data=4,tensor=2, or the rules zero1",
  ),
  "both without tensor": (
    ("fsdp_tensor", "fsdp=8"),
    {},
    "the mesh fsdp=8,tensor=1, or the rules zero1 or zero2 or fsdp",
  ),
  "an idle tensor axis": (
    ("zero2", "fsdp=2,tensor=4"),
    {},
    "do not split over tensor, .* the same; the nearest are the mesh .*, or the rules fsdp_tensor",
  ),
  "data on tensor": (("data", "data=2,tensor=4"), {}, "or the rules tensor or sequence"),
  "rows": (
    ("fsdp", "data=2,fsdp=4"),
    dict(batch_size=12, accumulate=2),
    "batch_size: found 6 rows at a time on the mesh data=2,fsdp=4, expected a multiple of 8",
  ),
  "tokens": (
    ("sequence", "tensor=8"),
    {},
    "length: found 12 tokens on the mesh tensor=8, expected a multiple of 8, .* nearest is 16, or take the rules tensor",
  ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_refused(case):
  (rules, axes), fields, says = BAD[case]
  config = dataclasses.replace(CONFIG, **fields)
  for make in (
    lambda *args: init_state(Transformer(CFG), config, 0, None, *args),
    lambda *args: make_step(Transformer(CFG), config, *args),
  ):
    with pytest.raises(ConfigError) as caught:
      make(make_mesh(axes), parallel.RULES[rules])
    assert re.search(says, str(caught.value)), caught.value
  refused(f"mesh, {case}", caught.value)


def test_rules_take_a_mesh_and_a_call_is_within_it():
  with pytest.raises(ConfigError, match="rules: found some without a mesh"):
    make_step(Transformer(CFG), CONFIG, rules=parallel.RULES["data"])
  gradient = make_gradient(Transformer(CFG), CONFIG, make_mesh("data=8"))
  ids = jax.ShapeDtypeStruct((8, 13), "int32")
  with pytest.raises(
    ConfigError, match=r"mesh: found a call outside of it, expected one within jax.set_mesh"
  ):
    jax.eval_shape(gradient, abstract_state(CFG)["params"], ids)


def test_tokens_that_do_not_divide_are_an_error_of_the_model_too():
  model, mesh = Transformer(CFG, sequence=True), make_mesh("tensor=4")
  with (
    jax.set_mesh(mesh),
    pytest.raises(ConfigError, match=r"sequence: found 10 tokens .* tensor = 4, .* nearest is 8"),
  ):
    jax.eval_shape(
      model.apply, {"params": abstract_state(CFG)["params"]}, jax.ShapeDtypeStruct((8, 10), "int32")
    )


def test_default_and_plain_rules():
  """A mesh alone takes the rules that use it; rules of the user have no stage."""
  assert make_layout(CFG, make_mesh("fsdp=2,tensor=4")).rules is parallel.RULES["fsdp_tensor"]
  assert make_layout(CFG, make_mesh("fsdp=8")).rules is parallel.RULES["fsdp"]
  assert make_layout(CFG, make_mesh("fsdp=8"), [*parallel.RULES["fsdp"]]).rules.stage == 0
  assert make_layout(CFG, None).mesh is None
