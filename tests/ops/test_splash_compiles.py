"""The TPU compiler takes splash attention, forward and backward, on a machine without a TPU (needs libtpu)."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jaxllm.ops.attention import Score, Side
from jaxllm.ops.kernels import Splash

chips = topologies.get_topology_desc(
  platform="tpu", topology_name="v5e:4x4", chip_config_name="default", chips_per_host_bounds=(2, 2, 1), num_slices=1
)
place = jax.sharding.SingleDeviceSharding(chips.devices[0])

def loss(q, k, v, segment):
  index = jnp.arange(1000, dtype=jnp.int32)[None]
  side = Side(index, index, segment, in_order=True)
  core = Splash(interpret=False)
  return jnp.sum(core(q, k, v, side, side, 300, Score(None, "Rope", None, 30.0), jnp.zeros(8)).astype(jnp.float32))

shapes = [((2, 1000, n, 64), "bfloat16") for n in (8, 2, 2)] + [((2, 1000), "int32")]
args = [jax.ShapeDtypeStruct(*shape, sharding=place) for shape in shapes]
print(jax.jit(jax.grad(loss, (0, 1, 2))).lower(*args).compile().as_text().count("tpu_custom_call"))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (the tpu extra)")
def test_the_tpu_compiler_takes_it():
  env = os.environ | dict(
    TPU_SKIP_MDS_QUERY="1",
    JAX_PLATFORMS="cpu",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_ACCELERATOR_TYPE="v5litepod-16",
    XLA_FLAGS="",
  )
  call = [sys.executable, "-c", PROGRAM]
  done = subprocess.run(
    call, cwd=Path(__file__).parents[2], env=env, capture_output=True, text=True, timeout=400
  )
  assert done.returncode == 0, done.stderr
  assert int(done.stdout) == 3  # forward, dq, dk and dv
