"""Constraints of activations take effect on a mesh, and are nothing without one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from mesh_cases import CASES, params
from mesh_checks import make_mesh, tokens

from jaxllm.nn import Transformer, init_cache
from jaxllm.ops.constrain import LETTERS, constrain

SHAPE = dict(B=8, T=3, N=8, K=4, H=5, F=16, V=64, D=6, S=7, C=24)


def spec_of(letters, axes, **sizes):
  """The spec that an output constrained to `letters` has on a mesh."""
  shape = tuple((SHAPE | sizes)[letter] for letter in letters)
  mesh = make_mesh(axes)
  with jax.set_mesh(mesh):
    whole = jax.device_put(np.zeros(shape, np.float32), NamedSharding(mesh, P()))
    out = jax.jit(lambda x: constrain(x, letters))(whole)
  assert isinstance(out.sharding, NamedSharding)
  return P(*out.sharding.spec, *(None,) * (len(shape) - len(out.sharding.spec)))


@pytest.mark.core
@pytest.mark.parametrize(
  ("letters", "axes", "spec"),
  [
    ("BTNH", "data=2,tensor=4", P("data", None, "tensor", None)),
    ("BTKH", "fsdp=2,tensor=4", P("fsdp", None, "tensor", None)),
    ("BTD", "data=2,fsdp=2,tensor=2", P(("data", "fsdp"), None, None)),
    ("BTF", "tensor=8", P(None, None, "tensor")),
    ("CV", "fsdp=8", P("fsdp", None)),
  ],
)
def test_letters_are_axes(letters, axes, spec):
  assert spec_of(letters, axes) == spec


def test_what_does_not_divide_stays_whole():
  assert spec_of("BTKH", "data=2,tensor=4", K=2) == P("data", None, None, None)
  assert spec_of("BTNH", "data=2,tensor=4", B=1) == P(None, None, "tensor", None)


def test_what_has_no_axis_is_gathered():
  """A constraint says of every dimension where it lies: one that came in split is whole afterwards."""
  mesh = make_mesh("data=2,tensor=4")
  with jax.set_mesh(mesh):
    split = jax.device_put(np.zeros((8, 3, 16), np.float32), NamedSharding(mesh, P(None, None, "tensor")))
    out = jax.jit(lambda x: constrain(x, "BTD"))(split)
  assert out.sharding.shard_shape(out.shape) == (4, 3, 16)


def test_the_table_has_the_letters_of_the_batch_and_of_what_tensor_splits():
  assert {letter for letter, axes in LETTERS.items() if axes == ("tensor",)} == set("NKFV")
  assert {letter for letter, axes in LETTERS.items() if axes == ("data", "fsdp")} == set("BC")


def test_nothing_without_a_mesh():
  x = jnp.zeros((2, 3))
  assert constrain(x, "BD") is x
  with jax.set_mesh(make_mesh("data=1,tensor=1")):
    assert constrain(x, "BD") is x


def test_a_mesh_is_part_of_a_compiled_program():
  """The same jitted function, called first without a mesh, has its constraints when called with one."""
  f = jax.jit(lambda x: constrain(x * 2, "BD"))
  x = np.ones((8, 4), np.float32)
  assert len(f(x).sharding.device_set) == 1
  for axes, rows in (("data=8", 1), ("fsdp=4,tensor=2", 2)):
    with jax.set_mesh(make_mesh(axes)):
      assert f(x).sharding.shard_shape(x.shape) == (rows, 4)
  assert len(f(x).sharding.device_set) == 1


def test_inside_shard_map_the_axes_are_not_the_compilers():
  mesh = make_mesh("data=8")
  f = jax.shard_map(lambda x: constrain(x, "BD") + 1, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
  with jax.set_mesh(mesh):
    np.testing.assert_array_equal(jax.jit(f)(np.zeros((8, 2), np.float32)), 1)


def program(cfg, weights):
  """The traced program of a prefill, its loss of one more token, and the gradient."""

  def loss(params, ids):
    logits, cache = Transformer(cfg).apply({"params": params}, ids, cache=init_cache(cfg, *ids.shape))
    return jnp.sum(logits) + jnp.sum(cache.k[0])

  return str(jax.make_jaxpr(jax.grad(loss))(weights, tokens(cfg)))


def test_without_a_mesh_the_program_has_no_constraint():
  cfg = CASES["llama"]
  weights = params(cfg)
  assert "sharding_constraint" not in program(cfg, weights)
  with jax.set_mesh(make_mesh("data=2,tensor=4")):
    found = program(cfg, weights)
  # forward: the embedding, the logits, and q, k, v, both caches, heads, two branches, gate and up a layer; the empty caches
  assert found.count("sharding_constraint") >= 2 + 10 * cfg.num_layers
