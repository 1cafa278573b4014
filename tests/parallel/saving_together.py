"""One of two processes that save and restore one state: `python saving_together.py PORT INDEX DIRECTORY`."""

import sys

from jaxllm.parallel import multihost

if __name__ == "__main__":
  port, index, directory = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
  assert multihost.initialize(f"localhost:{port}", 2, index, timeout=60)

  import jax
  import numpy as np
  from jax.sharding import NamedSharding, PartitionSpec

  from jaxllm import parallel
  from jaxllm.train.checkpoint import Checkpoints

  mesh = parallel.make_mesh("fsdp=2,tensor=4")
  whole = {"w": np.arange(64 * 32, dtype=np.float32).reshape(64, 32), "step": np.int32(0)}

  def placed(x, *spec):
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, PartitionSpec(*spec)), lambda at: x[at])

  def state(step):
    return {"w": placed(whole["w"] + step, "fsdp", "tensor"), "step": placed(np.int32(step)[...])}

  with Checkpoints(directory) as checkpoints:
    found = checkpoints.restore(state(0))
    if found is None:
      for step in (1, 2, 3):
        checkpoints.save(step, state(step))
    else:
      last = int(found["step"])
      assert all(
        (shard.data == (whole["w"] + last)[shard.index]).all() for shard in found["w"].addressable_shards
      )
      assert found["w"].sharding.spec == PartitionSpec("fsdp", "tensor")
      print("restored", last, flush=True)
  print("steps", checkpoints.steps, flush=True)
