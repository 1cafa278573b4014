"""experiments.training_speed: its steps are the same work, its shares and bars are what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import step_profile, training_speed

ROOT = Path(__file__).parents[2]


def test_a_smoke_run_writes_the_numbers_of_both_sides(tmp_path):
  pytest.importorskip("transformers")
  pytest.importorskip("torch")
  env = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # one device, compiled quickly
  done = subprocess.run(
    [sys.executable, "-m", "experiments.training_speed", "--smoke", f"--out={tmp_path}"],
    **dict(cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False),
  )
  assert done.returncode == 0, done.stderr
  rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
  found = {row["metric"]: row["value"] for row in rows}
  assert found["jaxllm tokens/s"] > 0 and found["torch tokens/s"] > 0
  assert found["torch loss difference"] <= training_speed.SAME["float32"]
  config = json.loads((tmp_path / "config.json").read_text())
  assert config["flags"]["size"] == "tiny" and config["source"]
  header, _, line = (row for row in done.stdout.splitlines() if row.startswith("|"))
  assert header.count("|") == line.count("|")


def test_ratios_are_of_the_rounds_and_have_an_interval():
  ratio, low, high = training_speed.compared([1.0, 2.0, 4.0], [2.0, 4.0, 8.0])
  assert ratio == pytest.approx(2) and low == pytest.approx(2) and high == pytest.approx(2)
  ratio, low, high = training_speed.compared([1.0, 1.0], [1.0, 4.0])
  assert ratio == pytest.approx(2) and low < 2 < high


@pytest.mark.core
def test_bars_are_of_each_of_torchs_columns():
  found = {"torch ratio": 0.99, "torch.compile ratio": 1.0}
  assert training_speed.missed("float32", found) == ["torch ratio 0.99, expected at least 1.0"]
  assert training_speed.missed("bfloat16", found) == []
  assert training_speed.missed("bfloat16", {"torch.compile ratio": 0.69}) != []
  cells = training_speed.line("float32", {"jaxllm tokens/s": 1.0}).split("|")
  assert cells[1:3] == [" float32 ", " 1 "] and set(cells[3:-1]) == {" - "}


@pytest.mark.core
def test_utilisation_is_of_the_chip_and_of_what_remat_does_again(monkeypatch):
  from types import SimpleNamespace

  import jax

  from jaxllm import flops

  f = SimpleNamespace(size="20m", attention="plain", batch=4, length=512, remat="full")
  assert training_speed.utilised("bfloat16", f, 1.0) == {}  # of a CPU
  monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind="NVIDIA H200")])
  cfg = training_speed.model_config("20m", "plain")
  layers = cfg.num_layers * (
    4 * 384 * 384 + 3 * 384 * 1024 + 2 * 512 * 384
  )  # all pairs: scores, and their values
  once = 2 * 4 * 512 * (layers + 384 * 8192) / flops.DEVICES["h200"].flops
  again = 2 * 4 * 512 * layers / flops.DEVICES["h200"].flops
  found = training_speed.utilised("bfloat16", f, 1.0)
  assert found == {"MFU": pytest.approx(3 * once), "HFU": pytest.approx(3 * once + again)}
  assert training_speed.utilised("float32", f, 1.0) == {}


TEXT = """
%inner (a: f32[2,2], b: f32[2,2]) -> f32[2,2] {
  ROOT %dot.3 = f32[2,2]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%other (a: f32[2,2]) -> f32[2,2] {
  ROOT %exp = f32[2,2]{1,0} exponential(%a)
}

ENTRY %main.1 (a: f32[2,2]) -> f32[2,2] {
  %fused.1 = f32[2,2]{1,0} fusion(%a, %a), kind=kCustom, calls=%inner
  %fused.2 = f32[2,2]{1,0} fusion(%a), kind=kLoop, calls=%other
  ROOT %dot.4 = f32[2,2]{1,0} dot(%fused.1, %fused.2), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


def test_products_are_dots_and_what_calls_them():
  event = lambda op, dur: {"ph": "X", "args": {"hlo_op": op}, "dur": dur}
  events = [event("fused.1", 3), event("fused.2", 5), event("dot.4", 2), event("while.1", 100), {"ph": "M"}]
  assert step_profile.product_share(TEXT, events) == pytest.approx(0.5)


def test_a_scanned_step_is_one_program_at_any_depth():
  """What is compiled does not grow with the layers: the instructions before XLA are the same, to the last one."""
  import jax

  from jaxllm.nn import Transformer
  from jaxllm.train.step import init_state, make_step

  def operations(layers, scan=True):
    cfg, config = (
      training_speed.model_config("tiny", "auto", layers),
      training_speed.train_config("float32", 2, 8),
    )
    model = Transformer(cfg, scan=scan)
    state = jax.eval_shape(lambda: init_state(model, config, 0))
    text = make_step(model, config).lower(state, training_speed.batch_of(cfg.vocab_size, 2, 8)).as_text()
    return sum(" = " in line for line in text.splitlines())

  assert operations(8) == operations(32)
  assert operations(4, scan=False) > 1.5 * operations(2, scan=False)


@pytest.mark.parametrize(
  ("flag", "words"), [("--rounds=1", "at least 2"), ("--dtypes=int8", "'int8'"), ("--batch=0", "--batch=0")]
)
def test_bad_calls_of_training_speed(flag, words):
  done = subprocess.run(
    [sys.executable, "-m", "experiments.training_speed", flag],
    **dict(cwd=ROOT, capture_output=True, text=True, timeout=240, check=False),
  )
  assert done.returncode == 2 and words in done.stderr
