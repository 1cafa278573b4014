"""Flax Linen modules: the only folder that imports flax."""

from jaxllm.nn.cache import Cache, init_cache
from jaxllm.nn.context import Context
from jaxllm.nn.store import STORES
from jaxllm.nn.transformer import Transformer

__all__ = ["STORES", "Cache", "Context", "Transformer", "init_cache"]
