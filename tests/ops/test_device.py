"""What a program is traced for, on a machine whose default backend is another."""

import types

import jax
import pytest

from jaxllm.ops.device import Device, current_device
from jaxllm.parallel import make_mesh

CPU = jax.devices()[0]
CUDA = types.SimpleNamespace(
  platform="gpu", client=types.SimpleNamespace(platform_version="cuda 12090"), compute_capability="9.0"
)


@pytest.fixture
def cuda(monkeypatch):
  """A machine of one GPU, which is the default, and CPUs."""
  monkeypatch.setattr(jax, "devices", lambda backend=None: [CPU if backend == "cpu" else CUDA])
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def test_the_default_backend(cuda):
  assert current_device() == Device("cuda", (9, 0))


@pytest.mark.parametrize("chosen", [CPU, "cpu"])
def test_a_default_device_of_another_backend(cuda, chosen):
  with jax.default_device(chosen):
    assert current_device() == Device("cpu")


@pytest.mark.parametrize("axes", ["data=1", "data=8"])
def test_a_mesh_of_another_backend(cuda, axes):
  devices = CPU.client.devices()[: int(axes[5:])]
  with jax.set_mesh(make_mesh(axes, devices)):
    assert current_device() == Device("cpu", partitioned=axes == "data=8")
