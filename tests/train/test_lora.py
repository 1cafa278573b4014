"""LoRA: the identity at first, gradients to the factors alone, merged and unmerged, over quantized weights, and beside peft."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import MODELS
from model_cases import params as params_of
from quantization_table import about, close, differ, measured, refused

from jaxllm import hf, parallel, quant, tree
from jaxllm.errors import CheckpointError, ConfigError, QuantError
from jaxllm.generate.loop import generate
from jaxllm.leaf import LoRA, Matrix, QTensor, dense
from jaxllm.nn import Transformer
from jaxllm.nn.transformer import head
from jaxllm.ops.losses import cross_entropy
from jaxllm.train import lora
from jaxllm.train.checkpoint import Checkpoints
from jaxllm.train.step import TrainConfig, init_state, make_step

CFG = dataclasses.replace(MODELS["rope"], num_layers=2, layers=MODELS["rope"].layers[:1], vocab_size=30)
HEAD = [*lora.ALL_LINEAR, ("head", True)]
KEY = jax.random.key(0)
IDS = np.array([[5, 9, 2, 7, 1, 3, 3, 8]])


def stored(params):
  value = lambda w: Matrix(np.ascontiguousarray(np.swapaxes(w, -1, -2)))
  flat = tree.flatten(params)
  return tree.unflatten({path: value(w) if path.endswith("/w") else w for path, w in flat.items()})


BASES = {
  "arrays": lambda params: params,
  "matrices": stored,
  "bfloat16": lambda params: jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params),
  **{
    name: lambda params, name=name: quant.apply(params, quant.SCHEMES[name]())
    for name in ("int8", "int8_asym")
  },
}
SLOW = (
  "matrices",
  "bfloat16",
  "int8",
)  # arrays and int8_asym have it all between them but the layout and the type
each_base = pytest.mark.parametrize(
  "base", [pytest.param(base, marks=[pytest.mark.slow] * (base in SLOW)) for base in BASES]
)


def applied(base, rules=HEAD, **kwargs):
  return lora.apply(BASES[base](params_of(CFG)), rules, **dict(rank=4, alpha=8.0, key=KEY) | kwargs)


def trained(params, seed=1):
  """As after training: factors that are not 0."""
  rng = np.random.default_rng(seed)
  draw = lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype)
  return lora.with_adapters(params, jax.tree.map(draw, lora.adapters(params)))


@jax.jit
def logits(params):
  return Transformer(CFG).apply({"params": params}, IDS)[0]


def loss_of(params):
  hidden_BTD, _ = Transformer(CFG).apply({"params": params}, IDS[:, :-1], logits=None)
  return jnp.mean(cross_entropy(hidden_BTD, head(CFG, params), IDS[:, 1:])[0])


gradient = jax.jit(jax.grad(loss_of))


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.mark.core
@each_base
def test_it_is_the_identity_at_first_and_unmerged_it_is_the_base(base):
  about("lora", base)
  params, plain = applied(base), BASES[base](params_of(CFG))
  found, expected = logits(params), logits(plain)
  assert differ(found, expected) == 0
  assert sum(isinstance(x, LoRA) for x in tree.flatten(params).values()) == 7 * 2 + 1
  assert tree.diff(plain, params) == []
  assert np.abs(logits(trained(params)) - expected).max() > 0.1  # factors that are trained do change it
  same(lora.unmerge(trained(params)), plain)
  measured("lora", base, logits=found.size, differ=0, unmerged=len(jax.tree.leaves(plain)), differ_of_it=0)
  with pytest.raises(ConfigError, match=r"found no weight with LoRA, .* not a merged tree"):
    lora.unmerge(lora.merge(params))


def test_the_first_factor_is_uniform_within_the_width_and_of_its_path_alone():
  w = np.zeros((400, 300), np.float32)
  params = lora.apply({"x": {"w": w}, "y": {"w": w}}, [(".+/w", True)], rank=200, alpha=1, key=KEY)
  a = np.asarray(params["x"]["w"].a)
  assert a.shape == (400, 200) and params["x"]["w"].b.shape == (200, 300) and not params["x"]["w"].b.any()
  # uniform in (-0.05, 0.05), 80,000 draws: 5 standard errors of the mean, and of the variance
  assert 0.0499 < np.abs(a).max() <= 0.05 and abs(a.mean()) < 5 * 0.05 / np.sqrt(3 * a.size)
  assert abs(a.var() / (0.05**2 / 3) - 1) < 5 * np.sqrt(0.8 / a.size)
  assert not np.array_equal(a, params["y"]["w"].a)
  one = lora.apply({"x": {"w": w}, "y": {"w": w}}, [("x/w", True)], rank=200, alpha=1, key=KEY)
  np.testing.assert_array_equal(one["x"]["w"].a, a)


@pytest.mark.core
@each_base
def test_merged_it_computes_the_same(base):
  about("lora", base)
  params = trained(applied(base))
  merged, found = lora.merge(params), logits(params)
  for path, leaf in tree.flatten(params).items():
    if isinstance(leaf, LoRA):
      one = tree.flatten(merged)[path]
      expected = np.asarray(dense(leaf.base), np.float64) + 2 * np.asarray(leaf.a, np.float64) @ np.asarray(
        leaf.b
      )
      bound = 2**-8 if base == "bfloat16" else 1e-6  # half a unit in the last place
      assert np.abs(np.asarray(dense(one), np.float64) - expected).max() <= bound * np.abs(expected).max()
      kept = leaf.base if not isinstance(leaf.base, QTensor) else dense(leaf.base)
      assert (type(one), one.dtype) == (
        type(jnp.asarray(kept)) if not isinstance(kept, Matrix) else Matrix,
        kept.dtype,
      )
  if base != "bfloat16":
    error = np.abs(logits(merged) - found).max() / np.abs(found).max()
    assert error <= 1e-5
    measured("lora", base, merged=error)


def test_merged_into_bfloat16_each_weight_is_rounded_and_the_least_are_lost():
  """Within 2^-8 of each weight, as documented; a float32 copy of the base has them to 1e-6."""
  rng = np.random.default_rng(0)
  base = jnp.asarray(rng.standard_normal((64, 48)), jnp.bfloat16)
  a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((64, 4), (4, 48)))
  exact = lambda size: np.asarray(base, np.float64) + 2 * a.astype(np.float64) @ (size * b)
  merged = lambda base, size: np.asarray(
    lora.merge({"x": {"w": LoRA(base, jnp.asarray(a), jnp.asarray(size * b), 2.0)}})["x"]["w"], np.float64
  )
  error = np.abs(merged(base, 0.1) - exact(0.1)) / np.abs(exact(0.1))
  assert 2**-9 < error.max() <= 2**-8
  whole = jnp.asarray(base, jnp.float32)
  assert np.abs(merged(whole, 0.1) - exact(0.1)).max() <= 1e-6 * np.abs(exact(0.1)).max()
  # all that is added is below 2^-9 of the least weight: nothing of it is left in bfloat16
  small = np.float32(2.0**-10 * np.abs(np.asarray(base, np.float64)).min() / np.abs(2 * a @ b).max())
  np.testing.assert_array_equal(merged(base, small), np.asarray(base, np.float64))
  assert np.any(merged(whole, small) != np.asarray(base, np.float64))


@each_base
def test_gradients_are_of_the_factors_and_those_of_the_merged_weights(base):
  """d loss / d a = scale G b^T and d loss / d b = scale a^T G, with G that of the merged weight, in float32."""
  params = trained(applied(base))
  found = jax.jit(jax.grad(lambda new: loss_of(lora.with_adapters(params, new))))(lora.adapters(params))
  whole = jax.tree.map(
    lambda x: jnp.asarray(dense(x), jnp.float32), params, is_leaf=lambda x: isinstance(x, LoRA)
  )
  expected = tree.flatten(gradient(whole))
  tolerance = 0.05 if base == "bfloat16" else 1e-4
  for path, leaf in tree.flatten(params).items():
    if isinstance(leaf, LoRA):
      g = np.asarray(dense(expected[path]))
      pairs = {"a": leaf.scale * g @ leaf.b.T, "b": leaf.scale * leaf.a.T @ g}
      for name, wanted in pairs.items():
        error = np.abs(tree.flatten(found)[f"{path}/{name}"] - wanted).max()
        assert error <= tolerance * np.abs(wanted).max(), (path, name, error)


def test_no_gradient_reaches_a_base():
  params = trained(applied("arrays"))
  grads = tree.flatten(gradient(params))
  held = [g for g in grads.values() if isinstance(g, LoRA)]
  assert held and not any(np.any(g.base) for g in held) and all(np.any(g.a) and np.any(g.b) for g in held)
  assert np.any(grads["embed"]) and np.any(grads["layers/0/attn_norm/scale"])


@pytest.mark.parametrize("name", ["int8", pytest.param("nf4", marks=pytest.mark.slow)])
def test_training_over_integers_lowers_the_loss_changes_the_factors_only_and_resumes(tmp_path, name):
  """QLoRA by `make_step`: norms and embeddings, which are floats, stay as they are, too."""
  scheme = quant.SCHEMES[name](**(dict(block=8, double_quant=True) if name == "nf4" else {}))
  base = quant.apply(params_of(CFG), scheme)
  model, config = Transformer(CFG), TrainConfig(30, 1, 7, learning_rate=3e-2, warmup=0.0)
  fresh = lambda: jax.tree.map(jnp.array, lora.apply(base, HEAD, rank=4, alpha=8.0, key=KEY))
  state, step, losses = init_state(model, config, 0, fresh()), make_step(model, config), []
  moments = [x for x in jax.tree.leaves(state["opt"]) if x.ndim]
  assert sum(x.size for x in moments) == 2 * sum(x.size for x in jax.tree.leaves(lora.adapters(fresh())))
  for _ in range(20):
    state, loss = step(state, IDS)
    losses.append(float(loss))
  assert losses[0] == pytest.approx(float(loss_of(fresh())), rel=1e-5) and losses[-1] < 0.5 * losses[0]
  same(lora.unmerge(state["params"]), base)
  factors = tree.flatten(lora.adapters(state["params"]))
  assert all(np.any(x != tree.flatten(lora.adapters(fresh()))[path]) for path, x in factors.items())
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(20, state)
    same(checkpoints.restore(jax.tree.map(jnp.zeros_like, state)), state)


@pytest.mark.parametrize("base", [pytest.param("matrices", marks=pytest.mark.slow), "int8"])
def test_on_a_mesh_factors_lie_as_the_dimension_they_share(base):
  params = trained(applied(base))
  mesh = parallel.make_mesh("fsdp=2,tensor=4")
  placed = parallel.shard(params, mesh, parallel.RULES["fsdp_tensor"], CFG)
  up, top = tree.flatten(placed)["layers/0/mlp/up/w"], placed["head"]
  assert (tuple(up.a.sharding.spec), tuple(up.b.sharding.spec)) == (("fsdp",), (None, "tensor"))
  assert top.shape == (24, 32) and top.b.shape == (4, 32)  # 4 do not divide the vocabulary
  same(parallel.unpad(placed, CFG), params)
  assert "mlp/up/w" in parallel.report(placed)
  text = lambda params: generate(Transformer(CFG), params, [[5, 9, 2]], max_new_tokens=6, stop_ids=()).tokens
  with jax.set_mesh(mesh):
    assert text(placed) == text(params)


def test_scanned_layers_have_it():
  params = trained(applied("int8"))
  stacked = tree.stack_layers(params, 1)
  assert stacked["blocks"]["0"]["mlp"]["up"]["w"].shape == (2, 24, 40)
  found = jax.jit(lambda p: Transformer(CFG, scan=True).apply({"params": p}, IDS)[0])(stacked)
  expected = logits(params)
  assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
  same(lora.adapters(tree.unstack_layers(stacked)), lora.adapters(params))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(rules=[("layers/9/.+", True)]), r"rules: 'layers/9/.\+' matches no parameter"),
    (dict(rules=["head"]), "rules: found 'head', expected pairs of a regular expression and True or False"),
    (dict(rules=[("*", True)]), r"rules: found '\*', expected a regular expression: nothing to repeat"),
    (dict(rank=True), "rank: found True, expected an integer"),
    (dict(alpha="8"), "alpha: found '8', expected a finite number above 0"),
    (dict(rules=[("head", 8)]), "rules: found 8 for 'head', expected True or False"),
    (dict(rules=[(".+", False)]), "rules: no parameter gets LoRA"),
    (dict(rules=[("embed", True)]), r"embed: found \(30, 24\), expected a matrix that all rows"),
    (dict(rules=[(".+_norm/scale", True)]), r"norm/scale: found \(24,\), expected a matrix"),
    (dict(rank=0), "rank: found 0, expected an integer from 1 to 24, as .* is "),
    (dict(rank=25), "rank: found 25, expected an integer from 1 to 24, as .* is "),
    (dict(rank=2.0), "rank: found 2.0, expected an integer"),
    (dict(alpha=0), "alpha: found 0, expected a finite number above 0"),
    (dict(alpha=float("nan")), "alpha: found nan"),
  ],
)
def test_what_cannot_be_is_refused(change, message):
  with pytest.raises(ConfigError, match=message) as caught:
    applied("arrays", **change)
  refused(f"lora, {change}", caught.value)


def test_other_trees_and_weights_that_have_it_are_refused(tmp_path):
  params = applied("arrays")
  with pytest.raises(ConfigError, match=r"found a weight with LoRA, expected one without; merge or unmerge"):
    lora.apply(params, rank=2, alpha=2, key=KEY)
  with pytest.raises(ConfigError, match="found no weight with LoRA"):
    lora.adapters(params_of(CFG))
  with pytest.raises(
    ConfigError, match=r"adapters: not those of the parameters: .*head/a is \(24, 2\), expected \(24, 4\)"
  ):
    lora.with_adapters(params, lora.adapters(applied("arrays", rank=2)))
  with pytest.raises(QuantError, match=r"found a weight with LoRA, .* quantize it before lora.apply"):
    quant.apply(params, quant.SCHEMES["int8"]())
  with pytest.raises(
    ConfigError, match=r"layers/0/.*: found a quantized weight without LoRA, .* take lora.apply"
  ):
    init_state(Transformer(CFG), TrainConfig(2, 1, 7), 0, BASES["int8"](params_of(CFG)))
  with pytest.raises(CheckpointError, match=r"head: found a weight with LoRA, .* give train.lora.merge"):
    hf.save(tmp_path, CFG, params)
  assert len(quant.report(applied("int8"))) == 14
  experts = params_of(MODELS["experts"])
  with pytest.raises(ConfigError, match=r"experts/.*: found \(5, .*, expected a matrix that all rows"):
    lora.apply(experts, [(r".+/experts/.+/w", True)], rank=2, alpha=2, key=KEY)


def test_outputs_and_merged_weights_are_those_of_peft(tmp_path):
  """A Llama with adapters that are not 0, by peft's own forward pass and its merge; and the range that its `a` starts in."""
  peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  torch.manual_seed(0)
  sizes = dict(
    vocab_size=31, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3
  )
  theirs = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(num_key_value_heads=1, head_dim=8, **sizes)
  ).eval()
  theirs.save_pretrained(tmp_path)
  cfg, params = hf.load(tmp_path)
  names = {"q": "q_proj", "v": "v_proj", "down": "down_proj"}
  adapted = peft.get_peft_model(
    theirs, peft.LoraConfig(r=5, lora_alpha=15, target_modules=list(names.values()))
  )
  params = lora.apply(params, [(r"layers/\d+/.+/(q|v|down)/w", True)], rank=5, alpha=15, key=KEY)
  new = {}
  for path, leaf in tree.flatten(params).items():
    if isinstance(leaf, LoRA):
      _, i, block, name, _ = path.split("/")
      block = {"attn": "self_attn"}.get(block, block)
      layer = adapted.get_submodule(f"base_model.model.model.layers.{i}.{block}.{names[name]}")
      a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
      for factor in (a.detach().numpy(), leaf.a):  # Kaiming's range of both
        assert 0.8 < np.abs(factor).max() * np.sqrt(leaf.shape[0]) <= 1
      assert not b.any() and layer.scaling["default"] == leaf.scale
      torch.nn.init.normal_(a, std=0.3)
      torch.nn.init.normal_(b, std=0.3)
      new |= {f"{path}/a": a.detach().numpy().T, f"{path}/b": b.detach().numpy().T}
  params = lora.with_adapters(params, tree.unflatten(new))
  ids = np.random.default_rng(0).integers(0, 31, (2, 9))
  run = jax.jit(lambda params: Transformer(cfg).apply({"params": params}, ids)[0])
  with torch.no_grad():
    expected = adapted(torch.tensor(ids)).logits.numpy()
  close("peft: LoRA, logits", run(params), expected, 1e-5, whole=True)
  assert np.abs(run(lora.unmerge(params)) - expected).max() > 0.1 * np.abs(expected).max()
  adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
  assert json.loads((tmp_path / "merged" / "config.json").read_text())["vocab_size"] == 31
  merged = tree.flatten(hf.load(tmp_path / "merged")[1])
  for path, leaf in tree.flatten(lora.merge(params)).items():
    close("peft: LoRA, merged weights", dense(leaf), dense(merged[path]), 2e-7, whole=True)
