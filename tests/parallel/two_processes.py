"""One of two processes with four devices each: `python two_processes.py PORT INDEX OUT.npz`, of test_two_processes."""

import sys

from jaxllm.parallel import multihost

if __name__ == "__main__":
  port, index, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
  assert multihost.initialize(f"localhost:{port}", 2, index, timeout=60)

  import jax
  import numpy as np
  from jax.sharding import NamedSharding, PartitionSpec
  from mesh_cases import CASES, source
  from mesh_checks import forward, tokens

  from jaxllm import parallel

  assert (jax.process_count(), len(jax.devices()), len(jax.local_devices())) == (2, 8, 4)
  jax.config.update("jax_default_matmul_precision", "highest")
  cfg, mesh = CASES["llama"], parallel.make_mesh("fsdp=2,tensor=4")
  with jax.set_mesh(mesh):
    params = parallel.shard(source("llama")(), mesh, parallel.RULES["fsdp_tensor"], cfg)
    ids = parallel.shard_batch(tokens(cfg), mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())
    loss, logits = jax.jit(lambda params, ids: forward(cfg, params, ids), out_shardings=everywhere)(
      params, ids
    )
  held = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
  if index == 0:
    np.savez(out, loss=loss, logits=logits, held=held)
  print(f"process {index}: loss {float(loss)}", flush=True)
