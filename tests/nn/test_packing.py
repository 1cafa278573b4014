"""Sequences packed into one row are as each alone."""

import dataclasses

import jax
import numpy as np
import pytest
from model_cases import MODELS, B, T, params, structure, tables, tokens
from model_checks import full, relative_error

from jaxllm.config import Layer
from jaxllm.nn import Context, Transformer
from jaxllm.ops.blockwise import Blockwise

LENGTHS = [(10, 14), (24, 0), (3, 9, 12)]


@pytest.mark.parametrize(
  "name", [pytest.param("rope", marks=pytest.mark.core), "dynamic_ntk", "alibi, log-n"]
)
def test_packed_is_unpacked(name):
  cfg, ids = MODELS[name], tokens()
  rows = [np.repeat(np.arange(len(n), dtype=np.int32), n) for n in LENGTHS]
  segment = np.stack(rows)
  pos = np.stack([np.concatenate([np.arange(m, dtype=np.int32) for m in n]) for n in LENGTHS])
  program = jax.jit(
    lambda weights, ids, context, rope: Transformer(structure(cfg)).apply(
      {"params": weights}, ids, context, rope=rope
    )[0]
  )
  packed = np.asarray(program(params(cfg), ids, Context(pos=pos, segment=segment), tables(cfg)))
  for b, lengths in enumerate(LENGTHS):
    start = 0
    for n in lengths:
      alone = np.zeros((B, T), np.int32)  # what follows a sequence does not matter to it
      alone[:, :n] = ids[b, start : start + n]
      if n:
        assert relative_error(packed[b, start : start + n], full(cfg, alone)[0, :n]) <= 1e-5
      start += n


def test_blockwise_model_with_pattern_of_windows():
  """The core is a field: all of packing, windows and tiles that do not divide, through the whole model."""
  layers = (
    Layer(MODELS["rope"].layers[0].position, 5),
    Layer(MODELS["alibi"].layers[0].position),
    MODELS["rope"].layers[0],
  )
  plain = dataclasses.replace(MODELS["rope"], layers=layers)
  blockwise = dataclasses.replace(plain, attention=Blockwise(5, 7))
  assert relative_error(full(blockwise, tokens()), full(plain, tokens())) <= 1e-5
