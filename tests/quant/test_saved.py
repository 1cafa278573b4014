"""Quantized checkpoints: every scheme reopens bit-equal, on a mesh too, in files of any layout; what is damaged is named."""

import dataclasses
import json
import zlib

import jax
import ml_dtypes
import numpy as np
import pytest
from model_cases import MODELS
from model_cases import params as params_of
from quantization_table import about, measured, refused
from safetensors.numpy import load_file, save_file

from jaxllm import hf, parallel, quant, tree
from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.generate.loop import generate
from jaxllm.hf import families
from jaxllm.hf.saving import weight_bytes
from jaxllm.leaf import QTensor, dense
from jaxllm.nn import Transformer
from jaxllm.nn.shapes import expected_shapes
from jaxllm.train.checkpoint import Checkpoints

ONE = MODELS["rope"].layers[:1]
CFG = dataclasses.replace(MODELS["rope"], num_layers=2, layers=ONE, vocab_size=30)  # 4 do not divide it
WIDE = dataclasses.replace(CFG, embed_dim=256, head_dim=64, mlp_dim=256, vocab_size=64)
"""Wide enough for the blocks of any scheme, on any of the meshes."""
HEAD = [("head", True)]
MESHES = {"fsdp=2,tensor=4": "fsdp_tensor", "tensor=2": "tensor"}
WEIGHT = "model.layers.1.mlp.up_proj.weight"


def quantized(cfg, name="int8", rules=HEAD, **fields):
  return quant.apply(params_of(cfg), quant.SCHEMES[name](**fields), rules)


def bits(params):
  """{path: (scheme or none, {part: (type, shape, bytes)})} of a tree, matrices as [in, out]."""
  found = {}
  for path, leaf in tree.flatten(jax.device_get(params)).items():
    parts = leaf.parts if isinstance(leaf, QTensor) else {"": np.asarray(dense(leaf))}
    kinds = {name: (str(x.dtype), x.shape, np.asarray(x).tobytes()) for name, x in parts.items()}
    found[path] = getattr(leaf, "scheme", None), kinds
  return found


def text(cfg, params):
  return generate(
    Transformer(cfg), params, [[5, 9, 2, 7, 1], [3, 3, 8]], max_new_tokens=8, stop_ids=()
  ).tokens


FIELDS = [(name, {}) for name in quant.SCHEMES]
FIELDS += [("nf4", dict(double_quant=True)), ("llm_int8", dict(features=(3, 200)))]


@pytest.mark.core
@pytest.mark.parametrize(("name", "fields"), FIELDS)
def test_every_scheme_reopens_bit_equal_alone_and_on_two_meshes(tmp_path, name, fields):
  row = " ".join([name, *fields])
  about("saved", row)
  params = quantized(WIDE, name, **fields)
  expected = bits(params)
  hf.save(tmp_path, WIDE, params)
  cfg, found = hf.load(tmp_path)
  assert families.differences(WIDE, cfg) == []
  assert weight_bytes(WIDE, params) == (tmp_path / "model.safetensors").stat().st_size
  trees = [bits(found)]
  for axes, rules in MESHES.items():
    mesh = parallel.make_mesh(axes, jax.devices()[: 2 if axes == "tensor=2" else 8])
    _, placed = hf.load(tmp_path, mesh=mesh)
    wanted = parallel.layout(params, mesh, parallel.RULES[rules], WIDE)
    assert [x.sharding for x in jax.tree.leaves(placed)] == [x.sharding for x in jax.tree.leaves(wanted)]
    trees.append(bits(parallel.unpad(placed, WIDE)))
  assert trees == [expected] * 3
  measured("saved", row, arrays=3 * len(jax.tree.leaves(params)), differ=0, meshes=len(MESHES))


@pytest.mark.parametrize(
  "name", [pytest.param(x, marks=[pytest.mark.slow] * (x != "int8")) for x in quant.SCHEMES]
)
def test_what_is_loaded_generates_the_text_of_what_was_saved(tmp_path, name):
  """In float32 and from a mesh, too; saved from there it is the same file."""
  about("saved", name)
  own = CFG if name == "int8" else WIDE
  params = quantized(own, name)
  hf.save(tmp_path / "a", own, params)
  expected, mesh = text(own, params), parallel.make_mesh("fsdp=2,tensor=4")
  assert text(*hf.load(tmp_path / "a", dtype="float32")) == expected
  cfg, found = hf.load(tmp_path / "a", mesh=mesh)
  with jax.set_mesh(mesh):
    assert text(cfg, found) == expected
  measured("saved", name, tokens=2 * sum(map(len, expected)), other_tokens=0)
  hf.save(tmp_path / "b", cfg, found)
  one, other = (path / "model.safetensors" for path in (tmp_path / "a", tmp_path / "b"))
  assert one.read_bytes() == other.read_bytes()


def test_several_schemes_types_and_files(tmp_path):
  """Parts keep their types whatever the rest is loaded in, and several files hold them."""
  rules = [(r"layers/0/attn/q/w", quant.SCHEMES["int8_asym"]()), (r"layers/0/mlp/.+", False)]
  half = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params_of(CFG))
  params = quant.apply(half, quant.SCHEMES["int8_tensor"](), rules)
  hf.save(tmp_path, dataclasses.replace(CFG, dtype="bfloat16"), params, max_shard_bytes=4000)
  files = list(tmp_path.glob("*.safetensors"))
  assert len(files) > 2
  planned = weight_bytes(dataclasses.replace(CFG, dtype="bfloat16"), params, max_shard_bytes=4000)
  assert planned == sum(path.stat().st_size for path in files) > weight_bytes(CFG, params)
  assert bits(hf.load(tmp_path)[1]) == bits(params)
  cfg, found = hf.load(tmp_path, dtype="float32")
  floats = tree.flatten(params) | {
    path: leaf.astype(np.float32)
    for path, leaf in tree.flatten(params).items()
    if not isinstance(leaf, QTensor)
  }
  assert cfg.dtype == "float32" and bits(found) == bits(tree.unflatten(floats))


PLAIN = dict(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
LLAMA = PLAIN | dict(num_key_value_heads=2, tie_word_embeddings=False)
LAYOUTS = {
  "q, k and v, gate and up one after the other": LLAMA | dict(model_type="phi3", pad_token_id=None),
  "q, k and v a head at a time": PLAIN | dict(model_type="gpt_neox"),
  "as [in, out], the embedding the head": dict(
    **dict(model_type="gpt2", vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=64)
  ),
  "an expert a tensor": LLAMA | dict(model_type="mixtral", num_local_experts=3, num_experts_per_tok=2),
  "all experts in one, gate and up in turn": LLAMA
  | dict(model_type="gpt_oss", num_local_experts=3, num_experts_per_tok=2, head_dim=8, sliding_window=9),
}


@pytest.mark.parametrize("plain", LAYOUTS.values(), ids=LAYOUTS)
def test_weights_that_share_a_tensor_or_have_several_are_apart(tmp_path, plain):
  family, cfg = families.read_config(plain)
  rules = [(r"layers/0/(attn/k|mlp/(experts/)?up)/w", False)]
  draw = lambda path, shape: np.random.default_rng(zlib.crc32(path.encode())).standard_normal(
    shape, np.float32
  )
  params = tree.unflatten({path: draw(path, shape) for path, shape in expected_shapes(cfg).items()})
  params = quant.apply(params, quant.SCHEMES["int8_asym"](), rules)
  hf.save(tmp_path, cfg, params, family=family.name)
  assert weight_bytes(cfg, params, family=family.name) == (tmp_path / "model.safetensors").stat().st_size
  assert bits(hf.load(tmp_path)[1]) == bits(params)
  mesh = parallel.make_mesh("tensor=2", jax.devices()[:2])
  assert bits(hf.load(tmp_path, mesh=mesh)[1]) == bits(params)


def test_the_files_are_as_they_are_said_to_be(tmp_path):
  params = quantized(CFG)
  hf.save(tmp_path, CFG, params)
  stored = load_file(tmp_path / "model.safetensors")
  w = params["layers"]["1"]["mlp"]["up"]["w"]
  np.testing.assert_array_equal(stored[WEIGHT], w.parts["value"])
  np.testing.assert_array_equal(stored[f"{WEIGHT}_scale"], w.parts["scale"])
  (one,) = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["schemes"]
  assert (one["scheme"], one["fields"]) == ("Int8", {"per": "column", "symmetric": True})
  assert one["weights"] == [path for path, leaf in tree.flatten(params).items() if isinstance(leaf, QTensor)]


def test_transformers_refuses_it(tmp_path):
  """It ignores a quant_method that it does not know, and then takes integers for weights."""
  transformers = pytest.importorskip("transformers")
  hf.save(tmp_path, CFG, quantized(CFG))
  for kind in (transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM):
    with pytest.raises(ValueError, match="quant_method"):
      kind.from_pretrained(tmp_path)


def settings(**changes):
  """Another quantization_config, or others in its one entry."""

  def damage(directory):
    path = directory / "config.json"
    plain = json.loads(path.read_text())
    own = plain["quantization_config"]
    if "entry" in changes:
      own["schemes"][0] |= changes["entry"]
    else:
      own |= changes
    path.write_text(json.dumps(plain))

  return damage


def tensors(change):
  """Other tensors."""

  def damage(directory):
    path = directory / "model.safetensors"
    stored = {name: x.copy() for name, x in load_file(path).items()}
    change(stored)
    save_file(stored, path)

  return damage


def put(name, make):
  return tensors(lambda stored: stored.__setitem__(name, make(stored.get(name))))


def cut(directory):
  path = directory / "model.safetensors"
  path.write_bytes(path.read_bytes()[:-8])


SCALE = f"{WEIGHT}_scale"
HELD = "layers/0/attn/q/w"
BAD = {
  "a part is missing": (
    tensors(lambda stored: stored.pop(SCALE)),
    CheckpointError,
    rf"missing: {SCALE} \[40, 1\]",
  ),
  "the numbers are missing": (
    tensors(lambda stored: stored.pop(WEIGHT)),
    CheckpointError,
    rf"missing: {WEIGHT} \[40, 24\]",
  ),
  "a part too many": (
    put(f"{WEIGHT}_zero", lambda _: np.zeros((40, 1), np.int8)),
    CheckpointError,
    rf"unexpected: {WEIGHT}_zero of model.safetensors \[40, 1\]",
  ),
  "of another shape": (
    put(SCALE, lambda x: x[:20].copy()),
    CheckpointError,
    rf"shape: {SCALE} of .* is \[20, 1\], expected \[40, 1\]",
  ),
  "numbers of another type": (
    put(WEIGHT, lambda x: x.astype(np.float32)),
    CheckpointError,
    rf"type: {WEIGHT} of .* is float32, expected int8",
  ),
  "unsigned numbers": (
    put(WEIGHT, lambda x: x.view(np.uint8)),
    CheckpointError,
    rf"type: {WEIGHT} of .* is uint8, expected int8",
  ),
  "a scale of another type": (
    put(SCALE, lambda x: x.astype(np.float16)),
    CheckpointError,
    rf"type: {SCALE} of .* is float16, expected float32",
  ),
  "a scale that is no number": (
    put(SCALE, lambda x: np.where(np.arange(40)[:, None] == 3, np.nan, x).astype(np.float32)),
    CheckpointError,
    rf"{SCALE} of .*: 1 value is NaN or infinite, the first at \[3, 0\]",
  ),
  "cut short": (cut, CheckpointError, "cut short"),
  "of another format": (
    settings(format="gguf"),
    ConfigError,
    "quantization_config: found .* format = 'jaxllm'",
  ),
  "of a method": (
    settings(quant_method="gptq"),
    ConfigError,
    "quantization_config: found .*quantized checkpoints of others are not read",
  ),
  "another setting": (settings(bits=8), ConfigError, "unknown settings.*quantization_config.bits = 8"),
  "no schemes": (settings(schemes=3), ConfigError, r"quantization_config.schemes: found 3, expected a list"),
  "an unknown scheme": (
    settings(entry=dict(scheme="Int5")),
    ConfigError,
    r"quantization_config.schemes\[0\].scheme: found .*Int5.*, expected one of Int8",
  ),
  "an unknown field": (
    settings(entry=dict(fields=dict(per="column", bits=8))),
    ConfigError,
    r"schemes\[0\].fields: found .*, expected per, symmetric, each once",
  ),
  "a field of another value": (
    settings(entry=dict(fields=dict(per="row", symmetric=True))),
    ConfigError,
    r"schemes\[0\].fields: Int8.per: found 'row', expected one of column, tensor",
  ),
  "a field that is an object": (
    settings(entry=dict(fields=dict(per={}, symmetric=True))),
    ConfigError,
    r"schemes\[0\].fields: Int8.per: found {}",
  ),
  "weights that are not the model's": (
    settings(entry=dict(weights=["layers/7/mlp/up/w"])),
    ConfigError,
    "expected parameters of the model, each once: not .*layers/7/mlp/up/w",
  ),
  "a weight twice": (
    settings(entry=dict(weights=["head", "head"])),
    ConfigError,
    "weights: found .*different",
  ),
  "a weight of two schemes": (
    settings(
      schemes=2 * [{"scheme": "Int8", "fields": {"per": "column", "symmetric": True}, "weights": [HELD]}]
    ),
    ConfigError,
    rf"schemes\[1\].weights: found .*expected parameters of the model, each once: not .*{HELD}",
  ),
  "a vector": (
    settings(entry=dict(weights=["final_norm/scale"])),
    ConfigError,
    r"final_norm/scale: Int8.* cannot hold a weight of \(24,\)",
  ),
  "a weight that is not quantized": (
    settings(entry=dict(weights=["head"])),
    CheckpointError,
    "is int8, expected float32",
  ),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
  directory = tmp_path_factory.mktemp("good")
  hf.save(directory, CFG, quantized(CFG))
  (directory / "SHA256SUMS").unlink()  # it would tell of each before anything is read
  return directory


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused_by_name(tmp_path, good, name):
  damage, error, reason = BAD[name]
  for path in good.iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  damage(tmp_path)
  with pytest.raises(error, match=f"(?s){tmp_path}.*{reason}") as caught:
    hf.load(tmp_path)
  refused(f"a file: {name}", caught.value, at=tmp_path)


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
  @dataclasses.dataclass(frozen=True)
  class Own(quant.Int8):
    """A scheme that nobody else knows."""

  save = lambda params: hf.save(tmp_path / "a", CFG, tree.unflatten(params))
  flat = tree.flatten(quantized(CFG))
  with pytest.raises(CheckpointError, match=r"head: found a weight of .*Own\(.*, expected a scheme of Int8"):
    save(flat | {"head": QTensor(flat["head"].parts, Own())})
  parts = flat["head"].parts
  with pytest.raises(
    CheckpointError, match=r"head: found the parts {'value': 'int8\[30, 24\]'}, expected .*scale"
  ):
    save(flat | {"head": QTensor({"value": parts["value"]}, flat["head"].scheme)})
  with pytest.raises(CheckpointError, match="head: QTensor"):
    save(flat | {"head": QTensor(parts | {"value": parts["value"].astype("int4")}, flat["head"].scheme)})
  with pytest.raises(CheckpointError, match=r"head/scale: .*NaN"):
    save(flat | {"head": QTensor(parts | {"scale": parts["scale"] * np.nan}, flat["head"].scheme)})
  assert not list(tmp_path.rglob("config.json"))


@pytest.mark.parametrize("name", quant.SCHEMES)
def test_a_checkpoint_of_training_holds_it(tmp_path, name):
  state = {"params": quantized(WIDE, name), "step": np.int32(3)}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(3, state)
    found = checkpoints.restore(jax.tree.map(np.zeros_like, state))
    assert bits(found["params"]) == bits(state["params"])
    with pytest.raises(CheckpointError, match="params/head: found nothing, expected float32"):
      checkpoints.restore({"params": params_of(WIDE), "step": np.int32(0)})


def test_a_field_that_json_has_not_is_named_and_nothing_is_written(tmp_path):
  params = quant.apply(params_of(CFG), quant.SCHEMES["llm_int8"](threshold=float("inf")))
  with pytest.raises(CheckpointError, match=r"layers/0/.*: found threshold = inf of LlmInt8"):
    hf.save(tmp_path / "out", CFG, params)
  assert not (tmp_path / "out" / "config.json").exists()
