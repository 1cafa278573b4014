"""Devices of TPU slices that are not there: the TPU compiler, which needs no TPU, compiles for them on any Linux machine.

mesh = make_mesh("fsdp=16", topology.devices("v5e:4x4"))
with jax.set_mesh(mesh):
  program = jax.jit(f).lower(abstract_arguments).compile()   # memory, text and cost; it cannot be run
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Iterator, Mapping

import jax

from jaxllm.errors import ConfigError

EXTRA = "tpu"
"""The extra that brings libtpu, the TPU compiler, in the version that the installed jax asks for."""

ENVIRONMENT: Mapping[str, str] = {
  "TPU_SKIP_MDS_QUERY": "1",  # no question to the metadata server that a TPU machine has
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # any: the topology says which it is
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # the lock of a machine's TPUs is for processes that run something on them
}
"""What libtpu reads when it is loaded: without these it looks for a TPU's machine, and one process at a time can use it."""


@dataclasses.dataclass(frozen=True)
class Generation:
  """A kind of TPU: the shapes that its slices have, in chips, and how a program sees a chip.

  plane: shapes of two dimensions, or () where a slice has three.  most: chips of the largest slice.  cores: devices a chip.
  config: libtpu's name for a chip's mode; "megacore" makes one device of two cores, as JAX does on such machines.
  chip: its name in `flops.DEVICES`.  memory: GiB that the compiler lets a device use, of what the data sheet says.
  """

  chip: str
  memory: float
  most: int
  plane: tuple[tuple[int, int], ...] = ()
  cores: int = 1
  config: str = "default"

  @property
  def shapes(self) -> Iterator[tuple[int, ...]]:
    """All shapes, from few chips to many."""
    if self.plane:
      yield from self.plane
      return
    yield from ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
    sizes = range(4, self.most // 16 + 1, 4)
    all_of = (
      (a, b, c)
      for a in sizes
      for b in sizes[a // 4 - 1 :]
      if a * b * b <= self.most
      for c in sizes[b // 4 - 1 : self.most // (4 * a * b)]
    )
    yield from sorted(all_of, key=lambda shape: (_chips(shape), shape[::-1]))


_POD = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
GENERATIONS = {
  "v3": Generation("tpu-v3", 15.48, 1024, ((2, 2), *_POD[3:], (16, 32), (32, 32)), cores=2),
  "v4": Generation("tpu-v4", 30.75, 4096, config="megacore"),
  "v5e": Generation("v5e", 15.75, 256, _POD),
  "v5p": Generation("v5p", 95.74, 6144),
  "v6e": Generation("v6e", 31.25, 256, _POD),
}
"""Kinds of TPU by name.  Slices of v4 and v5p are 4i x 4j x 4k chips with i <= j <= k, or one of four smaller ones.

Source: Google Cloud TPU documentation, the page of each version, and "TPU configurations"; the memory is what libtpu 0.0.42
says when it refuses a program.
"""


def devices(name: str) -> list[jax.Device]:
  """The devices of "v5e:4x4", a kind and a shape in chips, for `make_mesh`: to compile for, not to run on.

  Sets what of ENVIRONMENT is not set, and JAX_PLATFORMS=cpu where nothing says which platform to use and none is in use, as
  jax would else look for the TPU that libtpu's presence promises.  Raises ConfigError for a name that is none, naming the
  nearest, and where libtpu is missing or is not the one that jax needs.
  """
  kind, shape = parse(name)
  if importlib.util.find_spec("libtpu") is None:
    raise ConfigError(
      f"topology {name!r}: found no libtpu, expected the TPU compiler, which runs without a TPU; pip install 'jaxllm[{EXTRA}]'"
    )
  for variable, value in ENVIRONMENT.items():
    os.environ.setdefault(variable, value)
  if not jax.config.jax_platforms:
    jax.config.update("jax_platforms", "cpu")
  from jax.experimental import topologies

  try:
    described = topologies.get_topology_desc(
      platform="tpu",
      topology_name=f"{name.partition(':')[0]}:{'x'.join(map(str, shape))}",
      chip_config_name=kind.config,
      chips_per_host_bounds=(*(min(n, 2) for n in shape[:2]), 1),
      num_slices=1,
    )
  except jax.errors.JaxRuntimeError as error:
    raise ConfigError(
      f"topology {name!r}: libtpu does not describe it ({str(error).splitlines()[0]}); expected the libtpu of this jax: "
      f"pip install -U 'jaxllm[{EXTRA}]'"
    ) from error
  return list(described.devices)


def parse(name: str) -> tuple[Generation, tuple[int, ...]]:
  """(the kind, the shape) of "v5e:4x4"; raises ConfigError for a name that is none, naming the nearest."""
  kind, colon, sizes = name.partition(":")
  if kind not in GENERATIONS:
    raise ConfigError(
      f"topology {name!r}: found the kind {kind!r}, expected one of {', '.join(GENERATIONS)} and a shape, as in v5e:4x4"
    )
  generation = GENERATIONS[kind]
  shapes = list(generation.shapes)
  try:
    shape = tuple(map(int, sizes.split("x")))
  except ValueError:
    shape = ()
  if shape not in shapes:
    flat = "" if len(shape) == len(shapes[0]) else f"{len(shapes[0])} sizes, "
    near = [f"{kind}:{'x'.join(map(str, one))}" for one in _nearest(shape, shapes)]
    raise ConfigError(
      f"topology {name!r}: found {sizes if colon else 'no shape'}, expected {flat}a slice that there is; "
      f"the nearest {'are' if near[1:] else 'is'} {' and '.join(near)}"
    )
  return generation, shape


def _nearest(shape: tuple[int, ...], shapes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
  """That of the same sizes in order or of as many chips, or the next smaller and larger ones; the smallest for no shape."""
  alike = [one for one in shapes if sorted(one) == sorted(shape)]
  if alike or not shape or min(shape) < 1:
    return alike or shapes[:1]
  chips = _chips(shape)
  below = [one for one in shapes if _chips(one) <= chips][-1:]
  above = [one for one in shapes if _chips(one) >= chips][:1]
  return list(dict.fromkeys(below + above))


def _chips(shape: tuple[int, ...]) -> int:
  product = 1
  for size in shape:
    product *= size
  return product
