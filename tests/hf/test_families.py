"""Every family beside transformers: kept logits, live logits, decoding, gradients, bfloat16."""

import dataclasses
import functools

import family_rows_gpt
import family_table
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from family_cases import (
  GOLDEN,
  KEPT,
  LOOSE,
  PINNED,
  ROWS,
  THEIRS,
  T,
  build,
  built,
  call_of,
  core_of,
  settings,
  tokens,
  write,
)
from family_checks import by_name, decoded, first_bad_layer, logits, program, tables, vanishing
from model_checks import relative_error

from jaxllm import hf
from jaxllm.hf import match
from jaxllm.hf.families import FAMILIES
from jaxllm.leaf import Matrix
from jaxllm.tree import flatten, unflatten

# What a row has that changes what a cache holds or how it is read, and what gradients flow through
DECODED = ("ministral3", "gemma3_text", "phi3", "bloom")
DIFFERENTIATED = ("gemma3_text", "bloom, residual after the norm", "gpt2")
HALVES = ("llama", "bloom")


def each_row(by_default=tuple(ROWS), rows=THEIRS):
  """A parametrize mark over rows; those that are not `by_default` wait for the full counts."""
  marks = lambda row: [pytest.mark.core] * core_of(row) if row in by_default else [pytest.mark.slow]
  return pytest.mark.parametrize("row", [pytest.param(row, marks=marks(row)) for row in rows])


def matrices(row):
  """A row's parameters as `hf.load` holds them, so that one program is compiled."""
  flat = flatten(built(row).params)
  stored = {
    path
    for key in match.all_keys(built(row).family, built(row).cfg)
    if key.stored == "oi"
    for path in key.ours
  }
  return unflatten({path: Matrix(x.swapaxes(-1, -2)) if path in stored else x for path, x in flat.items()})


@functools.cache
def kept():
  """{row: logits [16, V]} of transformers or, where it has no such family, of definitions.py, from make_families.py."""
  with np.load(GOLDEN) as file:
    return dict(file)


@each_row(rows=ROWS)
def test_kept_logits(row, tmp_path):
  """Of a directory that was written without transformers, read as any other."""
  cfg, params = hf.load(write(tmp_path, row))
  assert cfg == built(row).cfg
  error = relative_error(logits(row, tokens(), params)[0, KEPT], kept()[row])
  assert error <= LOOSE.get(row, 1e-5)
  family_table.measured(row, "golden", error)


@pytest.mark.core
def test_every_family_has_kept_logits():
  assert kept().keys() == ROWS.keys() and {row.split(",")[0] for row in ROWS} == FAMILIES.keys()


@each_row(tuple(row for row in ROWS if row not in family_rows_gpt.VARIANTS))
def test_live_logits(row, tmp_path):
  """Of a directory that transformers wrote."""
  import theirs

  its_model = theirs.row_model(row)
  its_model.save_pretrained(tmp_path)
  cfg, params = hf.load(tmp_path)
  assert cfg == built(row).cfg
  found, expected = logits(row, tokens(), params), theirs.logits(its_model, tokens())
  error = relative_error(found, expected)
  if error > LOOSE.get(row, 1e-5):
    states = program("states", cfg)(params, tokens(), tables(cfg, row))
    pytest.fail(
      f"{row}: {error:.1e}; {first_bad_layer(states, theirs.hidden_states(its_model, tokens())[1:])}"
    )
  np.testing.assert_array_equal(found.argmax(-1), expected.argmax(-1))
  family_table.measured(row, "logits", error)


@each_row(DECODED, [row for row in ROWS if not call_of(row, T)])
def test_prefill_and_decoding_are_the_full_forward(row):
  """Longer than windows; and than the trained length of LongRoPE, whose rows are here by the query's own length."""
  model, ids = built(row), tokens()[:, :128]
  by_query = row in PINNED
  full = (
    oracle.logits(model.cfg, model.params, ids) if by_query else logits(row, tokens(), matrices(row))[:, :128]
  )
  error = relative_error(decoded(model.cfg, model.params, ids, tables(model.cfg, length=128)), full)
  assert error <= 1e-5
  family_table.measured(row, "decoding", error)


@each_row(DIFFERENTIATED)
def test_gradients(row):
  import theirs

  model, ids = built(row), tokens(1, (2, 129))
  loss, expected = theirs.gradients(theirs.row_model(row), ids)
  found_loss, grads = program("gradient", model.cfg)(model.params, ids, tables(model.cfg, row, 128))
  np.testing.assert_allclose(found_loss, loss, rtol=1e-5)
  mine, zero = by_name(row, grads), vanishing(row)
  assert max((np.abs(mine.pop(name)).max() for name in zero), default=0.0) <= 1e-6
  found = theirs.stacked(built(row).family.model_type, mine)
  assert len(found) + len(zero) == len(expected) and found.keys() <= expected.keys()
  assert max((np.abs(expected[name]).max() for name in expected.keys() - found.keys()), default=0.0) <= 1e-6
  error = max(relative_error(found[name], expected[name]) for name in found)
  assert error <= 1e-4
  family_table.measured(row, "gradients", error)


@each_row(HALVES)
def test_bfloat16(row):
  """The error of weights and computation in bfloat16, the median of five seeds, by that of transformers' own."""
  import theirs

  ids, errors = tokens()[:, :256], []
  for seed in range(5):
    model = build(settings(row), seed)
    its_model = theirs.model(settings(row), model.tensors)
    truth = theirs.logits(its_model, ids)
    cfg = dataclasses.replace(model.cfg, dtype="bfloat16")
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), model.params)
    found = program("forward", cfg)(params, ids, tables(cfg, row, 256))
    expected = theirs.logits(its_model.to(theirs.torch.bfloat16), ids)
    errors.append([relative_error(x, truth) for x in (found, expected)])
  ours, its = np.median(errors, axis=0)
  assert ours <= 1.25 * its
  family_table.measured(row, "bf16 ratio", ours / its)


def test_the_first_layer_that_differs_is_named():
  import theirs

  model = built("llama")
  tensors = dict(model.tensors)
  name = "model.layers.1.self_attn.k_proj.weight"
  tensors[name] = tensors[name][::-1].copy()
  states = program("states", model.cfg)(model.params, tokens()[:, :64], tables(model.cfg, length=64))
  other = theirs.hidden_states(theirs.model(settings("llama"), tensors), tokens()[:, :64])[1:]
  assert first_bad_layer(states, other).startswith("the first layer that differs is 1: ")
  same = theirs.hidden_states(theirs.row_model("llama"), tokens()[:, :64])[1:]
  assert first_bad_layer(states[:-1], same).startswith("no layer")
