"""What lies where: every parameter by every rule set, the dimensions that do not divide, and bytes a device."""

import dataclasses
import functools
import math
import re

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from mesh_cases import CASES, MATRIX, abstract, model, params
from mesh_checks import MESHES, make_mesh

from jaxllm import parallel, tree
from jaxllm.errors import ConfigError
from jaxllm.leaf import Matrix, dense
from jaxllm.norm import LayerNorm, QkNorm
from jaxllm.parallel import RULES


@functools.cache
def every():
  """{path: shape} of parameters of every kind."""
  cases = [CASES[name] for name in ("gpt_oss", "bloom", "opt", "gemma2", "every other parameter")]
  cases.append(model(qk_norm=QkNorm(LayerNorm()), biases=("o", "down")))
  return {path: leaf.shape for cfg in cases for path, leaf in tree.flatten(abstract(cfg)).items()}


def whole_name(path):
  return re.sub(r"\d+", "0", path)


def test_the_cases_have_every_kind_of_parameter():
  kinds = {whole_name(path) for path in every()}
  for pattern, _ in RULES["data"]:
    assert any(re.fullmatch(pattern, kind) for kind in kinds), pattern


@pytest.mark.core
@pytest.mark.parametrize("rules", RULES)
def test_no_rule_is_open_and_none_hides_another(rules):
  patterns = [pattern for pattern, _ in RULES[rules]]
  assert not [pattern for pattern in patterns if pattern.endswith(".*")]
  for path in every():
    assert sum(re.fullmatch(pattern, path) is not None for pattern in patterns) == 1, path
  with pytest.raises(ConfigError, match="layers/0/attn/router"):
    tree.first_match(RULES[rules], "layers/0/attn/router")


SPECS = {
  "embed": (P(), P(None, "fsdp"), P("tensor"), P("tensor", "fsdp")),
  "head": (P(), P("fsdp"), P(None, "tensor"), P("fsdp", "tensor")),
  "head_bias": (P(), P(), P("tensor"), P("tensor")),
  "embed_in": (P(), P(None, "fsdp"), P(), P(None, "fsdp")),
  "embed_out": (P(), P("fsdp"), P(), P("fsdp")),
  "layers/0/attn/q/w": (P(), P("fsdp"), P(None, "tensor"), P("fsdp", "tensor")),
  "layers/1/attn/v/bias": (P(), P(), P("tensor"), P("tensor")),
  "layers/1/attn/o/w": (P(), P(None, "fsdp"), P("tensor"), P("tensor", "fsdp")),
  "layers/0/attn/o/bias": (P(), P(), P(), P()),
  "layers/0/mlp/gate/w": (P(), P("fsdp"), P(None, "tensor"), P("fsdp", "tensor")),
  "layers/0/mlp/up/bias": (P(), P(), P("tensor"), P("tensor")),
  "layers/0/mlp/down/w": (P(), P(None, "fsdp"), P("tensor"), P("tensor", "fsdp")),
  "layers/0/mlp_norm/scale": (P(), P(), P(), P()),
  "positions/0/table": (P(), P(), P(), P()),
}
AXES = "data=2,fsdp=2,tensor=2"


@pytest.mark.parametrize("path", SPECS)
def test_specs(path):
  mesh = make_mesh(AXES)
  for rules, spec in zip(("data", "fsdp", "tensor", "fsdp_tensor"), SPECS[path], strict=True):
    at = parallel.place(path, every()[path], mesh, RULES[rules])
    assert at.spec == spec and at.shape == every()[path], rules


def test_a_spec_is_aligned_to_the_right():
  """Stacked layers have one dimension more, in front."""
  mesh, stacked = make_mesh("fsdp=2,tensor=4"), (6, 32, 128)
  at = parallel.place("blocks/0/attn/q/w", stacked, mesh, RULES["fsdp_tensor"])
  assert at.spec == P(None, "fsdp", "tensor")


def test_a_rule_with_more_dimensions_than_the_parameter():
  with pytest.raises(ConfigError, match=r"embed: found the shape \(8,\), expected 2 dimensions"):
    parallel.place("embed", (8,), make_mesh("data=8"), RULES["data"])


def test_an_axis_that_the_mesh_lacks():
  with pytest.raises(
    ConfigError, match=r"embed: .*'tensor', which the mesh data=8 does not have; add tensor=1"
  ):
    parallel.shardings(abstract(CASES["llama"]), make_mesh("data=8"), RULES["tensor"])


def test_rules_of_the_user():
  """Any ordered rules over any path, several axes on one dimension included; the first match counts."""
  rules = ((r"lora/\w+", (("data", "tensor"), None)), (r"lora/up", ("data",)))
  at = parallel.place("lora/up", (16, 4), make_mesh("data=2,tensor=4"), rules)
  assert at.spec == P(("data", "tensor"))
  with pytest.raises(
    ConfigError, match=r"the size = 12 over data x tensor = 8, .* is 16, and data x tensor = 4 divides 12"
  ):
    parallel.place("lora/up", (12, 4), make_mesh("data=2,tensor=4"), rules)


# a rule set, sizes that do not divide, the parameter and what the message has to say
ODD = [
  ("fsdp", "fsdp=8", dict(embed_dim=36), ("embed_dim = 36", "fsdp = 8", "is 40", "fsdp = 4 divides 36")),
  ("tensor", "tensor=4", dict(mlp_dim=50), ("mlp_dim = 50", "tensor = 4", "is 52", "tensor = 2 divides 50")),
  (
    "tensor",
    "tensor=4",
    dict(num_heads=6, num_kv_heads=3),
    ("num_heads = 6", "tensor = 4", "is 8", "tensor = 2 divides 6"),
  ),
  (
    "fsdp_tensor",
    "fsdp=4,tensor=2",
    dict(embed_dim=30),
    ("embed_dim = 30", "fsdp = 4", "is 32", "fsdp = 2 divides 30"),
  ),
]


@pytest.mark.parametrize(("rules", "axes", "fields", "named"), ODD)
def test_a_dimension_that_does_not_divide(rules, axes, fields, named):
  cfg = model(**fields)
  with pytest.raises(ConfigError) as error:
    parallel.shard(params(cfg), make_mesh(axes), RULES[rules], cfg)
  message = str(error.value)
  path, dimension = re.match(r"(\S+): dimension (\d),", message).groups()
  size = tree.flatten(abstract(cfg))[path].shape[int(dimension)]
  assert size % {"num_heads": 6, "embed_dim": cfg.embed_dim, "mlp_dim": 50}[named[0].split()[0]] == 0
  assert all(part in message for part in named), message


def test_odd_shapes_on_the_data_axis():
  """Nothing is split, so nothing has to divide."""
  cfg = model(vocab_size=29, embed_dim=27, num_heads=3, num_kv_heads=3, mlp_dim=31)
  placed = parallel.shard(params(cfg), make_mesh("data=8"), RULES["data"], cfg)
  jax.tree.map(np.testing.assert_array_equal, placed, params(cfg))


def test_k_and_v_stay_whole_where_their_heads_do_not_divide():
  cfg, mesh = model(num_kv_heads=2, biases=("k", "v")), make_mesh("fsdp=2,tensor=4")
  specs = {
    path: s.spec
    for path, s in tree.flatten(parallel.shardings(abstract(cfg), mesh, RULES["fsdp_tensor"], cfg)).items()
  }
  for name in "kv":
    assert specs[f"layers/1/attn/{name}/w"] == P("fsdp") and specs[f"layers/1/attn/{name}/bias"] == P()
  assert specs["layers/1/attn/q/w"] == P("fsdp", "tensor")
  cfg = dataclasses.replace(cfg, num_kv_heads=4)
  specs = parallel.shardings(abstract(cfg), mesh, RULES["fsdp_tensor"], cfg)
  assert specs["layers"]["1"]["attn"]["k"]["w"].spec == P("fsdp", "tensor")


def test_without_the_config_heads_are_columns():
  shapes = abstract(model(num_kv_heads=1, head_dim=6))
  with pytest.raises(ConfigError, match=r"attn/k/w: .* = 6 over tensor = 4.*given cfg, k and v stay whole"):
    parallel.shardings(shapes, make_mesh("tensor=4"), RULES["tensor"])


@pytest.mark.core
@pytest.mark.parametrize("given", [True, False])
def test_the_vocabulary_is_padded_and_cut(given):
  cfg, mesh = model(vocab_size=29, biases=("head",)), make_mesh("data=2,tensor=4")
  cfg_or_none = cfg if given else None
  for weights in (params(cfg), params(cfg, matrix=True)):
    placed = parallel.shard(weights, mesh, RULES["tensor"], cfg_or_none)
    assert (
      placed["embed"].shape == (32, 32)
      and placed["head"].shape == (32, 32)
      and placed["head_bias"].shape == (32,)
    )
    for x in (placed["embed"], dense(placed["head"]).T, placed["head_bias"]):
      assert not np.any(x[29:])
    jax.tree.map(np.testing.assert_array_equal, parallel.unpad(placed, cfg), weights)
    planned = jax.tree.leaves(parallel.layout(weights, mesh, RULES["tensor"], cfg_or_none))
    assert [x.shape for x in planned] == [x.shape for x in jax.tree.leaves(placed)]
    if given:  # padded for one mesh, laid out on another
      again = parallel.shard(
        placed, make_mesh("tensor=8"), RULES["tensor"], dataclasses.replace(cfg, num_kv_heads=8)
      )
      assert again["embed"].shape == (32, 32)
      again = parallel.shard(placed, make_mesh("fsdp=8"), RULES["fsdp"], cfg)
      np.testing.assert_array_equal(again["embed"], weights["embed"])


def test_a_vocabulary_smaller_than_the_configs():
  """Rows that are not there are no padding."""
  with pytest.raises(
    ConfigError, match=r"embed: found the shape \(64, 32\), expected \(80, 32\), as vocab_size is 80"
  ):
    parallel.shard(params(model()), make_mesh("tensor=4"), RULES["tensor"], model(vocab_size=80))


@pytest.mark.parametrize(("rules", "axes"), MESHES)
def test_every_device_holds_the_bytes_of_the_formula(rules, axes):
  for name in ("gemma2", "every other parameter"):
    cfg = dataclasses.replace(CASES[name], vocab_size=61)
    weights = params(cfg, name in MATRIX)
    weights["embed"] = weights["embed"].astype(ml_dtypes.bfloat16)  # of two bytes
    mesh = make_mesh(axes)
    placed = parallel.shard(weights, mesh, RULES[rules], cfg)
    held = dict.fromkeys(mesh.devices.flat, 0)
    for leaf in jax.tree.leaves(placed):
      for shard in leaf.addressable_shards:
        held[shard.device] += shard.data.nbytes
    expected = parallel.bytes_per_device(weights, mesh, RULES[rules], cfg)
    assert set(held.values()) == {expected}
    table = parallel.report(placed)
    assert f"{expected:,} on each of {mesh.size} devices" in table
    rows = [int(line.split()[-1].replace(",", "")) for line in table.splitlines()[1:-1]]
    assert sum(rows) == expected


def test_the_formula_by_hand():
  """Of 8 devices in 2 x 4: matrices of layers over both, embedding of 61 rows as 64, two norms a layer and a last one whole."""
  cfg = model(vocab_size=61)
  D, F, q, kv = 32, 48, 8 * 16, 4 * 16
  matrices = cfg.num_layers * (D * (q + 2 * kv) + q * D + 3 * D * F) + 2 * 64 * D
  expected = 4 * (matrices // 8 + (2 * cfg.num_layers + 1) * D)
  assert (
    parallel.bytes_per_device(abstract(cfg), make_mesh("fsdp=2,tensor=4"), RULES["fsdp_tensor"], cfg)
    == expected
  )


@pytest.mark.parametrize(
  ("rules", "axes"), [*(pytest.param(*mesh, marks=pytest.mark.slow) for mesh in MESHES[:-1]), MESHES[-1]]
)
def test_each_device_has_its_slice(rules, axes):
  """From NumPy arrays, from JAX arrays, and of matrices held as [out, in]: the slice that the logical spec names."""
  cfg, mesh = CASES["llama"], make_mesh(axes)
  for weights in (
    params(cfg),
    params(cfg, matrix=True),
    jax.tree.map(jax.numpy.asarray, params(cfg, matrix=True)),
  ):
    placed = tree.flatten(parallel.shard(weights, mesh, RULES[rules], cfg))
    for path, leaf in tree.flatten(weights).items():
      spec = parallel.place(path, leaf.shape, mesh, RULES[rules], cfg).spec
      value = placed[path].value if isinstance(leaf, Matrix) else placed[path]
      logical = np.asarray(dense(leaf))
      for shard in value.addressable_shards:
        at = dict(
          zip(mesh.axis_names, (int(i[0]) for i in np.nonzero(mesh.devices == shard.device)), strict=True)
        )
        piece = logical
        for dim, axis in enumerate(spec):
          if axis is not None:
            piece = np.split(piece, mesh.shape[axis], dim)[at[axis]]
        np.testing.assert_array_equal(shard.data.T if isinstance(leaf, Matrix) else shard.data, piece)


def test_report_folds_layers():
  cfg, mesh = model(num_layers=3), make_mesh("fsdp=2,tensor=4")
  weights = params(cfg)
  weights["layers"]["1"]["attn"]["q"]["w"] = Matrix(
    weights["layers"]["1"]["attn"]["q"]["w"].T.astype(ml_dtypes.bfloat16)
  )
  table = parallel.report(parallel.shard(weights, mesh, RULES["fsdp_tensor"], cfg))
  rows = {line.split()[0]: line.split() for line in table.splitlines()[1:-1]}
  size = 32 * 128 // 8
  assert rows["layers/0,2/attn/q/w"] == [
    "layers/0,2/attn/q/w",
    *["32", "x", "128", "float32", "fsdp,", "tensor"],
    f"{2 * 4 * size:,}",
  ]
  bfloat16 = [
    "layers/1/attn/q/w",
    *["32", "x", "128", "bfloat16", "out,in", "fsdp,", "tensor"],
    f"{2 * size:,}",
  ]
  assert rows["layers/1/attn/q/w"] == bfloat16
  assert rows["layers/0-2/mlp_norm/scale"][-2:] == ["whole", "384"]
  planned = parallel.report(parallel.layout(weights, mesh, RULES["fsdp_tensor"], cfg))
  assert planned == table
  assert parallel.report(weights).splitlines()[1].split()[-2:] == ["-", f"{64 * 32 * 4:,}"]  # on no mesh
  assert math.prod((64, 32)) == 2048
