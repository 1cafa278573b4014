"""What compiles: two programs, for prompts and for decoding; sampler parameters, ids and tables are data."""

import dataclasses

import jax
import numpy as np
import pytest
from compiled import compilations
from generation_table import about, measured
from method_cases import METHODS

from jaxllm.generate.loop import generate
from jaxllm.nn import STORES, Transformer
from jaxllm.sampling import SAMPLERS, Chain, TopK, token_mask

core = pytest.mark.core
V = 64
PROMPTS = [[1, 2, 3], [4], [5, 6]]
CHUNK = 5


@pytest.fixture(scope="module")
def own(shallow):
  """That model with an end of its own, which every call replaces: no other test compiles its programs."""
  return Transformer(dataclasses.replace(shallow[0].cfg, eos_ids=(63,))), shallow[1]


def usual_of(model, sampler):
  """The arguments of a call."""
  return {
    "prompts": PROMPTS,
    "sampler": sampler,
    "key": jax.random.key(0),
    "max_new_tokens": 9,
    "stop_ids": (),
    "chunk": CHUNK,
    "rope": model.cfg.rope_tables(),
  }


def count(row, expected, call):
  """The compilations of a call are so many."""
  about("compilations", row)
  with compilations() as seen:
    call()
  assert len(seen) == expected, row
  measured("compilations", row, compiled=len(seen), expected=expected)


DATA = {  # what differs in data alone
  "other ids in the prompts' bucket": {"prompts": [[7] * 16, [8] * 2, [9]]},
  "a parameter of each row": {"sampler": TopK([5, 1, 0])},
  "another key": {"key": jax.random.key(1)},
  "max_new_tokens within the capacity": {"max_new_tokens": 100},
  "one stop id": {"stop_ids": (63,)},
  "three stop ids": {"stop_ids": (5, 6, 7)},
  "the config's tables": {"rope": None},
  "stop and on_tokens": {
    "stop": lambda row, ids: 3 if len(ids) == 7 else None,
    "on_tokens": lambda row, ids: None,
  },
}
TABLES = ("pi", "ntk", "ntk_fixed", "ntk_mixed", "ntk_by_parts", "yarn", "llama3")
PROMPTS_ALONE = {  # what differs in the program that reads prompts
  "a longer bucket in a cache of the same capacity": ({"prompts": [[9] * 64, [4], [5]]}, 1),
  "a key of each row": ({"key": jax.random.split(jax.random.key(2), 3)}, 1),
}
PROGRAMS = {  # what differs in a program, and in how many
  "max_new_tokens beyond the capacity": ({"max_new_tokens": 113}, 2),
  "a longer bucket in that larger cache": ({"prompts": [[9] * 128, [4], [5]]}, 1),
  "another chunk": ({"chunk": CHUNK + 1}, 1),
  "log-probabilities": ({"logprobs": 2}, 2),
  "another kind of cache": ({"store": STORES["int8"]}, 2),
}


@pytest.fixture(scope="module")
def usual(own):
  """usual(**other): the tokens of a call, compiled, after what is done has once been moved to the device."""
  model, params = own
  arguments = usual_of(model, TopK([0, 0, 0]))
  with compilations() as seen:
    generate(model, params, **arguments)
  assert len(seen) >= 2
  generate(model, params, **arguments, stop=DATA["stop and on_tokens"]["stop"])
  return lambda **other: generate(model, params, **arguments | other).tokens


@core
def test_what_differs_in_data_alone_does_not_compile_again(usual, own):
  rope = lambda name: own[0].cfg.with_position(name, factor=4.0).rope_tables()
  for row, other in (DATA | {f"tables of {name}": {"rope": rope(name)} for name in TABLES}).items():
    count(row, 0, lambda other=other: usual(**other))
  assert usual(rope=rope("yarn")) != usual() != usual(key=jax.random.key(1))  # the numbers are read


@pytest.mark.parametrize(
  "programs", [pytest.param(PROMPTS_ALONE, marks=core), pytest.param(PROGRAMS, marks=pytest.mark.slow)]
)
def test_what_is_of_another_shape_compiles_once(usual, programs):
  for row, (other, expected) in programs.items():
    count(row, expected, lambda other=other: usual(**other))
    count(f"{row}, once more", 0, lambda other=other: usual(**other))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dynamic_ntk", "longrope", "rerope", "self_extend", "streaming"])
def test_methods_that_keep_keys_unturned_compile_a_model_once(own, name):
  """Prompts, keys and lengths in a bucket are data for them too."""
  fields = next(
    fields for case in METHODS for known, fields, _ in [getattr(case, "values", case)] if known == name
  )
  model = Transformer(own[0].cfg.with_position(name, **fields))
  arguments = usual_of(own[0], TopK([0, 0, 0])) | {"rope": None}
  generate(model, own[1], **arguments)
  for row in ("other ids in the prompts' bucket", "another key", "max_new_tokens within the capacity"):
    count(f"{name}: {row}", 0, lambda row=row: generate(model, own[1], **arguments | DATA[row]))


RNG = np.random.default_rng(0)
TWO = {  # two sets of parameters of every sampler, of the same shapes
  "temperature": [{"temperature": 1.0}, {"temperature": 0.0}],
  "top_k": [{"k": 0}, {"k": 9}],
  "top_p": [{"p": 1.0}, {"p": 0.3}],
  "min_p": [{"min_p": 0.0}, {"min_p": 0.1}],
  "typical": [{"p": 1.0}, {"p": 0.7}],
  "epsilon": [{"epsilon": 0.0}, {"epsilon": 1e-3}],
  "eta": [{"epsilon": 0.0}, {"epsilon": 1e-3}],
  "top_n_sigma": [{"n": 0.0}, {"n": 1.0}],
  "repetition_penalty": [{"penalty": 1.0, "last_n": -1}, {"penalty": 1.5, "last_n": 4}],
  "presence_penalty": [{"penalty": 0.0, "prompt": False}, {"penalty": 1.0, "prompt": True}],
  "frequency_penalty": [{"penalty": 0.0, "last_n": -1}, {"penalty": 1.0, "last_n": 7}],
  "no_repeat_ngram": [{"n": 0}, {"n": 2}],
  "logit_bias": [{"bias": np.zeros(V)}, {"bias": RNG.normal(size=V)}],
  "banned_tokens": [{"mask": token_mask([], V)}, {"mask": token_mask([1, 2, 3], V)}],
  "forced_tokens": [{"tokens": [-1, -1]}, {"tokens": [9, -1]}],
  "min_new_tokens": [{"number": 0, "stop": token_mask([], V)}, {"number": 5, "stop": token_mask([3], V)}],
  "xtc": [{"probability": 0.0, "threshold": 0.1}, {"probability": 1.0, "threshold": 0.01}],
  "dry": [{"multiplier": 0.0, "base": 1.75}, {"multiplier": 1.0, "base": 1.2}],
  "mirostat": [{"tau": 50.0, "eta": 0.1}, {"tau": 2.0, "eta": 0.5}],
}


def test_the_parameters_of_every_sampler_are_data(own):
  """In one chain of all, the parameters of one after the other."""
  assert TWO.keys() == SAMPLERS.keys() - {"greedy", "chain"}
  model, params = own
  chain = lambda other=None: Chain(tuple(SAMPLERS[name](**TWO[name][name == other]) for name in TWO))
  text = lambda other=None: generate(model, params, **usual_of(model, chain(other))).tokens
  usual, changed = text(), set()
  for name in TWO:
    count(f"parameters of {name}", 0, lambda name=name: text(name) == usual or changed.add(name))
  assert len(changed) > len(TWO) / 2
