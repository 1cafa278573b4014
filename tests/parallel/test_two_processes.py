"""The same code in two local processes, and what is said when processes do not find each other."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from mesh_cases import CASES, source
from mesh_checks import forward, make_mesh, relative_error, tokens

from jaxllm import parallel
from jaxllm.errors import ConfigError
from jaxllm.parallel import multihost

HERE = Path(__file__).parent


def free_port():
  with socket.create_server(("localhost", 0)) as server:
    return server.getsockname()[1]


def environment():
  """Four devices; no address of another run."""
  paths = (str(HERE.parents[1]), str(HERE.parent), str(HERE))
  kept = {name: value for name, value in os.environ.items() if name not in multihost.VARIABLES.values()}
  flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")
  return kept | dict(XLA_FLAGS=flags, JAX_PLATFORMS="cpu", PYTHONPATH=os.pathsep.join(paths))


def test_two_processes_compute_what_one_does(tmp_path):
  port, out = free_port(), tmp_path / "out.npz"
  command = [sys.executable, str(HERE / "two_processes.py"), str(port)]
  both = [
    subprocess.Popen(
      [*command, str(i), str(out)],
      env=environment(),
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for i in range(2)
  ]
  try:
    said = [process.communicate(timeout=150)[0] for process in both]
  finally:
    for process in both:
      process.kill()
  assert [process.returncode for process in both] == [0, 0], "\n".join(said)
  cfg, found = CASES["llama"], np.load(out)
  loss, logits = jax.jit(lambda params, ids: forward(cfg, params, ids))(source("llama")(), tokens(cfg))
  assert relative_error(found["loss"], loss) <= 1e-5 and relative_error(found["logits"], logits) <= 1e-5
  mesh = make_mesh("fsdp=2,tensor=4")
  expected = parallel.bytes_per_device(source("llama")(), mesh, parallel.RULES["fsdp_tensor"], cfg)
  assert int(found["held"]) == 4 * expected
  losses = {text.split("loss ")[-1].strip() for text in said}
  assert len(losses) == 1 and float(losses.pop()) == pytest.approx(float(loss), rel=1e-5)


def test_alone():
  """Nothing is said of other processes: there are none."""
  assert not any(os.environ.get(name) for name in multihost.VARIABLES.values())
  assert multihost.initialize() is False
  assert multihost.initialize("localhost:1234", 1, 0) is False


@pytest.mark.core
@pytest.mark.parametrize(
  ("arguments", "named"),
  [
    (("localhost:1234", 2, None), ("no index (or JAX_PROCESS_ID)",)),
    ((None, 2, 1), ("no coordinator (or JAX_COORDINATOR_ADDRESS)",)),
    (("localhost:1234", None, None), ("processes (or JAX_NUM_PROCESSES), index",)),
    (("localhost", 2, 0), ("'localhost'", "host:port")),
    (("localhost:port", 2, 0), ("'localhost:port'", "host:port")),
    (("localhost:70000", 2, 0), ("'localhost:70000'",)),
    (("localhost:1234", 2, 2), ("index = 2", "0 to 1")),
    (("localhost:1234", 2, -1), ("index = -1", "0 to 1")),
    (("localhost:1234", 0, 0), ("processes = 0", "at least 1")),
    (("localhost:1234", "two", 0), ("processes = 'two'", "an integer")),
  ],
)
def test_errors_name_the_argument(arguments, named):
  with pytest.raises(ConfigError) as error:
    multihost.initialize(*arguments)
  assert all(part in str(error.value) for part in named), error.value


def test_arguments_from_the_environment(monkeypatch):
  monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1234")
  monkeypatch.setenv("JAX_NUM_PROCESSES", "3")
  monkeypatch.setenv("JAX_PROCESS_ID", "3")
  with pytest.raises(ConfigError, match="index = 3, expected 0 to 2"):
    multihost.initialize()
  monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
  assert multihost.initialize(index=0) is False


def test_nothing_at_the_address():
  with pytest.raises(multihost.MultihostError, match=r"process 1 found nothing at localhost:\d+ for 0.2 s"):
    multihost.initialize(f"localhost:{free_port()}", 2, 1, timeout=0.2)


def test_a_port_that_is_taken():
  with (
    socket.create_server(("", 0)) as server,
    pytest.raises(multihost.MultihostError, match="cannot open the port"),
  ):
    multihost.initialize(f"localhost:{server.getsockname()[1]}", 2, 0)


def test_after_a_device_was_used():
  jax.devices()
  with pytest.raises(ConfigError, match="before any JAX"):
    multihost.initialize(f"localhost:{free_port()}", 2, 0)


@pytest.mark.slow
def test_a_process_that_waits_alone_ends():
  """JAX aborts it after the timeout, and a line says why."""
  code = (
    f"from jaxllm.parallel import multihost; multihost.initialize('localhost:{free_port()}', 2, 0, timeout=2)"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=100
  )
  assert done.returncode != 0
  assert "process 0 of 2 has waited 2 s for the others and will stop" in done.stderr
