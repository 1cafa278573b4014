"""One setting for all tests: eight CPU devices, exact products, no implicit rank promotion, compile once."""

import os

os.environ["XLA_FLAGS"] = (
  f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
)

from jaxllm.study import compile_cache

compile_cache.turn_on()

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")  # TF32 or bf16 passes would be judged otherwise
