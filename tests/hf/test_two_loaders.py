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

HERE = Path(__file__).parent


@pytest.mark.slow
def test_two_processes_load_and_save(tmp_path):
  plain = settings("llama") | dict(
    vocab_size=200, num_attention_heads=4, intermediate_size=128, num_key_value_heads=4
  )
  model = build(plain)
  (tmp_path / "a").mkdir()
  (tmp_path / "a" / "config.json").write_text(json.dumps(plain))
  save_file(model.tensors, tmp_path / "a" / "model.safetensors")
  with socket.create_server(("localhost", 0)) as server:
    port = server.getsockname()[1]
  flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")
  env = os.environ | dict(XLA_FLAGS=flags, JAX_PLATFORMS="cpu", PYTHONPATH=str(HERE.parents[1]))
  command = [sys.executable, str(HERE / "two_loaders.py"), str(port)]
  paths = [str(tmp_path / "a"), str(tmp_path / "b")]
  both = [
    subprocess.Popen(
      [*command, str(i), *paths], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for i in range(2)
  ]
  try:
    said = [process.communicate(timeout=150)[0] for process in both]
  finally:
    for process in both:
      process.kill()
  assert [process.returncode for process in both] == [0, 0], "\n".join(said)
  # half of what is split over fsdp, whose two parts are of one process each
  split = sum(x.nbytes for x in model.tensors.values() if x.ndim == 2)
  vectors = sum(x.nbytes for x in model.tensors.values() if x.ndim == 1)
  for text in said:
    assert int(text.split("read ")[1].split()[0]) == split // 2 + vectors
  saved = [load_file(path) for path in sorted((tmp_path / "b").glob("*.safetensors"))]
  assert len(saved) > 1 and sum(map(len, saved)) == len(model.tensors)
  for name, x in {name: x for part in saved for name, x in part.items()}.items():
    np.testing.assert_array_equal(x, model.tensors[name])
