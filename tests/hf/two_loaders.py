"""One of two processes with four devices each, which load one checkpoint, quantize it if a scheme is named, and save it."""

import sys

from jaxllm.parallel import multihost

if __name__ == "__main__":
  port, index, source, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
  assert multihost.initialize(f"localhost:{port}", 2, index, timeout=60)

  import jax

  from jaxllm import hf, parallel, quant
  from jaxllm.hf import scan

  copied, copy = [], scan.copy
  scan.copy = lambda view, *args: copied.append(view.nbytes) or copy(view, *args)
  cfg, params = hf.load(source, mesh=parallel.make_mesh("fsdp=2,tensor=4"))
  print(f"read {sum(copied)}", flush=True)
  assert jax.tree.leaves(params)[0].is_fully_addressable is False
  for name in sys.argv[5:]:
    params = quant.apply(params, quant.SCHEMES[name](), [("head", True)])
  hf.save(out, cfg, params, max_shard_bytes=60_000)
