"""Hugging Face checkpoints: config.json and safetensors to (ModelConfig, parameters), and back."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from jaxllm.hf.loading import load, load_config
  from jaxllm.hf.saving import save
  from jaxllm.hf.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer

_WHERE = {
  "load": "loading",
  "load_config": "loading",
  "save": "saving",
  "Tokenizer": "tokenizer",
  "byte_tokenizer": "tokenizer",
  "load_tokenizer": "tokenizer",
}

__all__ = ["Tokenizer", "byte_tokenizer", "load", "load_config", "load_tokenizer", "save"]


def __getattr__(name: str) -> Any:
  """Imports what is asked for: a tokenizer takes no jax, and a script's --help nothing at all."""
  if name not in _WHERE:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
