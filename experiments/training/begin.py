"""The parameters that a run begins with: random ones, or a checkpoint's, quantized and with the factors of LoRA."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.checkpoint import Checkpoint
from experiments.training.settings import Settings
from jaxllm import quant, tree
from jaxllm.config import ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.leaf import Matrix, dense
from jaxllm.nn.shapes import expected_shapes
from jaxllm.nn.transformer import Transformer
from jaxllm.train import lora

QLORA = quant.SCHEMES["nf4"](double_quant=True)
"""Source: Dettmers et al. (2023), QLoRA, section 3."""


def begin_with(s: Settings, cfg: ModelConfig, checkpoint: Checkpoint | None = None) -> Any:
  """The parameters that training begins with."""
  if checkpoint is None:
    tokens = np.zeros((1, s.length), np.int32)
    params = jax.jit(Transformer(cfg).init)(jax.random.key(s.seed), tokens)["params"]
  else:
    params = tree.unflatten({path: _dense(leaf) for path, leaf in tree.flatten(checkpoint.params()).items()})
  return _with_factors(s, cfg, _quantized(s, cfg, params))


def shapes_of(s: Settings, cfg: ModelConfig) -> Any:
  """Those parameters as jax.ShapeDtypeStructs, of which nothing is read or made; a checkpoint's have the type of cfg."""
  dtype = jnp.float32 if s.model is None else cfg.dtype
  params = {path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in expected_shapes(cfg).items()}
  params = _quantized(s, cfg, tree.unflatten(params))
  return jax.eval_shape(lambda params: _with_factors(s, cfg, params), params)


def unquantized(s: Settings, cfg: ModelConfig) -> list[str]:
  """With --train=qlora the matrices of layers that stay as they are, as its blocks do not divide their inputs.

  Raises ConfigError where all do.
  """
  if s.train != "qlora":
    return []
  matrices = {
    path: shape
    for path, shape in expected_shapes(cfg).items()
    if tree.first_match([*quant.DEFAULT, (".+", False)], path)
  }
  left = [path for path, shape in matrices.items() if shape[-2] % QLORA.block]
  if len(left) == len(matrices):
    widths = sorted({shape[-2] for shape in matrices.values()})
    raise ConfigError(
      f"--train=qlora: it quantizes blocks of {QLORA.block} inputs, which divide none of the widths of this model, "
      f"{', '.join(map(str, widths))}; take --train=lora"
    )
  return left


def _quantized(s: Settings, cfg: ModelConfig, params: Any) -> Any:
  if s.train != "qlora":
    return params
  return quant.apply(params, QLORA, [(re.escape(path), False) for path in unquantized(s, cfg)])


def _with_factors(s: Settings, cfg: ModelConfig, params: Any) -> Any:
  if s.scan:
    params = tree.stack_layers(params, len(cfg.layers))
  if s.train == "full":
    return params
  rules = lora.ALL_LINEAR if s.lora_targets is None else ((s.lora_targets, True),)
  key = jax.random.fold_in(jax.random.key(s.seed), 1)
  return lora.apply(params, rules, rank=s.lora_rank, alpha=s.lora_alpha, key=key)


def _dense(leaf: Any) -> Any:
  """An array [in, out], which is what is trained: files have [out, in]."""
  return dense(leaf).astype(leaf.dtype) if isinstance(leaf, Matrix) else leaf
