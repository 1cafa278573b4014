"""Names of topologies; and, with libtpu, programs compiled for TPUs that are not there, in processes of their own."""

import dataclasses
import importlib.util
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxllm import flops, hf
from jaxllm.errors import ConfigError
from jaxllm.flops import DEVICES
from jaxllm.parallel import topology

ROOT = Path(__file__).parents[2]
MISSING = importlib.util.find_spec("libtpu") is None
needs_libtpu = pytest.mark.skipif(MISSING, reason="pip install 'jaxllm[tpu]'")
TINY = dict(
  **dict(architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=512, hidden_size=512),
  **dict(
    intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, head_dim=128
  ),
  **dict(max_position_embeddings=256, rms_norm_eps=1e-5, rope_theta=1e4, tie_word_embeddings=False),
  **dict(hidden_act="silu", torch_dtype="bfloat16"),
)
LAYER = 4 * 512 * 512 + 3 * 512 * 512
"""Numbers of a layer's matrices."""
NORMS = 512 * (2 * 2 + 1)
TABLES = 2 * 512 * 512


@pytest.mark.core
@pytest.mark.parametrize(
  ("name", "named"),
  [
    ("v5e:3x3", ("found 3x3", "v5e:2x4 and v5e:4x4")),
    ("v5e:8x4", ("found 8x4", "is v5e:4x8")),
    ("v5e:32x32", ("found 32x32", "is v5e:16x16")),
    ("v5e:4x4x4", ("2 sizes", "is v5e:8x8")),
    ("v5e:0x4", ("found 0x4", "is v5e:1x1")),
    ("v5e:fourxfour", ("found fourxfour", "is v5e:1x1")),
    ("v5e", ("found no shape", "is v5e:1x1")),
    ("v4:4x4", ("3 sizes", "is v4:2x2x4")),
    ("v5p:4x4x6", ("found 4x4x6", "v5p:4x4x4 and v5p:4x4x8")),
    ("v4:16x16x24", ("found 16x16x24", "is v4:")),  # more than a v4 has
    ("v9:2x2", ("the kind 'v9'", "v3, v4, v5e, v5p, v6e")),
    ("", ("the kind ''", "as in v5e:4x4")),
  ],
)
def test_errors_name_the_nearest(name, named):
  with pytest.raises(ConfigError) as error:
    topology.parse(name)
  assert all(part in str(error.value) for part in named), error.value


def test_shapes():
  """Google's tables have these; each is named by its own name, and no slice is larger than its kind's largest."""
  shapes = {name: list(one.shapes) for name, one in topology.GENERATIONS.items()}
  for name, one in (
    ("v3", (4, 8)), ("v4", (2, 2, 1)), ("v4", (4, 4, 4)), ("v4", (8, 16, 16)), ("v4", (12, 16, 16)),
    ("v5p", (4, 4, 12)), ("v5p", (16, 16, 24)), ("v5e", (2, 4)), ("v5e", (16, 16)), ("v6e", (8, 16)),
  ):  # fmt: skip
    assert one in shapes[name]
    assert topology.parse(f"{name}:{'x'.join(map(str, one))}") == (topology.GENERATIONS[name], one)
  for name, generation in topology.GENERATIONS.items():
    sizes = [topology._chips(shape) for shape in shapes[name]]
    assert sizes == sorted(sizes) and sizes[-1] <= generation.most and len(set(shapes[name])) == len(sizes)
    chip = DEVICES[generation.chip]
    assert 0.93 * chip.memory < generation.memory * 2**30 * generation.cores < 1.09 * chip.memory


def test_without_libtpu(monkeypatch):
  find = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name))
  with pytest.raises(ConfigError, match=r"v5e:4x4.*no libtpu.*pip install 'jaxllm\[tpu\]'"):
    topology.devices("v5e:4x4")


TRAINING = ("experiments.train", "--compile_only", "--scan", "--remat=full")
DECODING = ("experiments.compile",)


def compile_for(tmp_path, script, *arguments):
  """{quantity: value} of the results, and the report, of a process of a script."""
  command = [sys.executable, "-m", *script, f"--out={tmp_path / 'out'}", *arguments]
  env = {
    name: value for name, value in os.environ.items() if name not in (*topology.ENVIRONMENT, "XLA_FLAGS")
  }
  ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
  assert ran.returncode == 0, ran.stderr[-3000:]
  out = tmp_path / "out" / ("compiled" if script is TRAINING else "")
  rows = map(json.loads, (out / "results.jsonl").read_text().splitlines())
  return {row["quantity"]: row["value"] for row in rows}, (out / "report.md").read_text()


def tiny(tmp_path, **changes):
  (tmp_path / "model").mkdir()
  (tmp_path / "model" / "config.json").write_text(json.dumps(TINY | changes))
  return f"--model={tmp_path / 'model'}"


@needs_libtpu
def test_a_training_step(tmp_path):
  """Bytes of ZeRO's third stage: weights, norms too, and moments, 12 a number, in four.  Every weight is gathered."""
  model = tiny(tmp_path)
  found, report = compile_for(
    tmp_path, TRAINING, model, "--topology=v5e:2x2", "--length=64", "--batch_size=8"
  )
  state = 12 * (2 * LAYER + TABLES + NORMS) // 4
  assert state < found["arguments"] < 1.02 * state  # tiles, tokens and counters beside it
  assert found["aliased"] == pytest.approx(found["arguments"], abs=2**14)
  assert found["needed"] == found["arguments"] + found["outputs"] - found["aliased"] + found["temporaries"]
  assert found["fits"] == 1 and "| fits" in report and "TPU v5 lite" in report
  cfg = hf.load_config(tmp_path / "model")[1]
  count = flops.count(cfg, 64, remat="full")
  down = 2 * 64 * 512 * 512 * 2  # computed again by the formula alone: nobody reads it
  assert found["FLOPs of the program's products"] == 8 * (64 * count.hardware - down) / 4
  moved = found["all-gather, results"] + found.get("collective-permute, results", 0)
  assert moved > 2 * 2 * (2 * LAYER)  # forward and, computed again, backward, in bfloat16
  assert found["reduce-scatter, number"] > 0


@needs_libtpu
def test_decoding_in_integers(tmp_path):
  """Weights of a byte in four; two sums a layer, one of the embedding, and those that find a token."""
  model = tiny(tmp_path)
  arguments = ("--topology=v5e:2x2", "--length=64", "--batch_size=8")
  found, _ = compile_for(tmp_path, DECODING, model, *arguments)
  weights = (2 * LAYER + 2 * TABLES) // 4 + 2 * NORMS
  cache = 2 * 2 * 2 * 8 * 64 * 512 // 4
  assert weights + cache < found["arguments"] < 1.1 * (weights + cache)
  assert found["FLOPs by formula"] == found["FLOPs of the program's products"]
  assert found["FLOPs by XLA, loops once"] == pytest.approx(found["FLOPs by formula"], rel=0.1)
  assert found["all-reduce, number"] == 2 * 2 + 1 + 3 and found["fits"] == 1
  assert not {"all-gather, number", "all-to-all, number"} & {*found}


@needs_libtpu
def test_what_does_not_fit_is_said(tmp_path):
  """Twelve bytes a number, and gradients, on one chip of 16 GiB."""
  model = tiny(tmp_path, hidden_size=8192, intermediate_size=65536)
  arguments = ("--topology=v5e:1x1", "--mesh=data=1", "--length=64", "--batch_size=1")
  found, report = compile_for(tmp_path, TRAINING, model, *arguments)
  assert found["fits"] == 0 and found["needed"] > found["memory"] and found["temporaries"] is None
  assert "does not fit: Ran out of memory" in report


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(("remat", "length", "fits"), [("full", 2048, 1), ("none", 2048, 0)])
def test_llama_3_8b_on_sixteen_chips(tmp_path, remat, length, fits):
  """float32 weights and moments in sixteen: 12 bytes x 8.03 B / 16 = 6.02 GB, and what a layer's gradient takes."""
  arguments = (f"--length={length}", "--batch_size=16", f"--remat={remat}")
  found, _ = compile_for(tmp_path, TRAINING, "--shape=llama-3-8b", "--topology=v5e:4x4", *arguments)
  assert found["arguments"] == pytest.approx(12 * 8_030_261_248 / 16, rel=2e-3)
  assert found["fits"] == fits


@needs_libtpu
@pytest.mark.slow
def test_llama_3_70b_decodes_in_integers(tmp_path):
  arguments = ("--mesh=data=2,tensor=8", "--batch_size=16", "--length=4096")
  found, _ = compile_for(tmp_path, DECODING, "--model=llama-3-70b", "--topology=v5e:4x4", *arguments)
  layer = 2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672
  cache = 80 * 2 * 2 * 8 * 4096 * 8 * 128
  expected = (80 * layer + 2 * 2 * 128256 * 8192 + cache) / 8
  assert found["fits"] == 1 and found["arguments"] == pytest.approx(expected, rel=0.01)
  assert found["all-reduce, number"] == 2 * 80 + 4


def test_the_target_decides_what_is_traced():
  """A mesh of other devices than those at hand says what a program is for; one of these says what it said before."""
  import jax

  from jaxllm import parallel
  from jaxllm.ops.device import Device, current_device

  mesh = parallel.make_mesh("data=2", jax.devices()[:2])
  with jax.set_mesh(mesh):
    assert current_device() == dataclasses.replace(Device(jax.default_backend()), partitioned=True)
  fields = dict(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
  known = inspect.signature(jax.sharding.AbstractDevice).parameters
  device = jax.sharding.AbstractDevice(**{name: fields[name] for name in known})
  with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2,), ("data",), abstract_device=device)):
    assert current_device() == Device("tpu", partitioned=True)
