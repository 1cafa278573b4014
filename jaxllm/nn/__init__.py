"""Flax Linen modules: the only folder that imports flax."""

from jaxllm.nn.context import Cache, Context, init_cache
from jaxllm.nn.transformer import Transformer

__all__ = ["Cache", "Context", "Transformer", "init_cache"]
