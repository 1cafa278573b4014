"""What the gradient of a layer sends, forward and backward, on this machine and as the TPU compiler has it."""

import collections
import dataclasses
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from mesh_cases import CASES, params
from mesh_checks import B, T, gradient_error, make_mesh, relative_error, tokens
from test_collectives import collectives
from training_runs import CONFIG, as_columns
from training_table import about, measured

from jaxllm import parallel
from jaxllm.nn import Transformer
from jaxllm.nn.transformer import head
from jaxllm.ops.losses import cross_entropy
from jaxllm.train.step import make_gradient

D = CASES["llama"].embed_dim


def sent(rules, axes, layers, **fields):
  """[(name, shapes of the results)] of the gradient of a Llama of so many layers."""
  return collectives(text_of(rules, axes, layers, **fields))


def text_of(rules, axes, layers, **fields):
  """That program."""
  cfg, mesh, rules = (
    dataclasses.replace(CASES["llama"], num_layers=layers),
    make_mesh(axes),
    parallel.RULES[rules],
  )
  config = dataclasses.replace(CONFIG, **fields)
  with jax.set_mesh(mesh):
    placed = parallel.shard(params(cfg), mesh, rules, cfg)
    program = jax.jit(make_gradient(Transformer(cfg), config, mesh, rules))
    return program.lower(placed, parallel.shard_batch(tokens(cfg), mesh)).compile().as_text()


def of_the_stream(found, rows=B):
  """Those of arrays of the residual stream's size, alone or several in one."""
  size = rows * T * D
  return collections.Counter(
    name for name, shapes in found if all(math.prod(shape) == size for shape in shapes)
  )


def of_a_layer(rules, axes, layers):
  """Two programs' difference: (all that is sent more with one layer more, what of it is of the stream)."""
  rows = B // make_mesh(axes).shape.get("data", 1)
  one, two = (sent(rules, axes, n) for n in layers)
  more = layers[1] - layers[0]
  count = lambda found: collections.Counter(name for name, _ in found)
  all_of, stream = count(two) - count(one), of_the_stream(two, rows) - of_the_stream(one, rows)
  assert all(n % more == 0 for n in all_of.values())
  return {name: n // more for name, n in all_of.items()}, {name: n // more for name, n in stream.items()}


LAYERS = [("tensor=4", (1, 2)), pytest.param("data=2,tensor=4", (2, 4), marks=pytest.mark.slow)]


@pytest.mark.parametrize(("axes", "layers"), LAYERS)
def test_tensor_takes_two_all_reduces_forward_and_two_backward(axes, layers):
  """Megatron's: of the residual stream, and nothing else; one backward is of a product or several that read the same."""
  row = f"tensor, {axes}: a layer's gradient, CPU"
  about("collectives", row)
  all_of, stream = of_a_layer("tensor", axes, layers)
  assert stream == {"all-reduce": 4} == all_of
  measured("collectives", row, **as_columns(all_of))


@pytest.mark.parametrize(("axes", "layers"), LAYERS)
def test_sequence_gathers_and_scatters_twice_forward_and_twice_backward(axes, layers):
  """A reduce-scatter is written as an all-reduce by XLA for CPUs, of which each device takes its part."""
  row = f"sequence, {axes}: a layer's gradient, CPU"
  about("collectives", row)
  all_of, stream = of_a_layer("sequence", axes, layers)
  assert stream == {"all-reduce": 4, "all-gather": 4} == all_of
  measured("collectives", row, **as_columns(all_of))


@pytest.mark.parametrize("axes", ["data=2,fsdp=2,tensor=2", pytest.param("fsdp=8", marks=pytest.mark.slow)])
def test_no_device_has_all_rows_of_what_is_looked_up(axes):
  """The width of the table is split, and then the rows: by an all-to-all, not by way of all of both."""
  text = text_of("fsdp_tensor" if "tensor" in axes else "fsdp", axes, 1)
  moved = {name: sum(map(math.prod, shapes)) for name, shapes in collectives(text)}
  assert moved["all-to-all"] == B * T * D // math.prod(
    make_mesh(axes).shape.get(a, 1) for a in ("data", "fsdp")
  )
  rows = B // make_mesh(axes).shape.get("data", 1)
  assert not re.search(rf"\[(1,)?{rows},{T},{D}\]", text)


@pytest.mark.parametrize(("rules", "axes"), [("zero1", "data=2,fsdp=4"), ("tensor", "fsdp=2,tensor=4")])
def test_rows_of_a_whole_width_take_no_all_to_all(rules, axes):
  """Where fsdp does not split the table, each device has what its tokens read."""
  assert {name for name, _ in sent(rules, axes, 1)} == {"all-reduce"}


def score(cfg, p, hidden_BTD, ids):
  nll_BT, _ = cross_entropy(hidden_BTD, head(cfg, p), ids[:, 1:], chunk=B * T // 2, z_loss=1e-3)
  return jnp.mean(nll_BT)


@pytest.mark.parametrize(
  "name", ["odd groups", *(pytest.param(x, marks=pytest.mark.slow) for x in ("llama", "gemma2"))]
)
def test_the_loss_of_a_split_vocabulary_sends_numbers_a_token(name):
  """Of a maximum, a sum and the label's logit, and backward the sum of the hidden states' gradient; all as on one device.

  The first two once more, as a chunk's logits are computed again.
  """
  row = f"{name}, tensor=4: loss and gradient by a split vocabulary, CPU"
  about("collectives", row)
  cfg, mesh = CASES[name], make_mesh("tensor=4")
  keep = lambda p: {key: p[key] for key in ("embed", "head", "head_bias") if key in p}
  hidden, ids = jax.random.normal(jax.random.key(0), (B, T, cfg.embed_dim)), tokens(cfg)
  program = jax.jit(jax.value_and_grad(lambda p, x, ids: score(cfg, p, x, ids), (0, 1)))
  truth, grads = program(keep(params(cfg)), hidden, ids)
  with jax.set_mesh(mesh):
    placed = keep(parallel.shard(params(cfg), mesh, parallel.RULES["tensor"], cfg))
    compiled = program.lower(placed, hidden, ids).compile()
    loss, found = compiled(placed, hidden, ids)
  assert relative_error(loss, truth) <= 1e-5
  assert gradient_error((parallel.unpad(found[0], cfg), found[1]), grads) <= 1e-5
  all_of = collectives(compiled.as_text())
  widths = [math.prod(shape) / (B * T // 2) for _, shapes in all_of for shape in shapes]
  assert {name for name, _ in all_of} == {"all-reduce"} and set(widths) == {1, cfg.embed_dim}
  assert widths.count(1) == 3 + 2 and widths.count(cfg.embed_dim) == 1
  measured("collectives", row, **as_columns(collections.Counter(name for name, _ in all_of)))


TPU = {
  "tensor": "data=2,tensor=4",
  "sequence": "data=2,tensor=4",
  "zero1": "fsdp=8",
  "zero2": "fsdp=8",
  "fsdp": "fsdp=8",
}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (the tpu extra)")
def test_as_the_tpu_compiler_has_it():
  """A layer of sequence parallelism has two gathers and two scatters each way, and of the stream no sum over all devices."""
  asked = [f"gradient:{rules}:{TPU[rules]}:{n}" for rules in ("tensor", "sequence") for n in (1, 2)]
  asked += [f"step:{rules}:{TPU[rules]}:1" for rules in ("zero1", "zero2", "fsdp")]
  env = os.environ | dict(
    TPU_SKIP_MDS_QUERY="1",
    JAX_PLATFORMS="cpu",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_ACCELERATOR_TYPE="v5litepod-16",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    XLA_FLAGS="",
  )
  here = Path(__file__)
  call = [sys.executable, here.with_name("topology_program.py"), *asked]
  done = subprocess.run(call, cwd=here.parents[2], env=env, capture_output=True, text=True, timeout=900)
  assert done.returncode == 0, done.stderr
  tensor, tensor_2, sequence, sequence_2, *steps = map(
    collections.Counter, json.loads(done.stdout.splitlines()[-1])
  )
  names = lambda found: collections.Counter(key.split(" ")[0] for key in found.elements())
  stream = lambda found: collections.Counter(
    {key: n for key, n in found.items() if any(shape in key.split(" ") for shape in ("4,128,256", "512,256"))}
  )
  # how it puts sums together is its own: those of products that read the same are several arrays
  assert set(names(tensor)) == set(names(tensor_2)) == {"all-reduce"}
  layer = names(stream(sequence_2) - stream(sequence))
  assert layer == {"all-gather": 4, "reduce-scatter": 4}
  measured("collectives", "sequence, data=2,tensor=4: a layer's gradient, TPU v5e", **as_columns(layer))
  for rules, found in zip(("zero1", "zero2", "fsdp"), map(names, steps), strict=True):
    assert found["all-gather"] and found["all-reduce" if rules == "zero1" else "reduce-scatter"], (
      rules,
      found,
    )
    measured("collectives", f"{rules}, fsdp=8: a step of one layer, TPU v5e", **as_columns(found))
