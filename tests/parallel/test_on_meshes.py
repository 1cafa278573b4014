"""A model on a mesh is the model on one device: loss, logits, gradients, and decoding with a cache."""

import pytest
from mesh_cases import CASES, source
from mesh_checks import MESHES, check_decode, check_equal, make_mesh

from jaxllm import parallel

DEFAULT = (
  ("odd llama", "fsdp_tensor", "fsdp=2,tensor=4"),
  ("odd llama", "data", "data=8"),
  ("every other parameter", "fsdp", "fsdp=8"),
)
"""Models unlike each other, with a family's row on a tensor axis; all models on all meshes are the full counts."""


def marks(*row):
  return [pytest.mark.slow] if row not in DEFAULT else [pytest.mark.core] * (row == DEFAULT[0])


@pytest.mark.parametrize(
  ("name", "rules", "axes"),
  [
    pytest.param(name, *mesh, marks=marks(name, *mesh), id=f"{name}-{mesh[0]}-{mesh[1]}")
    for name in CASES
    for mesh in MESHES
  ],
)
def test_loss_logits_and_gradients(name, rules, axes):
  check_equal(CASES[name], source(name), rules, axes)


@pytest.mark.parametrize(
  ("name", "rules", "axes"),
  [
    ("odd llama", "fsdp_tensor", "fsdp=2,tensor=4"),
    *(pytest.param("gemma2", *mesh, marks=pytest.mark.slow) for mesh in MESHES),
    *(pytest.param("gpt_oss", *mesh, marks=pytest.mark.slow) for mesh in MESHES),
    *(pytest.param("bloom", *mesh, marks=pytest.mark.slow) for mesh in MESHES),
  ],
)
def test_decoding_with_a_cache(name, rules, axes):
  cache = check_decode(CASES[name], source(name), rules, axes)
  held = cache.k[0].sharding.shard_shape(
    cache.k[0].shape
  )  # rows and heads lie where the mesh has an axis for them
  mesh = make_mesh(axes)
  heads = mesh.shape.get("tensor", 1)
  whole = CASES[name].num_kv_heads % heads != 0
  assert held[0] == len(cache.length) // parallel.batch_shards(mesh)
  assert held[1] == CASES[name].num_kv_heads // (1 if whole else heads)
