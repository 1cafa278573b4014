"""Text generated on a mesh is that of one device, for every position method, sampler and kind of cache; prompts over parts."""

import dataclasses

import jax
import numpy as np
import pytest
from generation_table import same_text
from mesh_checks import make_mesh
from model_cases import MODELS, params

from jaxllm import parallel
from jaxllm.generate import beam
from jaxllm.generate.draft import PromptLookup
from jaxllm.generate.loop import generate
from jaxllm.generate.speculative import generate as speculate
from jaxllm.nn import STORES, Transformer
from jaxllm.sampling import Chain, RepetitionPenalty, Temperature, TopP

LENGTHS = (5, 11, 14, 9)
METHODS = [name for name in MODELS if "," not in name]
DEFAULT = {"rope": [pytest.mark.core]}
SMALL = dataclasses.replace(MODELS["rope"], num_layers=2, layers=MODELS["rope"].layers[:2])
"""Two layers, the second with a window, for what is not about the layers."""


def prompts(cfg):
  rng = np.random.default_rng(2)
  return [rng.integers(0, cfg.vocab_size, n).tolist() for n in LENGTHS]


def on_mesh(cfg, weights, axes, rules, call):
  """call(model, parameters) with the parameters over the mesh, which is in scope."""
  mesh = make_mesh(axes)
  with jax.set_mesh(mesh):
    return call(Transformer(cfg), parallel.shard(weights, mesh, parallel.RULES[rules], cfg))


@pytest.mark.parametrize(
  "name", [pytest.param(name, marks=DEFAULT.get(name, [pytest.mark.slow])) for name in METHODS]
)
def test_every_method(name):
  cfg, weights = MODELS[name], params(MODELS[name])
  # 8 more than a learned table has positions for would be refused
  call = lambda model, weights: (
    generate(model, weights, prompts(cfg), max_new_tokens=16, stop_ids=(), part=8).tokens
  )
  truth = call(Transformer(cfg), weights)
  found = on_mesh(cfg, weights, "fsdp=2,tensor=2", "fsdp_tensor", call)
  same_text("a mesh fsdp=2,tensor=2: every position method", found, truth)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["alibi", "rope", "dynamic_ntk", "rerope", "learned", "streaming"])
@pytest.mark.parametrize(("axes", "rules"), [("data=2,tensor=4", "tensor"), ("fsdp=8", "fsdp")])
def test_eight_devices(name, axes, rules):
  """Key heads that a tensor axis does not divide are whole on each device; eight rows, one a device of fsdp=8."""
  cfg, weights = MODELS[name], params(MODELS[name])
  both = prompts(cfg) + [prompt[::-1] for prompt in prompts(cfg)]
  call = lambda model, weights: generate(model, weights, both, max_new_tokens=16, stop_ids=()).tokens
  truth = call(Transformer(cfg), weights)
  same_text(f"a mesh {axes}", on_mesh(cfg, weights, axes, rules, call), truth)


def test_draws_penalties_stops_and_integers():
  """data=2 splits the rows with their keys, histories and caches."""
  cfg, weights = SMALL, params(SMALL)
  sampler = Chain((RepetitionPenalty(1.3), Temperature([0.7, 1.0, 1.3, 2.0]), TopP(0.9)))

  def call(model, weights):
    return generate(
      model,
      weights,
      prompts(cfg),
      sampler=sampler,
      key=jax.random.key(1),
      max_new_tokens=9,
      stop_ids=(3,),
      chunk=5,
      stop=lambda row, ids: 4 if row == 2 and len(ids) == 6 else None,
      store=STORES["int8"],
    )

  truth = call(Transformer(cfg), weights)
  found = on_mesh(cfg, weights, "data=2,fsdp=2", "fsdp", call)
  assert found == truth
  same_text("a mesh data=2,fsdp=2: draws, penalties, stops, int8", found.tokens, truth.tokens)


@pytest.mark.slow
def test_searches_and_drafts():
  cfg, weights = SMALL, params(SMALL)

  def call(model, weights):
    found = beam.generate(model, weights, prompts(cfg), num_beams=3, max_new_tokens=8, stop_ids=())
    return found.tokens, speculate(
      model, weights, prompts(cfg), PromptLookup(), max_new_tokens=8, stop_ids=()
    ).tokens

  assert on_mesh(cfg, weights, "data=2,tensor=2", "tensor", call) == call(Transformer(cfg), weights)


@pytest.mark.slow
def test_a_padded_vocabulary_gives_no_other_ids():
  """29 ids over four devices are 32 rows, of which three are no tokens."""
  cfg = dataclasses.replace(SMALL, tie_embeddings=True)
  weights = {name: x for name, x in params(SMALL).items() if name != "head"}
  call = lambda model, weights: generate(model, weights, prompts(cfg), max_new_tokens=16, stop_ids=()).tokens
  assert on_mesh(cfg, weights, "tensor=4", "tensor", call) == call(Transformer(cfg), weights)
