"""What a compiled program needs of each device, and whether that is there."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import DataError
from jaxllm.flops.collectives import Collective, collectives
from jaxllm.flops.program import dots

_NEEDED = re.compile(r"\(([\d.]+)([KMGT])\) exceeds|Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A program's bytes on each device, and what else its compiler says of it.

  arguments: what it is given.  outputs, aliased: what it gives, and how much of that takes the place of arguments.
  temporaries: all else that is set aside for it.  needed: all of these together.  seconds: to compile it.  products:
  FLOPs of the products of all devices (`program.dots`, of the program as it was traced; a loop of unknown length is run once);
  None where that is not in the text.  flops: of one device by XLA's cost analysis, which takes each loop as run once.
  collectives: in the order of its text.
  refused: None, or why there is no program, in the compiler's words: then needed is what it would have had to hold (None: the
  compiler does not say), and what follows products is 0, None or empty.
  """

  arguments: int
  needed: int | None
  seconds: float
  products: int | None = None
  outputs: int = 0
  aliased: int = 0
  temporaries: int = 0
  flops: float | None = None
  collectives: tuple[Collective, ...] = ()
  refused: str | None = None

  def fits(self, memory: float | None) -> bool | None:
    """Whether a device that has so many bytes holds it; None where nobody says how many, and where they are fewer than needed.

    In the latter case it is not certain: the compiler took the program, and it looks at what is in use at once.
    """
    if self.refused is not None:
      return False
    return True if memory is not None and self.needed <= memory else None


def compiled(f: Any, *args: Any) -> Compiled:
  """Compile jax.jit(...) `f` for the devices that its arguments lie on, which need not exist (`parallel.topology`).

  args: arrays or jax.ShapeDtypeStructs with shardings, and static ones.  The cache of compiled programs is neither asked nor
  filled.  A program that does not fit is an answer, not an error.
  """
  arguments = sum(_device_bytes(x) for x in jax.tree.leaves(args) if hasattr(x, "sharding"))
  lowered = f.lower(*args)
  products = _products(lowered.as_text("hlo"))
  cached = jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)
  start = time.perf_counter()
  try:
    program = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if not str(error).startswith("RESOURCE_EXHAUSTED"):
      raise
    reason = str(error).partition(": ")[2].splitlines()[0]
    return Compiled(arguments, _needed(reason), time.perf_counter() - start, products, refused=reason)
  finally:
    jax.config.update("jax_enable_compilation_cache", cached)
  seconds, memory, cost = time.perf_counter() - start, program.memory_analysis(), program.cost_analysis()
  arguments, outputs, aliased, temporaries = (
    getattr(memory, f"{name}_size_in_bytes") for name in ("argument", "output", "alias", "temp")
  )
  return Compiled(
    *(arguments, arguments + outputs - aliased + temporaries, seconds, products),
    *(outputs, aliased, temporaries, (cost or {}).get("flops"), tuple(collectives(program.as_text()))),
  )


def _products(text: str) -> int | None:
  try:
    return dots(text, rounds=1)
  except DataError:  # products in branches: their number is not in the text
    return None


def _needed(reason: str) -> int | None:
  found = _NEEDED.search(reason)
  return round(float(found[1] or found[3]) * _UNITS[found[2] or found[4]]) if found else None


def _device_bytes(x: Any) -> int:
  shape = tuple(x.shape) if x.sharding is None else x.sharding.shard_shape(tuple(x.shape))
  return _itemsize(x.dtype) * math.prod(shape)


def _itemsize(dtype: Any) -> int:
  return 8 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else np.dtype(dtype).itemsize
