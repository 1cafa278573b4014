"""Files to parameters: every weight layout, type and mesh, and nothing that does not fit."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from checkpoint_case import (
  BIASES,
  EXPERTS,
  LAYOUTS,
  PLAIN,
  TYPES,
  assert_equal_trees,
  config,
  family,
  source,
  write,
)
from safetensors.numpy import save_file

from jaxllm import parallel, tree
from jaxllm.config import Layer
from jaxllm.errors import CheckpointError
from jaxllm.hf import loading, match, scan
from jaxllm.hf.files import Checkpoint
from jaxllm.leaf import Matrix
from jaxllm.nn import Transformer
from jaxllm.nn.shapes import expected_shapes
from jaxllm.position import POSITIONS, NoPE


def load(directory, cfg, layout="separate", plain=PLAIN, **kwargs):
  return loading.load_params(
    Checkpoint(directory), family(LAYOUTS[layout]), cfg, source(directory, plain), **kwargs
  )


@pytest.mark.core
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(tmp_path, layout, shards):
  cfg, weights, _ = write(tmp_path, layout, PLAIN | {"biases": BIASES}, shards=shards)
  found = load(tmp_path, cfg, layout)
  assert_equal_trees(found, weights)
  # what the files have as [out, in] is used so, and what they have as [in, out] too
  flat = tree.flatten(found)
  assert isinstance(flat["head"], Matrix)
  (down,) = (path for path in flat if path.startswith("layers/1/") and path.endswith("down/w"))
  assert isinstance(flat[down], Matrix) == (layout not in ("conv", "turned"))
  assert not isinstance(flat["embed"], Matrix)


@pytest.mark.parametrize("half_units", [True, False])
@pytest.mark.parametrize("name", TYPES)
def test_types_stay_as_stored(tmp_path, monkeypatch, name, half_units):
  """On a CPU with units for half types matrices stay [out, in] where all is float32, and are transposed where not."""
  monkeypatch.setattr(loading, "_has_half_units", lambda: half_units)
  cfg, weights, _ = write(tmp_path, plain=PLAIN | {"dtype": name}, dtype=TYPES[name])
  found = load(tmp_path, cfg)
  assert_equal_trees(found, weights)
  assert isinstance(found["head"], Matrix) == (name == "float32" or not half_units)


@pytest.mark.parametrize(
  "stored, wanted", [("bfloat16", "float32"), ("float32", "bfloat16"), ("float32", "float16")]
)
def test_types_that_are_cast(tmp_path, stored, wanted):
  cfg, weights, _ = write(tmp_path, dtype=TYPES[stored])
  found = load(tmp_path, dataclasses.replace(cfg, dtype=wanted), dtype=wanted)
  assert_equal_trees(found, jax.tree.map(lambda x: x.astype(TYPES[wanted]), weights))


def test_the_layout_is_chosen_by_platform_and_types():
  how = lambda *args: loading.matrix_layout(*args)[0]
  types = [(a, b) for a in ("float32", "bfloat16") for b in ("float32", "bfloat16")]
  assert [how("cpu", *pair, True) for pair in types] == ["oi", "io", "io", "io"]
  assert {how("cpu", *pair, False) for pair in types} == {"oi"}
  assert {how(platform, "bfloat16", "bfloat16") for platform in ("gpu", "tpu")} == {"oi"}


@pytest.mark.parametrize("rules", ["data", "fsdp", "tensor", "fsdp_tensor", None])
def test_on_a_mesh_without_a_full_copy(tmp_path, rules, monkeypatch):
  """Equal to the tree that is loaded whole and laid out after; each copy is of a shard's part."""
  plain = PLAIN | dict(vocab_size=62, num_key_value_heads=4, biases=BIASES)
  cfg, _, _ = write(tmp_path, "blocks", plain)
  mesh = parallel.make_mesh("data=2,fsdp=2,tensor=2")
  given = None if rules is None else parallel.RULES[rules]
  expected = parallel.shard(load(tmp_path, cfg, "blocks"), mesh, given or parallel.RULES["fsdp_tensor"], cfg)
  copied = []
  copy = scan.copy
  monkeypatch.setattr(scan, "copy", lambda view, *args: copied.append(view.nbytes) or copy(view, *args))
  found = load(tmp_path, cfg, "blocks", mesh=mesh, rules=given)
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for (path, mine), theirs in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
    assert mine.sharding == theirs.sharding, path
    np.testing.assert_array_equal(mine, theirs)
  split = {"data": 1, "fsdp": 2, "tensor": 2, "fsdp_tensor": 4, None: 4}[rules]
  assert max(copied) == max(leaf.nbytes for leaf in jax.tree.leaves(expected)) / split
  assert sum(copied) == sum(
    leaf.nbytes for leaf in jax.tree.leaves(expected)
  )  # devices with the same part read it once


def put(name, index, value):
  """Sets one value of a tensor."""

  def change(stored):
    stored[name] = stored[name].copy()
    stored[name][index] = value

  return change


@pytest.mark.parametrize("layout", ["stacked", "turned"])
@pytest.mark.parametrize("rules", ["fsdp", "fsdp_tensor"])
def test_experts_on_a_mesh(tmp_path, monkeypatch, layout, rules):
  """Of each expert every device reads its part, and no more of one at a time."""
  cfg, weights, _ = write(tmp_path, layout)
  mesh = parallel.make_mesh("fsdp=4,tensor=2")
  expected = parallel.shard(load(tmp_path, cfg, layout), mesh, parallel.RULES[rules], cfg)
  copied, copy = [], scan.copy
  monkeypatch.setattr(scan, "copy", lambda view, *args: copied.append(view.nbytes) or copy(view, *args))
  found = load(tmp_path, cfg, layout, mesh=mesh, rules=parallel.RULES[rules])
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for (path, mine), theirs in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
    assert mine.sharding == theirs.sharding, path
    np.testing.assert_array_equal(mine, theirs)
  split, together = 8 if rules == "fsdp_tensor" else 4, 1 if layout == "stacked" else EXPERTS
  expert = weights["layers"]["0"]["mlp"]["experts"]["up"]["w"][0].nbytes
  assert copied.count(together * expert // split) >= cfg.num_layers * 3 * split * EXPERTS // together
  unpadded = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
  assert unpadded <= sum(copied) <= 1.01 * unpadded


EXPERT = "model.layers.1.mlp.experts.2.gate_up_proj.weight"
BAD_EXPERTS = {
  "missing": (lambda t: t.pop(EXPERT), f"missing: {EXPERT} [160, 48]"),
  "one too many": (
    lambda t: t.update({EXPERT.replace(".2.", ".3."): t[EXPERT]}),
    "unexpected: model.layers.1.mlp.experts.3.gate_up_proj.weight of model.safetensors [160, 48]",
  ),
  "shape": (lambda t: t.update({EXPERT: t[EXPERT][:72].copy()}), "is [72, 48], expected [160, 48]"),
  "nan": (
    put(EXPERT, (150, 5), np.nan),
    f"{EXPERT} of model.safetensors: 1 value is NaN or infinite, the first at [150, 5]: nan",
  ),
}


@pytest.mark.parametrize("mesh", [None, "fsdp=4,tensor=2"])
@pytest.mark.parametrize("case", BAD_EXPERTS)
def test_an_expert_that_does_not_fit(tmp_path, case, mesh):
  change, text = BAD_EXPERTS[case]
  cfg, _, _ = write(tmp_path, "stacked", PLAIN | {"vocab_size": 62}, change=change)
  with pytest.raises(CheckpointError, match=re.escape(text)):
    load(tmp_path, cfg, "stacked", mesh=mesh and parallel.make_mesh(mesh))


def test_a_vocabulary_padded_for_the_mesh(tmp_path):
  cfg, weights, _ = write(tmp_path)
  mesh = parallel.make_mesh("fsdp=4,tensor=2")
  found = load(tmp_path, cfg, mesh=mesh, rules=parallel.RULES["tensor"])
  assert found["embed"].shape == (62, 48) and found["head"].shape == (48, 62)
  assert_equal_trees(parallel.unpad(found, cfg), weights)
  assert not np.any(np.asarray(found["embed"])[61:])


UP = "model.layers.1.mlp.up_proj.weight"


def test_all_problems_in_one_message(tmp_path):
  def change(stored):
    del stored["model.norm.weight"]
    stored["model.rotary.thing"] = np.ones(3, np.float32)
    stored["model.embed_tokens.weight"] = np.ones((61, 40), np.float32)
    stored["lm_head.weight"] = stored["lm_head.weight"].astype(np.int8)

  cfg, _, _ = write(tmp_path, shards=2, change=change)
  with pytest.raises(CheckpointError) as e:
    load(tmp_path, cfg)
  lines = [line.strip() for line in str(e.value).splitlines()[1:]]
  assert [line.split(":")[0] for line in lines] == ["shape", "missing", "type", "unexpected"]
  assert all(
    re.search(r"of model-0000[12]-of-00002\.safetensors", line) for line in lines if "missing" not in line
  )


def test_tensors_without_parameters_are_left_out(tmp_path):
  def change(stored):
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    stored["model.layers.2.self_attn.masked_bias"] = np.array(
      -np.inf, np.float32
    )  # no parameter, so not looked at

  cfg, weights, _ = write(tmp_path, change=change)
  assert_equal_trees(load(tmp_path, cfg), weights)


def test_the_files_of_the_bare_model(tmp_path):
  """Saved without its head, its names lack the prefix."""

  def change(stored):
    for name in list(stored):
      stored[name.removeprefix("model.")] = stored.pop(name)
    stored["layers.1.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)

  cfg, weights, _ = write(tmp_path / "tied", plain=PLAIN | {"tie_word_embeddings": True}, change=change)
  assert_equal_trees(load(tmp_path / "tied", cfg), weights)
  cfg, weights, _ = write(tmp_path / "head", change=change)
  assert_equal_trees(load(tmp_path / "head", cfg), weights)
  cfg, _, _ = write(tmp_path / "none", change=lambda t: (change(t), t.pop("lm_head.weight")))
  with pytest.raises(CheckpointError, match=r"missing: lm_head.weight \[61, 48\]"):
    load(tmp_path / "none", cfg)


@pytest.mark.parametrize("head", ["absent", "equal", "other", "other type"])
def test_tied_heads(tmp_path, head):
  def change(stored):
    embed = stored["model.embed_tokens.weight"]
    if head != "absent":
      stored["lm_head.weight"] = embed.astype(np.float16) if head == "other type" else embed.copy()
    if head == "other":
      stored["lm_head.weight"][60, 47] *= 1.001

  cfg, weights, _ = write(tmp_path, plain=PLAIN | {"tie_word_embeddings": True}, change=change)
  if head in ("absent", "equal"):
    assert_equal_trees(load(tmp_path, cfg), weights)
    return
  reason = (
    "they differ first in row 60" if head == "other" else "lm_head.weight of model.safetensors is float16"
  )
  with pytest.raises(CheckpointError, match=reason) as e:
    load(tmp_path, cfg)
  assert "tie_word_embeddings" in str(e.value) and "model.embed_tokens.weight" in str(e.value)


def test_a_value_beyond_float16(tmp_path):
  cfg, _, _ = write(tmp_path, change=put(UP, (3, 2), 1e6))
  with pytest.raises(
    CheckpointError,
    match=r"up_proj.weight of model.safetensors: 1e\+06 at \[3, 2\] is beyond the largest float16",
  ):
    load(tmp_path, dataclasses.replace(cfg, dtype="float16"), dtype="float16")


def test_a_bad_value_on_a_mesh_is_named_by_its_place_in_the_file(tmp_path):
  cfg, _, _ = write(tmp_path, plain=PLAIN | dict(vocab_size=62), change=put(UP, (79, 40), np.nan))
  mesh = parallel.make_mesh("fsdp=4,tensor=2")
  with pytest.raises(CheckpointError, match=r"up_proj.weight of model.safetensors: 1 value .*\[79, 40\]"):
    load(tmp_path, cfg, mesh=mesh)


def test_a_lie_about_the_depth_is_refused_before_it_is_believed(tmp_path):
  plain = PLAIN | {"num_hidden_layers": 10**9}
  write(tmp_path)
  with pytest.raises(CheckpointError, match="says 1,000,000,000 layers, but the files hold 3"):
    load(tmp_path, config(plain), plain=plain)


@pytest.mark.parametrize("name", ["num_experts", "num_hidden_layers"])
def test_a_list_of_names_that_no_file_has_is_not_made(tmp_path, name, monkeypatch):
  """Of experts of two numbers, which no bound of sizes sees; the keys, a tensor each, are never made."""
  monkeypatch.setattr(match, "all_keys", lambda *args: pytest.fail("the keys were made"))
  plain = dict(
    model_type="qwen3_moe", vocab_size=8, hidden_size=2, intermediate_size=1, moe_intermediate_size=1
  )
  plain |= dict(num_attention_heads=1, num_key_value_heads=1, head_dim=2, num_hidden_layers=2, num_experts=4)
  plain |= {name: 900 if name == "num_hidden_layers" else 150_000}
  (tmp_path / "config.json").write_text(json.dumps(plain | {"num_experts_per_tok": 2}))
  save_file({"x": np.zeros(10_000_000, np.int8)}, tmp_path / "model.safetensors")
  with pytest.raises(CheckpointError, match=r"asks for [\d,]+ tensors, and the files hold 1"):
    loading.load(tmp_path)


@pytest.mark.parametrize("kinds", [1, 2, 3])
def test_expected_shapes_are_those_of_the_model(kinds):
  """Of every layer, from one of each kind."""
  layers = (Layer(), Layer(POSITIONS["learned"](max_length=9), window=3), Layer(NoPE()))[:kinds]
  cfg = dataclasses.replace(config(), num_layers=6, layers=layers, biases=("q", "head"))
  whole = jax.eval_shape(Transformer(cfg).init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
  assert expected_shapes(cfg) == {path: leaf.shape for path, leaf in tree.flatten(whole).items()}


def test_parameters_do_not_depend_on_the_files(tmp_path):
  """A program that writes over a file in place changes no array, and a donated one is not written through."""
  cfg, weights, _ = write(tmp_path)
  found = load(tmp_path, cfg)
  with open(tmp_path / "model.safetensors", "r+b") as file:
    file.seek(2048)
    file.write(b"\xff" * 20_000)
  assert_equal_trees(found, weights)
  doubled = jax.jit(lambda p: jax.tree.map(lambda x: 2 * x, p), donate_argnums=0)(found)
  assert_equal_trees(doubled, jax.tree.map(lambda x: 2 * x, weights))


def test_what_was_loaded_is_said(tmp_path, caplog):
  cfg, weights, _ = write(tmp_path)
  with caplog.at_level("INFO", logger="jaxllm"):
    load(tmp_path, cfg)
  said = caplog.text
  assert (
    f"tiny of {tree.num_parameters(weights):,} parameters" in said
    and "float32" in said
    and "[out, in]" in said
  )
