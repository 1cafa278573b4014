"""experiments.decoding: both sides are timed on the same prompts, ratios are theirs, and missed bars are told."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import loaded_case
import pytest
from absl.testing import flagsaver

from experiments import decoding, loading
from jaxllm import hf, quant, tree
from jaxllm.errors import ConfigError

FOUND = {
  "jaxllm decode tok/s": 30.0,
  "transformers decode tok/s": 20.0,
  "decode ratio": 1.5,
  "share of memory bandwidth": 0.625,
  "jaxllm prefill tok/s": 80.0,
  "transformers prefill tok/s": 100.0,
  "prefill ratio": 0.8,
  "first token s": 4.0,
}


def test_numbers_at_their_bars_pass_and_lower_ones_are_told():
  assert decoding.missed("float32", 1, FOUND, "none", "cpu") == []
  assert decoding.missed("float32", 1, FOUND | {"decode ratio": 1.49}, "none", "cpu") == [
    "decode ratio 1.49, expected at least 1.5"
  ]
  assert decoding.missed(
    "bfloat16", 1, FOUND | {"decode ratio": 1.2, "prefill ratio": 0.79}, "none", "cpu"
  ) == ["prefill ratio 0.79, expected at least 0.8"]
  assert decoding.missed("bfloat16", 1, FOUND | {"first token s": 4.1}, "none", "cpu") == [
    "first token after 4.1 s, expected at most 4.0"
  ]
  assert (
    decoding.line("float32", 8, FOUND)
    == "| float32 | 8 | 30.0 | 20.0 | 1.50 | 62% | 80.0 | 100.0 | 0.80 | 4.00 |"
  )


def test_each_scheme_has_bars_of_its_own_where_they_hold():
  missed = lambda quant, platform, batch, **found: decoding.missed(
    "bfloat16", batch, FOUND | {name.replace("_", " "): x for name, x in found.items()}, quant, platform
  )
  assert missed("int8", "cpu", 1, decode_ratio=3.0) == []
  found = FOUND | {"decode ratio": 2.99, "llama_cpp decode ratio": 0.79}
  assert decoding.missed("bfloat16", 1, found, "int8", "cpu") == [
    "decode ratio 2.99, expected at least 3.0",
    "llama_cpp decode ratio 0.79, expected at least 0.8",
  ]
  assert missed("w8a8", "cpu", 8, decode_ratio=1.9) == [
    "decode ratio 1.90, expected at least 2.0",
    "prefill ratio 0.80, expected at least 1.0",
  ]
  assert missed("int8", "gpu", 1, own_decode_ratio=1.5) == ["own decode ratio 1.50, expected at least 1.6"]
  assert (
    missed("int8", "gpu", 1, own_decode_ratio=1.6)
    == missed("int8", "cpu", 8)
    == missed("nf4", "cpu", 1)
    == []
  )


def test_quantized_weights_are_read_beside_those_that_are_not_on_a_gpu(monkeypatch):
  class f:
    rounds, reads, prompt, new, cache_implementation = 1, 1, 16, 5, "dynamic"
    quant, quantize_head = "int8", False

  seen = []

  def read(name, *arguments):
    seen.append((name, *arguments[6:]))
    return {"first": 1.0, "reads": [[1.0, 2.0 if "int8" in arguments else 3.0]], "floor": 0.1}

  monkeypatch.setattr(decoding, "in_own_process", read)
  found = decoding.measure("", "bfloat16", 1, "gpu", None, f)
  assert [side for side in seen if side[0] == "jaxllm_side"] == [
    ("jaxllm_side", "int8", False),
    ("jaxllm_side", "none", False),
  ]
  assert found["own decode ratio"] == 1.5
  assert decoding.line("bfloat16", 1, found, decoding.OWN).endswith("| 1.33 | 1.50 |")


def test_bars_are_of_the_default_rules():
  found = FOUND | {"decode ratio": 0.1, "prefill ratio": 0.1, "own decode ratio": 0.1}
  for name, platform, batch in decoding.QUANT_BARS:
    assert decoding.missed("bfloat16", batch, found, name, platform)
    for function in (decoding.missed, decoding.unmeasured):
      assert function("bfloat16", batch, found, f"{name}, head", platform) == []


NOT_MEASURED = (
  "NOT MEASURED: bfloat16, batch 1: llama_cpp decode ratio, expected at least 0.8; give --llama_cpp\n"
)


@pytest.mark.parametrize(
  ("flags", "numbers", "size", "said", "code"),
  [
    ([], {"decode ratio": 3.0}, 10**8, NOT_MEASURED, 0),
    ([], {"decode ratio": 1.0}, 10**8, NOT_MEASURED, 1),
    ([], {"decode ratio": 1.0}, 10**8 - 1, "", 0),
    ([], {"decode ratio": 3.0, "llama_cpp decode ratio": 0.8}, 10**8, "", 0),
    (["--quantize_head"], {"decode ratio": 1.0}, 10**8, "", 0),
  ],
)
def test_a_bar_that_is_not_measured_is_told_and_a_quantized_head_has_none(
  monkeypatch, capsys, tmp_path, flags, numbers, size, said, code
):
  monkeypatch.setattr(decoding, "in_own_process", lambda _: {"kind": "a CPU", "platform": "cpu"})
  monkeypatch.setattr(decoding, "measure", lambda *_: FOUND | numbers)
  monkeypatch.setattr(loading, "parameters", lambda _: size)
  saved = flagsaver.save_flag_values(decoding.FLAGS)
  try:
    given = [f"--model={tmp_path}", "--quant=int8", "--dtypes=bfloat16", "--batches=1", *flags]
    decoding.FLAGS(["decoding", *given])
    assert decoding.main(decoding.FLAGS) == code
  finally:
    flagsaver.restore_flag_values(saved, decoding.FLAGS)
  out, err = capsys.readouterr()
  assert (out[out.index("NOT") :] if "NOT" in out else "") == said
  assert err == ("MISSED: bfloat16, batch 1: decode ratio 1.00, expected at least 3.0\n" if code else "")


LAYERS = 2 * (4 * 32 * 32 + 3 * 32 * 32)
COLUMNS = 2 * (4 * 32 + 3 * 32)
TABLE, NORMS = 256 * 32, (2 * 2 + 1) * 32
"""Numbers of loaded_case's model: its matrices and the columns of these, an embedding or a head, and its norms."""


@pytest.mark.parametrize(
  ("tied", "scheme", "head", "platform", "dtype", "step"),
  [
    (False, "none", False, "cpu", "bfloat16", 2 * (LAYERS + TABLE + NORMS)),
    (True, "none", False, "cpu", "bfloat16", 2 * (LAYERS + TABLE + NORMS)),
    (False, "int8", False, "cpu", "float32", LAYERS + 4 * (COLUMNS + TABLE + NORMS)),
    (False, "int8", True, "cpu", "float32", LAYERS + TABLE + 4 * (COLUMNS + 256 + NORMS)),
    (True, "int8", True, "cpu", "float32", LAYERS + TABLE + 4 * (COLUMNS + 256 + NORMS)),
    (False, "int8", False, "gpu", "bfloat16", LAYERS + 4 * COLUMNS + 2 * (TABLE + NORMS)),
  ],
)
def test_what_is_timed_is_quantized_and_a_step_reads_that(
  monkeypatch, tmp_path, tied, scheme, head, platform, dtype, step
):
  cfg = dataclasses.replace(loaded_case.config(), tie_embeddings=tied)
  loaded_case.save(tmp_path, cfg, seed=1)
  seen = []
  monkeypatch.setattr(decoding, "timed", lambda *call: seen.append(call) or (len(seen), 10.0))
  monkeypatch.setattr(decoding, "bandwidth", lambda: 4.0)
  monkeypatch.setattr(jax, "default_backend", lambda: platform)
  found = decoding.jaxllm_side(str(tmp_path), "bfloat16", 2, 3, 4, 2, scheme, head, 0.0)
  assert found["reads"] == [(2, 10.0), (3, 10.0)] and found["floor"] == step / 4
  for model, params, texts, new in seen:
    held = {path for path, x in tree.flatten(params).items() if isinstance(x, quant.QTensor)}
    layers = {path for path in tree.flatten(params) if path.endswith("/w")} if scheme != "none" else set()
    assert held == layers | ({"embed" if tied else "head"} if head else set())
    assert len(layers) == 14 * (scheme != "none")
    assert model.cfg.dtype == dtype and (len(texts), len(texts[0]), new) == (2, 3, 4)
  assert hf.load(tmp_path)[0].tie_embeddings == tied


def test_medians_of_all_reads_and_the_first_token_of_a_later_process(monkeypatch):
  class f:
    rounds, reads, prompt, new, cache_implementation = 2, 2, 16, 5, "dynamic"
    quant, quantize_head = "none", False

  reads = iter(
    [
      {"first": 9.0, "reads": [[1.0, 2.0], [1.0, 2.0]], "floor": 0.125},
      {"first": 7.0, "reads": [[2.0, 4.0], [2.0, 4.0]]},
      {"first": 3.0, "reads": [[1.0, 2.0], [9.0, 8.0]], "floor": 0.125},
      {"first": 6.0, "reads": [[2.0, 4.0], [9.0, 8.0]]},
    ]
  )
  monkeypatch.setattr(decoding, "in_own_process", lambda *_: next(reads))
  found = decoding.measure("", "float32", 3, "cpu", None, f)
  assert found["jaxllm decode tok/s"] == 3 * 4 / 2.0 and found["transformers decode tok/s"] == 3 * 4 / 4.0
  assert found["jaxllm prefill tok/s"] == 3 * 16 / 1.0 and found["prefill ratio"] == 2.0
  assert found["first token s"] == 3.0
  assert found["share of memory bandwidth"] == 0.125 / (2.0 / 4)


def test_a_third_side_has_columns_of_its_own_where_it_was_read():
  numbers = {"llama_cpp decode tok/s": 40.0, "llama_cpp decode ratio": 0.75}
  numbers |= {"llama_cpp prefill tok/s": 160.0, "llama_cpp prefill ratio": 0.5}
  assert decoding.line("float32", 1, FOUND | numbers, decoding.THIRD).endswith(
    "| 4.00 | 40.00 | 0.75 | 160.00 | 0.50 |"
  )
  assert decoding.line("float32", 8, FOUND, decoding.THIRD).endswith("| 4.00 | - | - | - | - |")


@pytest.mark.parametrize(
  ("flag", "reason"),
  [
    ("--model=no-such-directory", "no such directory"),
    ("--dtypes=float16", "'float16' is not known"),
    ("--batches=1,x", "expected numbers of rows"),
    ("--batches=0", "expected numbers of rows"),
    ("--new=1", "expected at least 2"),
    ("--quant=int5", "--quant=int5: not known; did you mean int8 or int4 or int3.*allowed: none, int8, "),
    ("--quantize_head", "--quantize_head without --quant"),
    ("--rounds=0", "--rounds=0"),
  ],
)
def test_flags_that_cannot_be_measured_are_refused(flag, reason):
  saved = flagsaver.save_flag_values(decoding.FLAGS)
  try:
    decoding.FLAGS(["decoding", flag])
    with pytest.raises(ConfigError, match=reason):
      decoding.check(decoding.FLAGS)
  finally:
    flagsaver.restore_flag_values(saved, decoding.FLAGS)


@pytest.mark.slow
def test_a_smoke_run_writes_all_numbers(tmp_path):
  call = [sys.executable, "-m", "experiments.decoding", "--smoke", f"--out={tmp_path}"]
  run = subprocess.run(call, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
  assert run.returncode == 0, run.stderr
  rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
  assert {row["metric"] for row in rows} == FOUND.keys() and all(row["value"] > 0 for row in rows)
