"""jaxllm.doctor: what it finds on a machine, what it says of a checkpoint, and how it exits."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from doctor_case import call

from jaxllm import doctor, hf
from jaxllm.activation import Glu
from jaxllm.config import Layer, ModelConfig
from jaxllm.experts import Moe, SoftmaxRouter
from jaxllm.generate.loop import PART
from jaxllm.hf import sums
from jaxllm.nn import Transformer, init_cache
from jaxllm.norm import RMSNorm
from jaxllm.ops.memory import Memory
from jaxllm.position import Rope
from jaxllm.study import describe
from jaxllm.wiring import Sandwich

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
  assert doctor.cache_bytes(CFG, 50) == sum(x.nbytes for x in (*cache.k, *cache.v, *cache.pos, cache.length))
  assert doctor.cache_bytes(CFG, 50) == 2 * 3 * 2 * 8 * 50 * 2 + 4 * 50 + 4


def test_a_layer_with_a_window_is_counted_as_its_window():
  windowed = dataclasses.replace(CFG, layers=(Layer(window=100), Layer(), Layer()))
  full, ring = (doctor.cache_bytes(cfg, 100_000) for cfg in (CFG, windowed))
  assert full - ring == 2 * 2 * 8 * 2 * (100_000 - 100 - PART) - 4 * (100 + PART)


def test_what_does_not_fit_is_wrong():
  weights, cache = 1000, doctor.cache_bytes(CFG, 50)
  need = weights + cache
  memory = lambda size, devices=1: Memory(size, devices, "each")
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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """A directory with a window on each second layer, tied, in bfloat16."""
  root = tmp_path_factory.mktemp("doctor") / "model"
  cfg = dataclasses.replace(
    CFG,
    vocab_size=300,
    num_layers=4,
    layers=(Layer(Rope(original_length=32), 16), Layer(Rope(original_length=32))),
    norm=RMSNorm(scale="1+w"),
    mlp=Glu("gelu_tanh"),
    wiring=Sandwich(),
    embed_scale=32**0.5,
    attention_softcap=50.0,
    logit_softcap=30.0,
    tie_embeddings=True,
    context_length=64,
  )
  shapes = jax.eval_shape(Transformer(cfg).init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
  params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, jnp.bfloat16), shapes)
  hf.save(root, cfg, params, hf.byte_tokenizer())
  (root / sums.NAME).unlink()  # as tests change its files
  return root


def test_experts_in_words():
  """Which layers have how many, and that layers which differ in nothing else are one line elsewhere."""
  layers = (Layer(Rope(original_length=32)), Layer(Rope(original_length=32), mlp=Glu()))
  moe = Moe(Glu(), 6, 2, SoftmaxRouter(False), mlp_dim=20)
  lines = describe.model_lines(dataclasses.replace(CFG, num_layers=4, layers=layers, mlp=moe), 16)
  assert (
    "experts: layers 0, 2: 6 of hidden width 20, 2 a token, Glu (activation silu), weighted by SoftmaxRouter "
    "(renormalize False)"
  ) in lines
  assert sum("all keys" in line for line in lines) == 1 and lines[-1].count("Rope") == 1


@pytest.mark.core
def test_what_a_checkpoint_is(checkpoint, monkeypatch, capfd):
  monkeypatch.setattr(doctor, "accelerators", lambda: {})
  assert call(f"--model={checkpoint}") == 0
  out = capfd.readouterr().out
  header = json.loads((checkpoint / "config.json").read_text())
  with open(checkpoint / "model.safetensors", "rb") as file:
    tensors = json.loads(file.read(int.from_bytes(file.read(8), "little")))
  sizes = [
    t["data_offsets"][1] - t["data_offsets"][0] for name, t in tensors.items() if name != "__metadata__"
  ]
  for words in (
    f"family {header['model_type']}, {sum(sizes) // 2:,} parameters, {doctor.gib(sum(sizes))} bfloat16",
    "head tied to the embedding",
    "layers 0, 2: rope (base 10000.0, layout half, original_length 64), the 16 nearest keys",
    "layers 1, 3: rope (base 10000.0, layout half, original_length 64), all keys",
    "attention soft cap 50",
    "logit soft cap 30",
    "bfloat16 compute",
    f"{doctor.gib(sum(sizes))} of weights + {doctor.gib(2 * 4 * 2 * 8 * 64 * 2 + 4 * 64 + 4)} for a cache of 64 tokens",
    "tokenizer: 256 ids, 44 rows of the embedding without one",
    "unused: none",
    "ignored: ",
  ):
    assert words in out, words


@pytest.mark.parametrize("cached", [False, True])
def test_no_weights_of_a_repository_are_fetched(checkpoint, tmp_path, monkeypatch, capfd, cached):
  """Without them the same numbers by config.json; with them, from a load before, their headers are read."""
  huggingface_hub = pytest.importorskip("huggingface_hub")
  snapshot = shutil.copytree(checkpoint, tmp_path / "snapshot")
  if not cached:
    (snapshot / "model.safetensors").unlink()
  asked = []

  def download(name, allow_patterns, **kwargs):
    asked.extend(allow_patterns)
    return str(snapshot)

  monkeypatch.setattr(doctor, "accelerators", lambda: {})
  assert call(f"--model={checkpoint}") == 0
  directory = capfd.readouterr().out
  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  monkeypatch.chdir(tmp_path)
  assert call("--model=owner/tiny") == 0
  out = capfd.readouterr().out
  assert asked and not [pattern for pattern in asked if "safetensors" in pattern]
  assert ("their tensors are not checked" in out) == (not cached)
  assert ("unused: none" in out) == cached
  for pattern in (
    r"[\d,]+ parameters, [\d.]+ \w+",
    r"memory: .* of weights.*",
    r"tokenizer: .*",
    r"family \w+",
  ):
    assert re.search(pattern, out)[0] == re.search(pattern, directory)[0]


def test_settings_and_tensors_that_change_nothing_are_named(checkpoint, tmp_path, monkeypatch, capfd):
  monkeypatch.setattr(doctor, "accelerators", lambda: {})
  model = shutil.copytree(checkpoint, tmp_path / "model")
  plain = json.loads((model / "config.json").read_text()) | {"initializer_range": 0.02}
  (model / "config.json").write_text(json.dumps(plain))
  assert call(f"--model={model}", "--context=8") == 0
  out = capfd.readouterr().out
  assert "initializer_range" in out.split("ignored: ")[1].splitlines()[0]
  assert "for a cache of 8 tokens" in out


@pytest.mark.parametrize(
  ("change", "code", "named"),
  [
    ({"rope_type_of_mine": 3}, 2, ["rope_type_of_mine"]),
    ({"num_hidden_layers": 5}, 65, ["num_hidden_layers", "missing"]),
  ],
)
def test_what_cannot_be_loaded_says_why(checkpoint, tmp_path, capfd, change, code, named):
  model = shutil.copytree(checkpoint, tmp_path / "model")
  plain = json.loads((model / "config.json").read_text())
  plain = {
    name: value for name, value in plain.items() if name != "layer_types" or "num_hidden_layers" not in change
  }
  (model / "config.json").write_text(json.dumps(plain | change))
  assert call(f"--model={model}") == code
  error = capfd.readouterr().err
  for words in named:
    assert words in error, error


@pytest.mark.parametrize(
  ("damage", "named"),
  [
    ("nan", "1 value is NaN or infinite"),
    ("flip", "found the SHA-256"),
    (None, "every value is finite; 1 of 1"),
  ],
)
def test_weights_are_read_where_that_is_asked(checkpoint, tmp_path, monkeypatch, capfd, damage, named):
  """Of two bytes that no header tells of, each is met by --weights alone, which a run without it says."""
  monkeypatch.setattr(doctor, "accelerators", lambda: {})
  model, weights = tmp_path / "model", tmp_path / "model" / "model.safetensors"
  hf.save(model, *hf.load(checkpoint))
  data = bytearray(weights.read_bytes())
  data[-2:] = b"\xc0\x7f" if damage == "nan" else data[-2:]
  data[-8] ^= damage == "flip"
  weights.write_bytes(data)
  if damage == "nan":
    (model / sums.NAME).unlink()
  assert call(f"--model={model}") == 0
  assert "weights: not read; --weights" in capfd.readouterr().out
  assert call(f"--model={model}", "--weights") == (65 if damage else 0)
  said = capfd.readouterr()
  assert named in (said.err if damage else said.out)


def test_a_fall_back_ends_with_1(monkeypatch, capfd):
  monkeypatch.setattr(doctor, "accelerators", lambda: {"NVIDIA GPU": 1})
  assert call() == 1
  assert "AND JAX RUNS ON THE CPU" in capfd.readouterr().err


@pytest.mark.parametrize(
  ("args", "named"),
  [
    (["--context=0"], "--context=0"),
    (["--context=5"], "without --model"),
    (["--modell=x"], "--model"),
    (["--weights"], "without --model"),
  ],
)
def test_bad_flags(capfd, args, named):
  assert call(*args) == 2
  assert named in capfd.readouterr().err
