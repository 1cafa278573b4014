"""Bad calls as a user makes them: an exit code, at once, and a message that names flag, value and what is allowed."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sweep_case

ROOT = Path(__file__).parents[2]
SCRIPT = "experiments.length_extrapolation"


def call(*args, module=SCRIPT):
  """(exit code, stderr, seconds) of a script in its own process."""
  began = time.monotonic()
  done = subprocess.run(
    [sys.executable, "-m", module, *args], cwd=ROOT, capture_output=True, text=True, timeout=120
  )
  return done.returncode, done.stderr, time.monotonic() - began


BAD_CALLS = [
  pytest.param("--methods=yarn,ntkk", ["--methods", "'ntkk'", "ntk_mixed", "rerope"], marks=pytest.mark.core),
  ("--schemes=rope,hwfa --num_layers=1", ["--schemes=rope,hwfa", "--num_layers=1", "at least 2 layers"]),
  ("--schemes=rope,rotary", ["--schemes", "'rotary'", "rope_logn", "alibi"]),
  ("--metrics=bpp", ["--metrics", "'bpp'", "bpb_last", "accuracy_repeated"]),
  ("--step=5", ["--step", "did you mean --steps"]),
  ("--steps=-5", ["--steps=-5", "at least 1"]),
  ("--steps=many", ["--steps=many", "'many'", "integer"]),
  ("--learning_rate=fast", ["--learning_rate=fast", "'fast'", "number"]),
  ("--learning_rate=nan", ["--learning_rate=nan", "above 0"]),
  ("--lengths=64,128", ["--lengths=64,128", "64", "--train_length=128"]),
  ("--methods=yarn --lengths=128", ["--methods=yarn", "changes nothing", "128", "--lengths", "--factors"]),
  ("--methods=pi --schemes=alibi", ["--methods=pi", "--schemes=alibi", "alibi has no layer of plain RoPE"]),
  ("--lengths=256,x", ["--lengths=256,x", "'x'", "whole number"]),
  ("--lengths=256,,512", ["--lengths=256,,512", "empty item"]),
  ("--corpus=/no/such/text", ["--corpus=/no/such/text", "no such file"]),
  ("--corpus=", ["--corpus=", "no such file"]),
  ("--methods=yarn,none,yarn", ["--methods=yarn,none,yarn", "'yarn'", "twice"]),
  ("--factors=0", ["--factors=0", "'0'", "at least 1"]),
  ("--factors=2,2.0", ["--factors=2,2.0", "'2.0'", "twice"]),
  ("--seeds=0", ["--seeds=0", "at least 1"]),
  ("--num_heads=3", ["--num_heads=3", "--embed_dim is 128", "even whole number"]),
  ("--dtype=float16", ["--dtype=float16", "auto", "float32", "bfloat16"]),
  ("--smoke=perhaps", ["--smoke=perhaps", "true or false"]),
  ("train", ["'train'", "--name=value"]),
]


@pytest.mark.parametrize(("flag", "named"), BAD_CALLS)
def test_a_bad_call_is_refused_at_once(tmp_path, flag, named):
  code, error, seconds = call(*flag.split(), f"--out={tmp_path / 'out'}")
  print(f"{flag}: {seconds:.2f} s")
  assert code == 2, error
  assert error.count("\n") == 1 and error.startswith("error: ")
  for words in named:
    assert words in error, error
  assert seconds < 10  # 2 s where nothing else runs
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
  "module",
  [
    SCRIPT,
    *(f"experiments.{name}" for name in ("generate", "benchmark", "evaluate", "export")),
    "jaxllm.doctor",
  ],
)
def test_help_needs_no_jax(module):
  code = (
    "import runpy, sys\n"
    f"sys.argv = ['{module}', '--help']\n"
    "try:\n"
    f"  runpy.run_module('{module}', run_name='__main__')\n"
    "except SystemExit as e:\n"
    "  heavy = {'jax', 'flax', 'orbax', 'matplotlib', 'torch', 'numpy'} & set(sys.modules)\n"
    "  print('heavy:', sorted(heavy), file=sys.stderr)\n"
    "  sys.exit(e.code)\n"
  )
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
  assert done.returncode == 0
  assert done.stderr == "heavy: []\n"
  assert any(flag in done.stdout for flag in ("--lengths", "--prompt", "--model", "--scheme"))


TEXTS = [
  pytest.param({}, ["0 bytes"], id="an empty directory"),
  pytest.param({"a.txt": b""}, ["0 bytes"], id="an empty file"),
  pytest.param({"a.txt": b"too short"}, ["9 bytes", "train part of 8", "at least 17"], id="too short"),
  pytest.param(
    {"a.txt": b"x" * 50, "b.bin": b"\x89PNG\r\n"}, ["b.bin", "byte 0 of 6", "0x89"], id="not text"
  ),
  pytest.param({"a.txt": b"x" * 500 + b"\0"}, ["a.txt", "byte 500 of 501", "0x00"], id="NUL"),
]


@pytest.mark.parametrize(("files", "named"), TEXTS)
def test_a_corpus_that_cannot_be_used_is_bad_data(tmp_path, capfd, files, named):
  folder = tmp_path / "text"
  folder.mkdir()
  for name, content in files.items():
    (folder / name).write_bytes(content)
  code = sweep_case.run(f"--out={tmp_path / 'out'}", *sweep_case.TINY, f"--corpus={folder}")
  error = capfd.readouterr().err
  assert code == 65, error
  for words in (str(folder), *named):
    assert words in error, error
  assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_made_is_an_io_error(tmp_path, capfd, corpus):
  (tmp_path / "file").write_text("in the way")
  code = sweep_case.run(f"--out={tmp_path / 'file'}", *sweep_case.TINY, f"--corpus={corpus}")
  assert code == 74
  assert os.fspath(tmp_path / "file") in capfd.readouterr().err
