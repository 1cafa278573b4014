"""Meshes by text, what is wrong with a text, and batches on meshes."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from mesh_checks import make_mesh

from jaxllm import parallel
from jaxllm.errors import ConfigError, DataError
from jaxllm.study import choices


@pytest.mark.core
@pytest.mark.parametrize(
  ("text", "shape"),
  [
    ("data=8", dict(data=8)),
    ("data=2,tensor=4", dict(data=2, tensor=4)),
    (" fsdp = 2, tensor=4 ", dict(fsdp=2, tensor=4)),
    ("data=2,fsdp=2,tensor=2", dict(data=2, fsdp=2, tensor=2)),
    ("data=-1,tensor=2", dict(data=4, tensor=2)),
    ("tensor=-1", dict(tensor=8)),
  ],
)
def test_axes_and_order(text, shape):
  mesh = parallel.make_mesh(text)
  assert dict(mesh.shape) == shape and list(mesh.shape) == list(shape)
  assert set(mesh.axis_types) == {AxisType.Auto}  # the default of jax.make_mesh would fail in modules
  assert list(mesh.devices.flat) == jax.devices()  # the last axis is that of neighbours
  assert parallel.make_mesh(parallel.spell(mesh)) == mesh


@pytest.mark.parametrize(
  ("text", "named"),
  [
    ("tensr=8", ("'tensr'", "did you mean 'tensor'")),
    ("model=8", ("'model'", "data, fsdp, tensor")),
    ("", ("''", "data=2,tensor=4")),
    ("data=2,tensor=2", ("product 4", "8 cpu devices")),
    ("data=4,tensor=4", ("product 16", "exactly 8", "XLA_FLAGS=--xla_force_host_platform_device_count=16")),
    ("data=2,data=4", ("'data' twice",)),
    ("data=0,tensor=8", ("'data=0'", "at least 1")),
    ("data=-2,tensor=4", ("'data=-2'", "at least 1")),
    ("data=two,tensor=4", ("'data=two'",)),
    ("data=2.0,tensor=4", ("'data=2.0'",)),
    ("data,tensor=4", ("'data'", "data=N")),
    ("data=-1,tensor=-1", ("-1",)),
    ("data=-1,tensor=3", ("product 3", "divisor of 8")),
  ],
)
def test_errors_name_what_is_wrong(text, named):
  with pytest.raises(ConfigError) as error:
    parallel.make_mesh(text)
  assert all(part in str(error.value) for part in (repr(text), *named)), error.value


def test_some_of_the_devices():
  assert list(parallel.make_mesh("tensor=4", jax.devices()[4:]).devices.flat) == jax.devices()[4:]


@pytest.mark.parametrize(
  ("axes", "rules", "shards"),
  [
    ("data=8", "data", 8),
    ("fsdp=8", "fsdp", 8),
    ("data=2,tensor=4", "tensor", 2),
    ("fsdp=2,tensor=4", "fsdp_tensor", 2),
    ("data=2,fsdp=2,tensor=2", "fsdp_tensor", 4),
    ("data=8,tensor=1", "data", 8),
  ],
)
def test_rules_and_rows_of_a_mesh(axes, rules, shards):
  mesh = make_mesh(axes)
  assert parallel.default_rules(mesh) == rules and parallel.batch_shards(mesh) == shards
  batch = dict(tokens=np.arange(16 * 3).reshape(16, 3), length=np.arange(16))
  placed = parallel.shard_batch(batch, mesh)
  for name, x in placed.items():
    np.testing.assert_array_equal(x, batch[name])
    rows = {shard.data.shape for shard in x.addressable_shards}
    assert rows == {(16 // shards, *batch[name].shape[1:])}


def test_rows_that_do_not_divide():
  with pytest.raises(DataError, match=r"6 rows on the mesh data=4,tensor=2, expected a multiple of 4"):
    parallel.shard_batch(np.zeros((6, 2)), parallel.make_mesh("data=4,tensor=2"))


def test_flags_list_the_rule_sets_without_jax():
  assert tuple(parallel.RULES) == choices.RULES
