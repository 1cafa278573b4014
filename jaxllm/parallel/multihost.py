"""Several processes that run the same program on one mesh."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxllm.errors import ConfigError, JaxllmError

VARIABLES = {
  "coordinator": "JAX_COORDINATOR_ADDRESS",
  "processes": "JAX_NUM_PROCESSES",
  "index": "JAX_PROCESS_ID",
}
"""The environment variable that stands in for each argument of `initialize`."""


class MultihostError(JaxllmError):
  """The processes of a run did not find each other, or one was lost."""

  exit_code = 1


@contextlib.contextmanager
def together() -> Iterator[None]:
  """Of several processes, what JAX says of collectives that another one left is a MultihostError.

  After it JAX itself ends the process, within the minute in which it waits for the others, by SIGABRT.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if jax.process_count() == 1:
      raise
    which = f"process {jax.process_index()} of {jax.process_count()}"
    raise MultihostError(
      f"multihost: {which}: another process was lost, or a device failed ({str(error).splitlines()[0][:200]}); what was saved "
      "is kept: see what the others say, and start all of them again"
    ) from error


def initialize(
  coordinator: str | None = None,
  processes: int | None = None,
  index: int | None = None,
  *,
  timeout: int = 120,
) -> bool:
  """Join the other processes of the run, before anything else touches a device; True if there are others to join.

  coordinator: "host:port" of process 0, which opens that port.  processes: how many there are.  index: which this is, from 0.
  What is not given is read from the environment (VARIABLES); with none of them set this process runs alone: nothing is done.
  On machines that tell by themselves (Cloud TPU, Slurm, Open MPI) coordinator "auto" asks them for all three.

  Afterwards `jax.devices()`, and so `make_mesh`, are those of all processes, and each runs the same program: `shard` and
  `shard_batch` take arrays that every process holds whole and read the parts of its own devices.  A process that dies takes the
  others with it once its heartbeat is missed.

  timeout: seconds to wait for the others.  Then JAX aborts the process (SIGABRT), a line on stderr having said why.  Raises
  ConfigError for an argument that is missing or cannot be, or after a device was used; MultihostError where nothing answers at
  the coordinator's address, or its port is taken.
  """
  given = dict(coordinator=coordinator, processes=processes, index=index)
  given = {name: os.environ.get(VARIABLES[name]) if value is None else value for name, value in given.items()}
  if given["coordinator"] == "auto":
    address, count, number = None, None, None
  elif all(value is None for value in given.values()):
    return False
  else:
    address, count, number = _checked(**given)
    if count == 1:
      return False
    _check_address(address, number, timeout)
  who = "this process" if number is None else f"process {number} of {count}"
  late = threading.Timer(
    0.9 * timeout, _say, [f"{who} has waited {0.9 * timeout:.0f} s for the others and will stop"]
  )
  late.daemon = True
  late.start()
  try:
    jax.distributed.initialize(address, count, number, initialization_timeout=timeout)
  except (RuntimeError, ValueError) as error:
    raise ConfigError(f"multihost.initialize: {error}") from error
  finally:
    late.cancel()
  return True


def by_first(work: Callable[[], Any], where: object, tell: bool = False) -> Any:
  """work() in the first process of a run, for whose end the others wait; all raise where it fails.

  where: what it is done to, for errors.  tell: give its result, a whole number from 0 or None, to the others too.  Raises in
  the first process what work() does, in the others OSError.
  """
  if jax.process_count() == 1:
    return work()
  result, error = None, None
  if jax.process_index() == 0:
    try:
      result = work()
    except Exception as e:
      error = e
  told = -1 if not tell or result is None else result
  failed, told = multihost_utils.broadcast_one_to_all(np.array([error is not None, told], np.int32))
  if error is not None:
    raise error
  if failed:
    raise OSError(errno.EIO, "process 0 failed, and says why", str(where))
  return None if told < 0 else int(told)


def _checked(coordinator: object, processes: object, index: object) -> tuple[str, int, int]:
  values = dict(coordinator=coordinator, processes=processes, index=index)
  if missing := [f"{name} (or {VARIABLES[name]})" for name, value in values.items() if value is None]:
    raise ConfigError(
      f"multihost.initialize: found no {', '.join(missing)}, expected coordinator, processes and index, or none of them"
    )
  host, _, port = str(coordinator).rpartition(":")
  if not host or not port.isdigit() or not 0 < int(port) < 2**16:
    raise ConfigError(
      f"multihost.initialize: found coordinator = {coordinator!r} (or {VARIABLES['coordinator']}), expected host:port, "
      "as in 10.0.0.1:1234"
    )
  count, number = _integer("processes", processes), _integer("index", index)
  if count < 1:
    raise ConfigError(f"multihost.initialize: found processes = {count}, expected at least 1")
  if not 0 <= number < count:
    raise ConfigError(
      f"multihost.initialize: found index = {number}, expected 0 to {count - 1}, as there are {count} processes"
    )
  return str(coordinator), count, number


def _integer(name: str, value: object) -> int:
  try:
    return int(str(value))
  except ValueError:
    raise ConfigError(
      f"multihost.initialize: found {name} = {value!r} (or {VARIABLES[name]}), expected an integer"
    ) from None


def _check_address(coordinator: str, index: int, timeout: float) -> None:
  """Where JAX would abort the process: a coordinator that does not answer in time, or (in process 0) a port that is taken."""
  host, _, port = coordinator.rpartition(":")
  deadline = time.monotonic() + timeout
  while True:
    try:
      if index == 0:
        with socket.create_server(("", int(port))):
          return
      with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
        return
    except OSError as error:
      if index == 0:
        raise MultihostError(
          f"multihost: process 0 cannot open the port of {coordinator}: {error}; choose another"
        ) from error
      if time.monotonic() > deadline:
        raise MultihostError(
          f"multihost: process {index} found nothing at {coordinator} for {timeout} s ({error}); check that process 0 runs "
          "there and that the port can be reached"
        ) from error
    time.sleep(0.1)


def _say(message: str) -> None:
  print(
    f"multihost: {message}; check that all processes run, each with its own index",
    file=sys.stderr,
    flush=True,
  )
