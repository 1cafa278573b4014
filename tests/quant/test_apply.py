"""quant.apply: which weights are held, what is refused, and models that run on such trees as on any other."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import MODELS
from model_cases import params as params_of

from jaxllm import quant, tree
from jaxllm.errors import QuantError
from jaxllm.generate.loop import generate
from jaxllm.leaf import Matrix, QTensor
from jaxllm.nn import Transformer

INT8 = quant.SCHEMES["int8"]()
PROMPTS = [[5, 9, 2, 7, 1], [3, 3, 8]]


ONE = MODELS["rope"].layers[:1]


@pytest.fixture(scope="module")
def model():
  cfg = dataclasses.replace(MODELS["rope"], num_layers=2, layers=ONE)
  return cfg, params_of(cfg)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(cfg, params):
  return Transformer(cfg).apply({"params": params}, np.array([PROMPTS[0]]))[0]


def held(params):
  return {path for path, leaf in tree.flatten(params).items() if isinstance(leaf, QTensor)}


def dequantized(params):
  return jax.tree.map(quant.dequantize, params, is_leaf=lambda x: isinstance(x, QTensor))


@pytest.mark.core
def test_matrices_of_layers_are_held_and_nothing_else(model):
  _, params = model
  found = quant.apply(params, INT8)
  flat = tree.flatten(params)
  assert held(found) == {path for path in flat if path.endswith("/w")} and held(params) == set()
  assert tree.diff(params, found, dtypes=False) == []
  assert all(tree.flatten(found)[path] is flat[path] for path in flat if path not in held(found))


def test_rules_come_before_the_default_and_may_name_schemes(model):
  _, params = model
  other = quant.SCHEMES["int8_tensor"]()
  rules = [(r"layers/0/.+", False), (r"layers/1/attn/q/w", other), ("head", True)]
  flat = tree.flatten(quant.apply(params, INT8, rules))
  assert not isinstance(flat["layers/0/attn/q/w"], QTensor) and isinstance(flat["head"], QTensor)
  assert flat["layers/1/attn/q/w"].scheme == other and flat["layers/1/attn/k/w"].scheme == INT8


@pytest.mark.core
@pytest.mark.parametrize("name", ["int8", "int8_tensor", "int8_asym"])
def test_logits_and_text_are_those_of_the_weights_that_are_held(model, name):
  cfg, params = model
  found = quant.apply(params, quant.SCHEMES[name](), rules=[("head", True)])
  plain = dequantized(found)
  expected, logits = logits_of(cfg, plain), logits_of(cfg, found)
  assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()
  assert np.abs(logits - logits_of(cfg, params)).max() > 1e-4 * np.abs(expected).max()
  if name != "int8_tensor":
    text = lambda params: generate(Transformer(cfg), params, PROMPTS, max_new_tokens=12, stop_ids=()).tokens
    assert text(found) == text(plain)


GROUPED = [("int4", 8), ("int4_asym", 4), ("int3", 8), ("int3_asym", 4)]


@pytest.mark.parametrize(
  ("name", "group"),
  [
    pytest.param(*x, marks=[pytest.mark.slow] * (x[0] in ("int4_asym", "int3", "int3_asym"))) for x in GROUPED
  ],
)
def test_logits_are_those_of_weights_that_are_held_by_groups(name, group):
  cfg = dataclasses.replace(MODELS["rope"], num_layers=1, layers=ONE)
  found = quant.apply(params_of(cfg), quant.SCHEMES[name](group=group))
  expected, logits = logits_of(cfg, dequantized(found)), logits_of(cfg, found)
  assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "group"), GROUPED)
def test_text_is_that_of_weights_that_are_held_by_groups(model, name, group):
  cfg, params = model
  found = quant.apply(params, quant.SCHEMES[name](group=group))
  text = lambda params: generate(Transformer(cfg), params, PROMPTS, max_new_tokens=12, stop_ids=()).tokens
  assert text(found) == text(dequantized(found))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int4", "w8a8", "zeroquant", "llm_int8"])
def test_a_mixture_of_experts_runs_on_every_kind_of_product(name):
  cfg = MODELS["experts"]
  params = params_of(cfg)
  found = quant.apply(params, quant.SCHEMES[name](**(dict(group=4) if name in ("int4", "zeroquant") else {})))
  expected, logits = logits_of(cfg, dequantized(found)), logits_of(cfg, found)
  error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
  assert error <= (1e-5 if name == "int4" else 0.1)


def test_a_matrix_as_files_have_it_is_held_as_the_same_numbers(model):
  _, params = model
  stored = tree.unflatten(
    {
      path: Matrix(jnp.swapaxes(leaf, -1, -2)) if path.endswith("/w") else leaf
      for path, leaf in tree.flatten(params).items()
    }
  )
  jax.tree.map(np.testing.assert_array_equal, quant.apply(params, INT8), quant.apply(stored, INT8))


def test_a_mixture_of_experts_runs_on_held_weights():
  cfg = MODELS["experts"]
  params = params_of(cfg)
  found = quant.apply(params, INT8)
  assert any("experts" in path for path in held(found)) and not any("router" in path for path in held(found))
  expected, logits = logits_of(cfg, dequantized(found)), logits_of(cfg, found)
  assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()


def test_the_report_counts_scales_and_tells_errors(model):
  _, params = model
  rows = quant.report(quant.apply(params, INT8), params)
  w = tree.flatten(params)[rows[0]["path"]]
  assert len(rows) == len(held(quant.apply(params, INT8)))
  assert rows[0]["bits"] == 8 + 32 / w.shape[0] and rows[0]["bytes"] == w.size + 4 * w.shape[1]
  assert all(0.001 < row["error"] < 0.02 for row in rows)


@pytest.mark.parametrize(
  ("name", "fields", "shape", "path"),
  [
    ("int8", {}, (6, 10), "head"),
    ("int8_asym", {}, (10, 6), "embed"),
    ("int4", dict(group=4), (8, 6), "head"),
    ("int4", dict(group=4), (8, 7), "head"),
    ("int4", dict(group=4), (6, 8), "head"),
    ("int3", dict(group=4), (16, 8), "embed"),
    ("int3", dict(group=4), (12, 8), "embed"),
    ("nf4", dict(block=4, double_quant=True), (10, 8), "embed"),
    ("fp4", dict(block=4), (10, 8), "head"),
    ("glm_int4", {}, (7, 8), "head"),
    ("int8", {}, (6,), "head"),
    ("int8", {}, (6, 10), "norm/scale"),
  ],
)
def test_structs_give_the_structs_of_what_arrays_give_and_the_same_errors(name, fields, shape, path):
  w = np.random.default_rng(0).standard_normal(shape, np.float32)
  scheme, outcomes = quant.SCHEMES[name](**fields), []
  for leaf in (w, jax.ShapeDtypeStruct(shape, np.float32)):
    try:
      found = tree.flatten(quant.apply(tree.unflatten({path: leaf}), scheme, [(path, True)]))[path]
      outcomes.append((found.shape, {part: (x.shape, x.dtype) for part, x in found.parts.items()}))
    except QuantError as e:
      outcomes.append(str(e))
  assert outcomes[0] == outcomes[1]
  if not isinstance(outcomes[1], str):
    assert all(isinstance(part, jax.ShapeDtypeStruct) for part in found.parts.values())


@pytest.mark.core
@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_structs_in_matrices_give_those_of_arrays_and_their_report(model, name):
  """As eval_shape of a load has them; double_quant looks at the padding of arrays only."""
  scheme = quant.SCHEMES[name](**(dict(block=8, double_quant=True) if name == "nf4" else {}))
  is_matrix = lambda path: path == "head" or path.endswith("/w")
  flat = tree.flatten(model[1])
  arrays = tree.unflatten(
    {path: Matrix(np.swapaxes(x, -1, -2)) if is_matrix(path) else x for path, x in flat.items()}
  )
  structs = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, arrays))
  found, expected = (quant.apply(params, scheme, [("head", True)]) for params in (structs, arrays))
  kinds = lambda params: (jax.tree.structure(params), [(x.shape, x.dtype) for x in jax.tree.leaves(params)])
  assert kinds(found) == kinds(expected)
  assert quant.report(found) == quant.report(expected) and quant.report(found)[0]["path"] == "head"
  with pytest.raises(QuantError, match=r"head: found jax.ShapeDtypeStructs, expected arrays, for errors are"):
    quant.report(found, arrays)


@pytest.mark.parametrize("trace", [lambda f, p: jax.jit(f)(p), jax.eval_shape])
def test_a_traced_weight_is_refused(model, trace):
  with pytest.raises(
    QuantError, match=r"layers/0/.*: found a weight of a program that is traced, .* outside"
  ):
    trace(lambda params: quant.apply(params, INT8), model[1])
