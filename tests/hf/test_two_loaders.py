"""A checkpoint on a mesh of two processes: each reads the parts of its own devices, and one of them writes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from family_cases import build, settings
from safetensors.numpy import load_file, save_file

from jaxllm import hf, quant

HERE = Path(__file__).parent
PLAIN = settings("llama") | dict(
  vocab_size=198, num_attention_heads=4, intermediate_size=128, num_key_value_heads=4
)
"""4 do not divide the vocabulary, which is padded on the mesh."""


def run(*arguments):
  """What two processes of two_loaders.py say."""
  with socket.create_server(("localhost", 0)) as server:
    port = server.getsockname()[1]
  flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")
  env = os.environ | dict(XLA_FLAGS=flags, JAX_PLATFORMS="cpu", PYTHONPATH=str(HERE.parents[1]))
  command = [sys.executable, str(HERE / "two_loaders.py"), str(port)]
  pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  both = [subprocess.Popen([*command, str(i), *map(str, arguments)], env=env, **pipes) for i in range(2)]
  try:
    said = [process.communicate(timeout=150)[0] for process in both]
  finally:
    for process in both:
      process.kill()
  assert [process.returncode for process in both] == [0, 0], "\n".join(said)
  return said


def stored(directory):
  """{tensor: array} of all files of a checkpoint."""
  files = [load_file(path) for path in sorted(directory.glob("*.safetensors"))]
  assert sum(map(len, files)) == len(set().union(*files))
  return {name: x for one in files for name, x in one.items()}


def same(found, expected):
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    assert found[name].dtype == x.dtype
    np.testing.assert_array_equal(found[name], x, err_msg=name)


@pytest.fixture
def floats(tmp_path):
  """A directory of a model, and its tensors."""
  tensors = build(PLAIN).tensors
  (tmp_path / "a").mkdir()
  (tmp_path / "a" / "config.json").write_text(json.dumps(PLAIN))
  save_file(tensors, tmp_path / "a" / "model.safetensors")
  return tmp_path / "a", tensors


@pytest.mark.slow
def test_two_processes_load_and_save(tmp_path, floats):
  source, tensors = floats
  # half of what is split over fsdp, whose two parts are of one process each
  split = sum(x.nbytes for x in tensors.values() if x.ndim == 2)
  vectors = sum(x.nbytes for x in tensors.values() if x.ndim == 1)
  for text in run(source, tmp_path / "b"):
    assert int(text.split("read ")[1].split()[0]) == split // 2 + vectors
  assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
  same(stored(tmp_path / "b"), tensors)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "glm_int4"])
def test_two_processes_quantize_and_save_what_one_does(tmp_path, floats, name):
  """Weights that are read as floats and quantized on the mesh, and those that were quantized when they were saved."""
  cfg, params = hf.load(floats[0])
  hf.save(tmp_path / "b", cfg, quant.apply(params, quant.SCHEMES[name](), [("head", True)]))
  expected = stored(tmp_path / "b")
  assert expected["lm_head.weight"].dtype == np.int8 and "lm_head.weight_scale" in expected
  run(floats[0], tmp_path / "c", name)
  run(tmp_path / "c", tmp_path / "d")
  for directory in ("c", "d"):
    same(stored(tmp_path / directory), expected)
    config = lambda path: json.loads((path / "config.json").read_text())["quantization_config"]
    assert config(tmp_path / directory) == config(tmp_path / "b")
