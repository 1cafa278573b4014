"""A model with a method of the sweep on it, and the program that the methods share."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from jaxllm.config import Layer, ModelConfig
from jaxllm.position import LogN, PositionTables, Rope
from jaxllm.study import methods


def with_variant(
  cfg: ModelConfig, variant: methods.Variant, factors, train_length: int, length: int
) -> ModelConfig:
  """The model with a variant at a length: as it is, where the variant is not switched on there."""
  if methods.is_on(variant, factors, train_length, length):
    cfg = on(cfg, variant, train_length)
    if methods.METHODS[variant.method].log_n:
      cfg = dataclasses.replace(cfg, query_scale=LogN(train_length, floor=1.0))
  return cfg


def on(cfg: ModelConfig, variant: methods.Variant, train_length: int) -> ModelConfig:
  """The config with the variant's position method on its RoPE layers, which were trained at `train_length`."""
  method = methods.METHODS[variant.method]
  if method.position is None:
    return cfg
  factor = {"factor": variant.factor} if method.stretches else {}
  return cfg.with_position(method.position, original_length=train_length, **factor)


def shared_program(cfg: ModelConfig) -> ModelConfig:
  """The config of the program that all methods which are tables run through: plain RoPE on the layers over all keys.

  Where windowed layers have that very RoPE, which keeps its own table, the others are told apart by a name of their own.
  """
  plain = cfg.with_position("rope")
  windowed = {layer.position for layer in plain.layers if layer.window is not None}
  everywhere = {layer.position for layer in plain.layers if layer.window is None and is_rope(layer)}
  return cfg.with_position("pi", factor=1.0) if windowed & everywhere else plain


def is_rope(layer: Layer) -> bool:
  """Whether a layer turns queries and keys by one position a token."""
  return isinstance(layer.position, Rope) and not layer.position.two_dimensional


def aligned(cfg: ModelConfig, program: ModelConfig, length: int) -> PositionTables:
  """The tables of `cfg` for windows of `length`, in the places that the program of another config has for its layers."""
  tables = cfg.rope_tables(seq_len=length)
  places = [
    next(i for i, layer in enumerate(program.layers) if layer.position == rope) for rope in program.ropes
  ]
  ropes = tuple(tables.ropes[cfg.ropes.index(cfg.layers[i].position)] for i in places)
  return dataclasses.replace(tables, ropes=ropes)


def changes(
  cfg: ModelConfig, scheme: methods.Scheme, variant: methods.Variant, factors, train_length: int, length: int
) -> bool:
  """Whether a variant makes another model of cfg at a length: another program, or other numbers in its tables."""
  other = with_variant(cfg, variant, factors, train_length, length)
  if not methods.METHODS[variant.method].tables_only:
    return other != cfg
  program = shared_program(cfg) if scheme.plain_rope else cfg
  tables = (jax.tree.leaves(aligned(one, program, length)) for one in (cfg, other))
  return not all(np.array_equal(x, y) for x, y in zip(*tables, strict=True))
