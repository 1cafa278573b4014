"""States that are saved from one mesh and restored onto another, which knows nothing of the first."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_cases
from jax.sharding import NamedSharding, PartitionSpec
from training_table import about, measured

from jaxllm import parallel
from jaxllm.nn import Transformer
from jaxllm.train import step
from jaxllm.train.checkpoint import Checkpoints, restore_tree

SHAPES = ["data=8", "data=2,fsdp=4", "fsdp=4,tensor=2", "data=2,fsdp=2,tensor=2"]
SPECS = [(), ("first",), (None, "first"), ("last",), ("first", "last"), (("first", "last"),)]
"""Of the trailing dimensions of an array, by the first and the last axis of a mesh with more than one device."""
PAIRS = list(itertools.product(SHAPES, SPECS))


def laid_out(state, shape, spec):
  """{"mesh", "sharding" of each leaf}: as much of a spec as fits the leaf."""
  mesh = parallel.make_mesh(shape)
  axes = [name for name, size in mesh.shape.items() if size > 1]
  named = {"first": axes[0], "last": axes[-1], None: None}

  def sharding(leaf):
    entries, used = [], set()
    for entry, size in zip(spec, leaf.shape, strict=False):
      names = [named[one] for one in (entry if isinstance(entry, tuple) else (entry,)) if one]
      names = [name for name in dict.fromkeys(names) if name not in used]
      fits = names and size % np.prod([mesh.shape[name] for name in names]) == 0
      entries.append(tuple(names) if fits else None)
      used |= set(names) if fits else set()
    return NamedSharding(mesh, PartitionSpec(*entries))

  return jax.tree.map(sharding, state)


@pytest.fixture(scope="module")
def state():
  config = train_cases.config(4)
  state = train_cases.first_state(Transformer(train_cases.CFG), config, 0)
  return jax.tree.map(np.asarray, state | {"half": jnp.arange(64, dtype=jnp.bfloat16).reshape(8, 8)})


@pytest.mark.parametrize(
  "number",
  [7, 17, *(pytest.param(i, marks=pytest.mark.slow) for i in range(len(PAIRS)) if i not in (7, 17))],
)
def test_bytes_and_layout(tmp_path, state, number):
  """Saved from one of 4 meshes under one of 6 specs, restored on another mesh under another spec, and on no mesh at all."""
  (shape, spec), (other_shape, other_spec) = PAIRS[number], PAIRS[(number + 8) % len(PAIRS)]
  about("resume", "another mesh")
  expected = train_cases.bytes_of(state)
  wanted = laid_out(state, other_shape, other_spec)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, jax.device_put(state, laid_out(state, shape, spec)))
    like = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    found = checkpoints.restore(jax.tree.map(like, state, wanted))
    assert train_cases.bytes_of(found) == expected
    assert all(
      leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
      for leaf, sharding in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    )
    alone = checkpoints.restore(state)
    assert train_cases.bytes_of(alone) == expected
    assert all(len(leaf.sharding.device_set) == 1 for leaf in jax.tree.leaves(alone))
  manifest = json.loads((tmp_path / "1" / "manifest.json").read_bytes())
  mesh = parallel.make_mesh(shape)
  assert manifest["about"]["mesh"] == ",".join(f"{name}={size}" for name, size in mesh.shape.items())
  measured("resume", "another mesh", runs=1, arrays=len(expected), differ=0)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_the_next_step(tmp_path, shape):
  """Its loss is that of the run that stayed where it was, to 1e-6."""
  model, config = Transformer(train_cases.CFG), train_cases.config(4)
  compiled = step.make_step(model, config)
  tokens = np.random.default_rng(0).integers(0, 256, (8, train_cases.LENGTH + 1), np.int32)
  state, _ = compiled(train_cases.first_state(model, config, 0), tokens)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state)
    wanted = laid_out(state, shape, ("first", "last"))
    like = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    there = checkpoints.restore(jax.tree.map(like, state, wanted))
  mesh = jax.tree.leaves(wanted)[0].mesh
  _, expected = compiled(state, tokens)
  with jax.set_mesh(mesh):
    _, found = step.make_step(model, config)(there, parallel.shard_batch(tokens, mesh))
  assert abs(float(found) - float(expected)) <= 1e-6 * abs(float(expected))


def test_a_tree_is_read_on_one_device_whatever_the_mesh_was(tmp_path, state):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(3, jax.device_put(state, laid_out(state, SHAPES[2], SPECS[4])))
  at, found = restore_tree(tmp_path)
  assert at == 3 and all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(found))
  assert found["half"].dtype == jnp.bfloat16
  np.testing.assert_array_equal(found["params"]["embed"], state["params"]["embed"])
