"""A model on a mesh is the model on one device: loss, logits, gradients, and decoding with a cache."""

import pytest
from mesh_cases import CASES, source
from mesh_checks import MESHES, check_decode, check_equal

DEFAULT = (
  ("llama", "fsdp_tensor", "fsdp=2,tensor=4"),
  ("llama", "data", "data=8"),
  ("gemma2", "tensor", "data=2,tensor=4"),
  ("every other parameter", "fsdp", "fsdp=8"),
)
"""Each rule set, and models unlike each other; all models on all meshes are the full counts."""


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
    ("llama", "fsdp_tensor", "fsdp=2,tensor=4"),
    *(pytest.param("gemma2", *mesh, marks=pytest.mark.slow) for mesh in MESHES),
    *(pytest.param("gpt_oss", *mesh, marks=pytest.mark.slow) for mesh in MESHES),
    *(pytest.param("bloom", *mesh, marks=pytest.mark.slow) for mesh in MESHES),
  ],
)
def test_decoding_with_a_cache(name, rules, axes):
  cache = check_decode(CASES[name], source(name), rules, axes)
  spec = cache.k[0].sharding.spec  # rows and heads lie where the mesh has an axis for them
  rows = tuple(axis for axis in ("data", "fsdp") if axis in axes)
  assert spec[0] in (rows, rows[0] if len(rows) == 1 else None, None if rows == () else rows)
  assert ("tensor" in axes) == ("tensor" in str(spec))
