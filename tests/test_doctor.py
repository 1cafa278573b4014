"""jaxllm.doctor: what it finds on a machine, what it says of a checkpoint, and how it exits."""

import re

import pytest

from jaxllm import doctor
from jaxllm.config import Layer, ModelConfig
from jaxllm.nn import init_cache
from jaxllm.position import Rope

CFG = ModelConfig(
  vocab_size=64,
  embed_dim=32,
  num_layers=3,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  mlp_dim=48,
  layers=(Layer(Rope()),),
  dtype="bfloat16",
)


def machine(root, *devices, files=()):
  """A directory that looks like the root of a machine with PCI devices (vendor, class), and files in /dev."""
  for i, (vendor, kind) in enumerate(devices):
    place = root / "sys" / "bus" / "pci" / "devices" / f"0000:00:{i:02x}.0"
    place.mkdir(parents=True)
    (place / "vendor").write_text(f"{vendor}\n")
    (place / "class").write_text(f"{kind}\n")
  (root / "dev").mkdir()
  for name in files:
    (root / "dev" / name).write_text("")
  return root


GOOGLE, NVIDIA, INTEL = "0x1ae0", "0x10de", "0x8086"


@pytest.mark.parametrize(
  ("devices", "files", "wanted"),
  [
    pytest.param([(INTEL, "0x030000"), (GOOGLE, "0x020000"), (GOOGLE, "0x010802")], [], {}, id="none"),
    pytest.param([(NVIDIA, "0x030200"), (NVIDIA, "0x040300")], [], {"NVIDIA GPU": 1}, id="a GPU with sound"),
    pytest.param([(GOOGLE, "0x088000")] * 4, [], {"TPU": 4}, id="TPU"),
    pytest.param([], ["nvidia0", "nvidia1", "nvidiactl"], {"NVIDIA GPU": 2}, id="GPUs in a container"),
    pytest.param([], ["accel0"], {"TPU": 1}, id="TPU in a container"),
    pytest.param([(NVIDIA, "0x030200")], ["nvidia0"], {"NVIDIA GPU": 1}, id="seen twice"),
  ],
)
def test_accelerators_are_found_whether_jax_uses_them_or_not(tmp_path, devices, files, wanted):
  assert doctor.accelerators(machine(tmp_path, *devices, files=files)) == wanted


def test_a_fall_back_to_the_cpu_is_said_and_an_accelerator_in_use_is_not(monkeypatch):
  monkeypatch.delenv("JAX_PLATFORMS", raising=False)
  assert doctor.fall_back("gpu", {"NVIDIA GPU": 1}, []) is None
  assert doctor.fall_back("cpu", {}, []) is None
  said = doctor.fall_back("cpu", {"NVIDIA GPU": 2}, ["numpy 2.4.6"])
  assert "2 x NVIDIA GPU, AND JAX RUNS ON THE CPU" in said and "no plugin of JAX is installed" in said
  said = doctor.fall_back("cpu", {"TPU": 4}, ["libtpu 0.0.42", "numpy 2.4.6"])
  assert "libtpu 0.0.42 is installed" in said and "numpy" not in said
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  assert "JAX_PLATFORMS=cpu is set" in doctor.fall_back("cpu", {"TPU": 4}, [])


def test_the_cache_is_counted_as_it_is_allocated():
  cache = init_cache(CFG, 1, 50)
  assert doctor.cache_bytes(CFG, 50) == sum(x.nbytes for x in (*cache.k, *cache.v, cache.pos, cache.length))
  assert doctor.cache_bytes(CFG, 50) == 2 * 3 * 2 * 8 * 50 * 2 + 4 * 50 + 4


def test_what_does_not_fit_is_wrong():
  weights, cache = 1000, doctor.cache_bytes(CFG, 50)
  need = weights + cache
  memory = lambda size, devices=1: doctor.Memory(size, devices, "each")
  assert doctor.fit(CFG, weights, 50, memory(need))[1] is None
  assert "does not fit:" in doctor.fit(CFG, weights, 50, memory(need - 1))[1]
  assert "--mesh=fsdp=4" in doctor.fit(CFG, weights, 50, memory(need - 1, 4))[1]
  assert doctor.fit(CFG, weights, 50, None) == (
    f"memory: 1000 B of weights + {doctor.gib(cache)} for a cache of 50 tokens",
    None,
  )
  assert "--context" in doctor.fit(CFG, weights, None, memory(1))[0]


@pytest.mark.parametrize(
  ("size", "shown"), [(0, "0 B"), (1536, "1.5 KiB"), (2**20, "1 MiB"), (int(2.5 * 2**30), "2.5 GiB")]
)
def test_sizes_in_words(size, shown):
  assert doctor.gib(size) == shown


def test_the_machine_of_this_test():
  lines, _ = doctor.machine_lines()
  text = "\n".join(lines)
  assert re.search(r"devices: 8 x cpu \(cpu\)", text)
  for name in doctor.NEEDED:
    assert re.search(rf"\b{name} \d", text), name
