"""Every RoPE type of config.json beside transformers, on one tiny Llama, at half to eight times the trained length."""

import dataclasses
import functools

import family_table
import numpy as np
import oracle
import pytest
from family_cases import LLAMA, PHI3, THEIRS, build, built, family_of, settings, tokens
from family_checks import decoded, program
from model_checks import relative_error

from jaxllm.hf.families import read_config, write_config

theirs = pytest.importorskip("theirs")

TRAINED = 64
LENGTHS = (TRAINED // 2, TRAINED, TRAINED + 1, 2 * TRAINED, 8 * TRAINED)
CAPACITY = LENGTHS[-1]
BASE = dict(model_type="llama", **LLAMA | dict(max_position_embeddings=TRAINED))
ORIGINAL = dict(original_max_position_embeddings=TRAINED, rope_theta=500.0)
YARN = dict(rope_type="yarn", factor=8.0, **ORIGINAL)
LISTS = dict(short_factor=[1.0 + 0.05 * i for i in range(10)], long_factor=[1.0 + 0.8 * i for i in range(10)])

FIXED = {
  "default": dict(rope_type="default", rope_theta=500.0),
  "linear": dict(rope_type="linear", factor=8.0, rope_theta=500.0),
  "yarn": YARN,
  "yarn, attention_factor and betas": YARN | dict(attention_factor=0.8, beta_fast=6.0, beta_slow=0.5),
  "yarn, mscale, not truncated": YARN | dict(mscale=1.3, mscale_all_dim=0.7, truncate=False),
  "yarn, factor of M / L0": YARN | dict(factor=None, original_max_position_embeddings=TRAINED // 4),
  "llama3": dict(rope_type="llama3", factor=8.0, low_freq_factor=0.5, high_freq_factor=3.0, **ORIGINAL),
  "proportional": dict(rope_type="proportional", rope_theta=500.0, partial_rotary_factor=0.6),
}
EXPORTED = ("ntk_old", "ntk", "ntk_fixed", "ntk_mixed", "ntk_by_parts")
"""Our methods that transformers has as LongRoPE with one list."""
PINNED = {
  "dynamic": dict(rope_type="dynamic", factor=2.0, rope_theta=500.0),
  "longrope": dict(rope_type="longrope", factor=8.0, **LISTS, **ORIGINAL),
  "longrope, attention_factor": dict(rope_type="longrope", attention_factor=0.9, **LISTS, **ORIGINAL),
}


def plain_of(name):
  """The settings of a row of FIXED, PINNED or EXPORTED."""
  if name not in EXPORTED:
    return BASE | dict(rope_parameters=(FIXED | PINNED)[name])
  return write_config(base().cfg.with_position(name, factor=8.0))[1]


@functools.cache
def base():
  """The model whose weights and program all types share."""
  return build(BASE | dict(rope_parameters=FIXED["default"]))


@pytest.fixture(scope="module")
def model():
  return base()


def expected_of(plain, ids):
  """Logits of a transformers model that has seen no other length."""
  tensors = built("phi3").tensors if plain["model_type"] == "phi3" else base().tensors
  return theirs.logits(theirs.model(plain, tensors), ids)


@functools.cache
def fixed(name):
  """transformers' model of a type whose frequencies do not depend on the length."""
  return theirs.model(plain_of(name), base().tensors)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", [*FIXED, *EXPORTED])
def test_fixed_frequencies(model, name, length):
  ids = tokens(2, (1, length))
  rope = read_config(plain_of(name))[1].rope_tables(seq_len=length)
  expected = theirs.logits(fixed(name), ids)
  found = program("forward", model.cfg)(model.params, ids, rope)
  assert relative_error(found, expected) <= 1e-5
  np.testing.assert_array_equal(np.argmax(found, -1), expected.argmax(-1))


def slow_but(*lengths):
  """LENGTHS, of which others wait for the full counts."""
  return [length if length in lengths else pytest.param(length, marks=pytest.mark.slow) for length in LENGTHS]


@pytest.mark.parametrize("length", slow_but(TRAINED + 1, LENGTHS[-1]))
@pytest.mark.parametrize("name", [*FIXED, *EXPORTED])
def test_prefill_and_decoding_with_fixed_frequencies(model, name, length):
  ids = tokens(2, (1, length))
  rope = read_config(plain_of(name))[1].rope_tables(seq_len=length)
  found = decoded(model.cfg, model.params, ids, rope, CAPACITY)
  assert relative_error(found, theirs.logits(fixed(name), ids)) <= 1e-5


@pytest.mark.parametrize("name", EXPORTED)
def test_one_list_is_the_method(model, name):
  """What was written as LongRoPE is what our own method computes."""
  ids = tokens(2, (1, LENGTHS[-1]))
  own = model.cfg.with_position(name, factor=8.0).rope_tables()
  found = program("forward", model.cfg)(model.params, ids, own)
  assert relative_error(found, theirs.logits(fixed(name), ids)) <= 1e-5


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", PINNED)
def test_one_length_a_call(model, name, length):
  """Dynamic NTK and LongRoPE with seq_len pinned."""
  plain, ids = plain_of(name), tokens(2, (1, length))
  rope = read_config(plain)[1].rope_tables(seq_len=length)
  found = program("forward", model.cfg)(model.params, ids, rope)
  expected = expected_of(plain, ids)
  assert relative_error(found, expected) <= 1e-5
  np.testing.assert_array_equal(np.argmax(found, -1), expected.argmax(-1))


@pytest.mark.parametrize("length", [TRAINED, TRAINED + 1, 2 * TRAINED])
@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_decoding_by_the_length_of_each_query(model, name, length):
  """Prefill and decoding without a pinned length, by the float64 decoder."""
  cfg, ids = read_config(plain_of(name))[1], tokens(2, (1, length))
  found = decoded(cfg, model.params, ids, cfg.rope_tables(max_len=2 * TRAINED), 2 * TRAINED)
  assert relative_error(found, oracle.logits(cfg, model.params, ids)) <= 5e-6


@pytest.mark.parametrize("length", [TRAINED, TRAINED + 1, 2 * TRAINED])
def test_partial_rotation_below_and_above_the_trained_length(length):
  """Phi-3, whose trained length is a setting of its own."""
  plain, ids = dict(model_type="phi3", **PHI3), tokens(2, (1, length))
  model = built("phi3")
  rope = model.cfg.rope_tables(seq_len=length)
  found = program("forward", model.cfg)(model.params, ids, rope)
  assert relative_error(found, expected_of(plain, ids)) <= 1e-5


OFFSETS = (0, 4_000, 32_000)
POSITIONED = 96


def at(offset):
  return np.arange(offset, offset + POSITIONED, dtype=np.int32)[None]


@pytest.mark.parametrize("name", [*FIXED, "ntk_mixed", *PINNED])
def test_angles_of_transformers(model, name):
  """rope_precision="hf" gives transformers' logits at any position."""
  cfg = dataclasses.replace(read_config(plain_of(name))[1], rope_precision="hf")
  hf, ids = dataclasses.replace(model.cfg, rope_precision="hf"), tokens(4, (1, POSITIONED))
  for offset in OFFSETS:
    its_model = theirs.model(plain_of(name), model.tensors)
    rope = cfg.rope_tables(seq_len=offset + POSITIONED)
    found = program("forward", hf)(model.params, ids, rope, at(offset))
    error = relative_error(found, theirs.logits(its_model, ids, at(offset)))
    assert error <= 1e-5, f"from position {offset} on"
    family_table.measured("llama", "hf angles", error)


def test_exact_angles_are_nearer_to_the_truth(model):
  """At position 32,000 transformers is off by more than 1e-4 of the float64 decoder, and exact angles are not."""
  ids, pos = tokens(4, (1, POSITIONED)), at(OFFSETS[-1])
  expected = theirs.logits(fixed("default"), ids, pos)
  found = program("forward", model.cfg)(model.params, ids, model.cfg.rope_tables(), pos)
  truth = oracle.logits(model.cfg, model.params, ids, pos[0])
  assert relative_error(found, truth) <= 5e-6 < 1e-4 < relative_error(expected, truth)


RELATIVE = [row for row in THEIRS if read_config(settings(row))[1].ropes]
RELATIVE = [row for row in RELATIVE if family_of(row) not in ("gptj", "codegen")]
"""GPT-J's and CodeGen's tables end at n_positions."""


@pytest.mark.slow
@pytest.mark.parametrize("row", RELATIVE)
def test_angles_of_transformers_in_every_family(row):
  its_model, ids = theirs.row_model(row), tokens(4, (1, POSITIONED))
  model = built(row)
  cfg = dataclasses.replace(model.cfg, rope_precision="hf")
  for offset in OFFSETS:
    rope = cfg.rope_tables(seq_len=offset + POSITIONED)
    found = program("forward", cfg)(model.params, ids, rope, at(offset))
    error = relative_error(found, theirs.logits(its_model, ids, at(offset)))
    assert error <= 1e-5, f"{row} at {offset}"
    family_table.measured(row, "hf angles", error)
