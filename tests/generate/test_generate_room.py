"""A cache that grows with the text: the same text as in one of its full size, and memory that is not there is refused."""

import dataclasses

import jax
import numpy as np
import pytest
from compiled import compilations
from method_cases import METHODS, check_text, method_of
from model_cases import MODELS
from model_cases import params as params_of

from jaxllm import parallel
from jaxllm.config import Layer
from jaxllm.errors import ConfigError
from jaxllm.generate import beam, best_of, contrastive, loop, request, speculative
from jaxllm.generate.draft import PromptLookup
from jaxllm.generate.loop import generate
from jaxllm.generate.text import StopStrings
from jaxllm.nn import STORES, Transformer, init_cache
from jaxllm.nn.cache import grow
from jaxllm.ops.memory import Memory
from jaxllm.position import POSITIONS
from jaxllm.sampling import RepetitionPenalty
from jaxllm.sampling.chain import Chain
from jaxllm.sampling.temperature import Temperature

LAYERS = (Layer(POSITIONS["rope"]()), Layer(POSITIONS["rope"](), window=150))
ROPE = dataclasses.replace(MODELS["rope"], num_layers=2, layers=LAYERS)
PROMPTS = [[5, 9, 2, 7, 1], [3, 3, 8]]
DRAWN = Chain((RepetitionPenalty(1.2), Temperature(1.5)))


def text(monkeypatch, room, cfg=ROPE, **arguments):
  monkeypatch.setattr(loop, "ROOM", room)
  usual = dict(max_new_tokens=300, stop_ids=(), part=16, logprobs=1)
  return generate(Transformer(cfg), params_of(cfg), PROMPTS, **usual | arguments)


@pytest.mark.parametrize(
  "arguments",
  [
    pytest.param({}, marks=pytest.mark.core),
    pytest.param({"chunk": 7, "store": STORES["int8"]}, marks=pytest.mark.slow),
    pytest.param(
      {"sampler": DRAWN, "key": jax.random.key(3)},
      marks=pytest.mark.slow,
    ),
    pytest.param({"negative_prompts": [[1, 2], [4] * 9], "copies": 2}, marks=pytest.mark.slow),
    pytest.param(
      {"cfg": dataclasses.replace(ROPE, layers=(Layer(POSITIONS["dynamic_ntk"](original_length=40)),))},
      marks=pytest.mark.slow,
    ),
  ],
  ids=["greedy", "int8", "penalty", "guidance", "dynamic_ntk"],
)
def test_the_text_is_that_of_a_cache_of_full_size(monkeypatch, arguments):
  """From 128 to 256 and 384 slots; the windowed layer comes to its ring of 166 on the way."""
  sizes = []
  grown = loop.grown
  monkeypatch.setattr(loop, "grown", lambda *args: sizes.append(args[3]) or grown(*args))
  found = text(monkeypatch, 20, **arguments)
  assert sizes == [256, 384]
  whole = text(monkeypatch, 300, **arguments)
  assert sizes == [256, 384] and found.tokens == whole.tokens and len(set(whole.tokens[0])) > 5
  np.testing.assert_allclose(found.logprobs, whole.logprobs, atol=2e-4)


@pytest.mark.parametrize("method", ["window", pytest.param("streaming", marks=pytest.mark.slow)])
def test_a_ring_that_has_come_round_stays_one(monkeypatch, method):
  """At the default part, which is more than the prompts have: rings of 48 in a cache that grows to 384 slots."""
  ring = Layer(POSITIONS["rope"](), window=32)
  if method == "streaming":
    ring = Layer(POSITIONS["streaming"](window=28, sinks=4))
  cfg = dataclasses.replace(ROPE, layers=(Layer(POSITIONS["rope"]()), ring))
  sized = []
  own = loop.grow
  monkeypatch.setattr(loop, "grow", lambda *a, **k: sized.append(own(*a, **k)) or sized[-1])
  found, whole = (text(monkeypatch, room, cfg, part=512) for room in (20, 300))
  assert {slots.size for cache in sized for slots in cache.slots} == {256, 384, 48}
  assert found.tokens == whole.tokens
  np.testing.assert_allclose(found.logprobs, whole.logprobs, atol=2e-4)
  with pytest.raises(ConfigError, match=r"grow: found a layer of .*call=16.*, expected"):
    grow(cfg, init_cache(cfg, 2, 128, call=16), 256, call=512)


@pytest.mark.parametrize(
  "name", ["alibi", *(pytest.param(name, marks=pytest.mark.slow) for name in ("rerope", "dynamic_ntk"))]
)
def test_positions_and_keys_without_any_grow_with_it(shallow, prompts, monkeypatch, name):
  """From 32 to 48 slots, for methods whose bias or angles are made of the positions in the cache at every step."""
  monkeypatch.setattr(request, "SLOTS", 16)
  monkeypatch.setattr(loop, "ROOM", 8)
  sizes, own = [], loop.grow
  monkeypatch.setattr(loop, "grow", lambda *a, **k: sizes.append(a[2]) or own(*a, **k))
  model, params = shallow
  fields = next(
    fields for case in METHODS for known, fields, _ in [getattr(case, "values", case)] if known == name
  )
  check_text(model.cfg, method_of(model.cfg, name, fields), params, prompts)
  assert sizes == [48]


@pytest.mark.slow
def test_on_a_mesh_it_grows_to_the_same_text(monkeypatch):
  mesh = parallel.make_mesh("data=2,tensor=2", jax.devices()[:4])
  monkeypatch.setattr(loop, "ROOM", 20)
  call = lambda params: generate(Transformer(ROPE), params, PROMPTS, max_new_tokens=300, stop_ids=(), part=16)
  alone = call(params_of(ROPE))
  with jax.set_mesh(mesh):
    found = call(parallel.shard(params_of(ROPE), mesh, parallel.RULES["tensor"], ROPE))
  assert found.tokens == alone.tokens


def test_a_text_that_ends_early_never_grows(monkeypatch):
  monkeypatch.setattr(loop, "grown", None)
  usual = dict(stop=lambda row, ids: 40 if len(ids) >= 40 else None, sampler=DRAWN, key=jax.random.key(3))
  found = text(monkeypatch, 20, **usual)
  assert [len(ids) for ids in found.tokens] == [40, 40]
  with compilations() as seen:
    assert text(monkeypatch, 20, max_new_tokens=100_000, **usual) == found
  assert not seen  # what is asked for beyond the first room is no part of the programs


def test_what_a_layer_holds_after_growing_is_what_a_larger_cache_would():
  cache = init_cache(ROPE, 2, 128, call=16)
  larger = grow(ROPE, cache, 1024, call=16)
  fresh = init_cache(ROPE, 2, 1024, call=16)
  shapes = lambda cache: jax.tree.map(lambda x: (x.shape, x.dtype), cache)
  assert shapes(larger) == shapes(fresh) and larger.slots == fresh.slots and larger.layers == fresh.layers
  assert len(cache.slots) == 1 and len(larger.slots) == 2  # a layer with a window parts from the others


def test_a_cache_that_no_device_holds_is_refused_before_anything_is_compiled(monkeypatch):
  cfg, params = ROPE, params_of(ROPE)
  with pytest.raises(
    ConfigError, match=r"max_new_tokens: found a cache and tables .* GiB, for 2 rows of 2147483647 tokens"
  ):
    generate(Transformer(cfg), params, PROMPTS, max_new_tokens=2_000_000_000)
  monkeypatch.setattr("jaxllm.generate.request.memory_of", lambda devices: Memory(10_000, 2, "each"))
  with pytest.raises(ConfigError, match=r"for 2 rows of 128 tokens, expected at most the 0.0 GiB"):
    generate(Transformer(cfg), params, PROMPTS, max_new_tokens=5)
  for rows, method, arguments in (
    (8, contrastive.generate, dict(top_k=4)),
    (6, generate, dict(copies=3)),
    (8, generate, dict(negative_prompts=PROMPTS, copies=2)),
    (10, best_of.generate, dict(n=5, sampler=Temperature(1.0), key=jax.random.key(0))),
    (12, beam.generate, dict(num_beams=6)),
    (2, speculative.generate, dict(draft=PromptLookup())),
  ):
    with pytest.raises(ConfigError, match=rf"for {rows} rows of 128 tokens"):
      method(Transformer(cfg), params, PROMPTS, max_new_tokens=5, **arguments)


@pytest.mark.parametrize(
  ("given", "message"),
  [
    (lambda model, params: (model.cfg, params), "model: found ModelConfig, expected nn.Transformer"),
    (
      lambda model, params: (model, {"params": params}),
      'params: found a tree of params, .* give its "params"',
    ),
    (lambda model, params: (model, [params]), "params: found list, expected the model's parameters"),
    (lambda model, params: (model, params | {"layers": {"0": 1}}), "params: found 1 layers, expected 2"),
    (
      lambda model, params: (model, params | {"embed": params["embed"][:-1]}),
      r"params: found embed of shape \[\d+, \d+\], expected \[",
    ),
    (
      lambda model, params: (model, params | {"final_norm": {}}),
      "params: found no final_norm/.*, expected it",
    ),
  ],
)
def test_what_is_no_model_or_not_its_parameters_is_refused(given, message):
  with pytest.raises(ConfigError, match=message):
    generate(*given(Transformer(ROPE), params_of(ROPE)), PROMPTS, max_new_tokens=5)


def test_draws_of_a_row_are_its_own_with_keys_of_another_kind():
  keys = jax.random.split(jax.random.key(3, impl="rbg"), 3)
  call = lambda prompts, key: generate(
    Transformer(ROPE),
    params_of(ROPE),
    prompts,
    sampler=Temperature(1.5),
    key=key,
    max_new_tokens=8,
    stop_ids=(),
  )
  together = call([PROMPTS[0]] * 3, keys).tokens
  assert together == [call([PROMPTS[0]], keys[i : i + 1]).tokens[0] for i in range(3)]
  assert len({tuple(row) for row in together}) == 3


def test_stop_strings_know_the_prompts_of_copies():
  decode = lambda ids: "".join(chr(65 + i) for i in ids)
  call = lambda stop: generate(
    Transformer(ROPE), params_of(ROPE), PROMPTS, max_new_tokens=4, stop_ids=(), copies=2, stop=stop
  )
  assert call(StopStrings(["zzz"], decode, prompts=PROMPTS, copies=2)).tokens == call(None).tokens
  with pytest.raises(ConfigError, match="found row 2 and 2 prompts, expected one a row; give copies"):
    call(StopStrings(["zzz"], decode, prompts=PROMPTS))


def test_positions_that_leave_no_room_are_refused():
  with pytest.raises(ConfigError, match=r"positions\[0\]: found int64 .* expected integers from 0 to"):
    generate(
      Transformer(ROPE),
      params_of(ROPE),
      [PROMPTS[1]],
      max_new_tokens=4,
      positions=[np.array([0, 1, 2**31 + 7])],
    )
