"""experiments.quantize: the numbers beside direct computation, the joint table beside the sweep, resuming."""

import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import loaded_case
import numpy as np
import pytest
import quantize_case
import sweep_case
from quantize_case import QUICK, TIMED, TOKENS, call, fixed, rows

from experiments import decoding
from experiments.quantization import cells, joint, schemes
from jaxllm import hf, quant, tree
from jaxllm.evaluate import strided
from jaxllm.nn import Transformer
from jaxllm.quant import Int8
from jaxllm.study import interval

WINDOW = loaded_case.LENGTH
SCHEMES = ("int8", "int8_tensor")
WEIGHTS = 14
"""Matrices of two layers."""
OWN = (
  *("bits", "disk_bytes", "resident_bytes", "weight_error", *["error"] * WEIGHTS),
  *("perplexity", "perplexity_difference", "bpb", "bpb_difference", *TIMED),
)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
  return quantize_case.save(tmp_path_factory.mktemp("quantize"))


@pytest.fixture(scope="module")
def whole(case, tmp_path_factory):
  """The output of a whole run with its flags, and what it has printed is in the file beside it."""
  out = tmp_path_factory.mktemp("quantize") / "out"
  args = (f"--model={case[0]}", f"--text={case[1]}", f"--schemes={','.join(SCHEMES)}", *QUICK)
  args += ("--lengths=16,32", "--methods=none,yarn", "--windows=2")
  assert call(*args, f"--out={out}") == 0
  return out, args


def dequantized(params, scheme):
  """The tree with each quantized weight as float32."""
  held = quant.apply(params, scheme)
  return tree.unflatten({path: np.asarray(quant.dequantize(x)) for path, x in tree.flatten(held).items()})


def losses(cfg, params, ids):
  """Nats of tokens 1 .. n - 1 of a text, by a loop over windows and float64 log-softmax: [n - 1]."""
  model, variables = Transformer(cfg), {"params": jax.tree.map(jnp.asarray, params)}
  apply = jax.jit(lambda tokens: model.apply(variables, tokens)[0])
  found, scored, end = [], 1, WINDOW
  while scored < len(ids):
    end = min(end, len(ids) - 1)
    logits = np.asarray(apply(ids[None, end - WINDOW : end])[0], np.float64)
    log_p = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    log_p -= logits.max(-1, keepdims=True)
    nats = -log_p[np.arange(WINDOW), ids[end - WINDOW + 1 : end + 1]]
    found += nats[WINDOW - (end - scored + 1) :].tolist()
    scored, end = end + 1, end + WINDOW // 2
  return np.array(found)


@pytest.mark.core
def test_the_numbers_are_those_of_dequantized_weights(case, whole, tmp_path):
  cfg, params = hf.load(case[0])
  params = jax.tree.map(
    np.asarray, tree.unflatten({p: quant.dequantize(x) for p, x in tree.flatten(params).items()})
  )
  ids = np.frombuffer(case[1].read_bytes()[:TOKENS], np.uint8).astype(np.int32)
  found = {(row["quant"], row["weight"] or row["metric"]): row for row in rows(whole[0])[: 3 * len(OWN)]}
  weights = [path for path in tree.flatten(params) if path.endswith("/w")]
  assert set(found) == {(q, m) for q in ("none", *SCHEMES) for m in {*OWN, *weights} - {"error"}}
  others = sum(x.nbytes for path, x in tree.flatten(params).items() if path not in weights)
  base = losses(cfg, params, ids)
  for name, scheme in {"none": None, "int8": Int8(), "int8_tensor": Int8(per="tensor")}.items():
    value = lambda metric, name=name: found[name, metric]["value"]
    held = params if scheme is None else dequantized(params, scheme)
    own = base if scheme is None else losses(cfg, held, ids)
    assert value("perplexity") == pytest.approx(math.exp(own.mean()), rel=1e-5)
    assert value("bpb") == pytest.approx(own.mean() / math.log(2), rel=1e-5)
    difference = math.exp(own.mean()) - math.exp(base.mean())
    assert value("perplexity_difference") == pytest.approx(difference, abs=2e-5 * math.exp(base.mean()))
    pairs = [(tree.flatten(params)[path], tree.flatten(held)[path]) for path in weights]
    for path, (a, b) in zip(weights, pairs, strict=True):
      assert value(path) == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-5)
    error = math.sqrt(sum(((a - b) ** 2).sum() for a, b in pairs) / sum((a**2).sum() for a, _ in pairs))
    assert value("weight_error") == pytest.approx(error, rel=1e-5)
    columns = {"none": 0, "int8": sum(a.shape[1] for a, _ in pairs), "int8_tensor": len(pairs)}[name]
    size = sum(a.size for a, _ in pairs)
    numbers = 4 * size if scheme is None else size + 4 * columns
    assert value("bits") == 8 * numbers / size
    assert value("resident_bytes") == others + numbers
    hf.save(tmp_path / name, cfg, params if scheme is None else quant.apply(params, scheme))
    assert value("disk_bytes") == (tmp_path / name / "model.safetensors").stat().st_size > others + numbers
  # and the interval is the bootstrap of stretches, which hold the tokens in order
  edges = strided.block_edges(TOKENS, cells.BLOCKS)
  both = np.stack(
    [[x[a - 1 : b - 1].sum() for a, b in itertools.pairwise(edges)] for x in (own, base)], axis=1
  )
  low, high = interval.bootstrap(
    lambda s: np.exp(s[:, 0] / s[:, 2]) - np.exp(s[:, 1] / s[:, 2]),
    np.column_stack([both, np.diff(edges)]),
  )
  row = found["int8_tensor", "perplexity_difference"]
  assert (row["low"], row["high"]) == pytest.approx((low, high), abs=2e-5 * math.exp(base.mean()))
  assert found["none", "perplexity_difference"]["value"] == 0 == found["none", "weight_error"]["value"]


def test_columns_order_and_tables(whole):
  out, _ = whole
  found = rows(out)
  assert tuple(found[0]) == (
    *("scheme", "quant", "method", "factor", "train_length", "length", "metric", "value", "seed"),
    *("status", "reason", "low", "high", "weight"),
  )
  own = [(row["quant"], row["metric"]) for row in found[: 3 * len(OWN)]]
  assert own == [(q, m) for q in ("none", *SCHEMES) for m in OWN]
  joint = [(r["quant"], r["length"], r["method"], r["metric"]) for r in found[3 * len(OWN) :]]
  assert joint == [
    (q, length, method, metric)
    for q in ("none", *SCHEMES)
    for length in (16, 32)
    for method in ("none", "yarn")
    for metric in ("bpb_last", "perplexity")
  ]
  assert {row["status"] for row in found} == {"ok"} and {row["scheme"] for row in found} == {"-"}
  for row in found:
    if row["metric"] in TIMED:
      assert 0 < row["low"] <= row["value"] <= row["high"]
  text = (out / "report.md").read_text()
  lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"]
  names = ["quant", "bits", "disk MB", "resident MB", "weight error", "largest, of", "perplexity"]
  assert lines[0][:7] == names
  assert [line[0] for line in lines[2:5]] == ["none", *SCHEMES] and lines[2][5] == lines[2][7] == "-"
  worst = max((r for r in found if (r["quant"], r["metric"]) == ("int8", "error")), key=lambda r: r["value"])
  assert lines[3][5] == f"{worst['value']:.5f} {worst['weight']}"
  assert ["quant", "method", "16", "32"] in lines
  assert "above those of `none`" in text and "±" in lines[-1][-1]
  for name in ("cost.png", "bpb_vs_length.png", "difference_vs_length.png", "config.json", "results.csv"):
    assert (out / name).stat().st_size
  config = json.loads((out / "config.json").read_text())
  assert config["schemes"]["int8_tensor"] == repr(Int8(per="tensor")) and config["source"] and config["sweep"]


def test_a_figure_has_a_panel_a_method_and_a_line_a_scheme(whole):
  found = [row for row in rows(whole[0])[3 * len(OWN) :] if row["metric"] == "bpb_last"]
  panels = joint.panels(found, "bpb_last")
  assert list(panels) == ["none", "yarn"]
  for method, (lines, bands) in panels.items():
    assert list(lines) == ["none", *SCHEMES] and not bands
    for name, (lengths, values) in lines.items():
      own = [row for row in found if (row["method"], row["quant"]) == (method, name)]
      assert (lengths, values) == ([row["length"] for row in own], [row["value"] for row in own])


def test_the_joint_table_is_the_sweep_on_dequantized_weights(case, whole, tmp_path):
  cfg, params = hf.load(case[0])
  hf.save(tmp_path / "int8", cfg, dequantized(params, Int8()), hf.byte_tokenizer())
  flags = ("--lengths=16,32", "--methods=none,yarn", "--windows=2", "--metrics=bpb_last,perplexity")
  sweep = (f"--model={tmp_path / 'int8'}", f"--text={case[1]}", f"--out={tmp_path / 'out'}", *flags)
  assert sweep_case.run(*sweep) == 0
  columns = ("method", "factor", "length", "metric", "train_length")
  wanted = {tuple(row[c] for c in columns): row["value"] for row in rows(tmp_path / "out")}
  found = [row for row in rows(whole[0])[3 * len(OWN) :] if row["quant"] == "int8"]
  assert len(found) == len(wanted) == 8
  for row in found:
    assert row["value"] == pytest.approx(wanted[tuple(row[c] for c in columns)], rel=1e-5), row


@pytest.mark.parametrize("at", [pytest.param(1, marks=pytest.mark.slow), 9])
def test_a_run_that_was_stopped_goes_on_and_ends_with_the_same_rows(whole, tmp_path, monkeypatch, at):
  """In its text (of the first scheme, of which nothing else is done) or in decoding (of the second one)."""
  out, args = whole
  module, name = (strided, "score_windows") if at == 1 else (decoding, "timed")
  original, seen = getattr(module, name), []

  def stops(*call):
    if len(seen) == at:
      raise KeyboardInterrupt
    seen.append(call)
    return original(*call)

  monkeypatch.setattr(module, name, stops)
  assert call(*args, f"--out={tmp_path / 'out'}") == 75
  assert not (tmp_path / "out" / "results.jsonl").exists()
  before = (tmp_path / "out" / "cells.jsonl").read_bytes()
  assert before
  monkeypatch.setattr(module, name, original)
  assert call(*args, f"--out={tmp_path / 'out'}") == 0
  assert fixed(tmp_path / "out") == fixed(out)
  assert (tmp_path / "out" / "cells.jsonl").read_bytes().startswith(before)
  results = (tmp_path / "out" / "results.jsonl").read_bytes()
  monkeypatch.setattr(module, name, lambda *_: pytest.fail("computed again"))
  assert call(*args, f"--out={tmp_path / 'out'}") == 0
  assert (tmp_path / "out" / "results.jsonl").read_bytes() == results


@pytest.mark.slow
@pytest.mark.parametrize("lines", [1, 4, 9, 13, 20])
def test_a_run_that_was_killed_goes_on_and_ends_with_the_same_rows(whole, tmp_path, lines):
  """A process of its own, killed once it has recorded so many groups of its 24; no group is computed again."""
  out, args = whole
  env = {name: item for name, item in os.environ.items() if name != "XLA_FLAGS"}
  command = [sys.executable, "-m", "experiments.quantize", *args, f"--out={tmp_path / 'out'}"]
  ledger, quiet = tmp_path / "out" / "cells.jsonl", dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  process = subprocess.Popen(command, cwd=Path(__file__).parents[2], env=env, **quiet)
  while process.poll() is None and (not ledger.exists() or ledger.read_bytes().count(b"\n") < lines):
    time.sleep(0.01)
  process.kill()
  assert process.wait() == -signal.SIGKILL
  assert not (tmp_path / "out" / "results.jsonl").exists()
  data = ledger.read_bytes()
  before = data[: data.rfind(b"\n") + 1]
  assert subprocess.run(command, cwd=Path(__file__).parents[2], env=env, check=False, **quiet).returncode == 0
  assert ledger.read_bytes().startswith(before)
  groups = [json.loads(line)["group"] for line in ledger.read_text().splitlines()]
  assert len(groups) == len(set(groups))
  for one, other in zip(fixed(tmp_path / "out"), fixed(out), strict=True):
    for name in ("value", "low", "high"):  # the tests' own process has eight devices, and other sums
      value = other[name]
      assert one.pop(name) == (None if value is None else pytest.approx(value, rel=1e-4, abs=5e-3))
    assert one == {name: other[name] for name in one}


@pytest.mark.slow
def test_on_a_mesh_the_numbers_are_the_same(case, whole, tmp_path):
  args = (
    f"--model={case[0]}",
    f"--text={case[1]}",
    f"--schemes={SCHEMES[0]}",
    *QUICK,
    "--mesh=fsdp=2,tensor=4",
  )
  args += ("--lengths=16,32", "--methods=none,yarn", "--windows=2")
  assert call(*args, f"--out={tmp_path / 'out'}") == 0
  wanted, found = ([r for r in fixed(d) if r["quant"] != "int8_tensor"] for d in (whole[0], tmp_path / "out"))
  for r, other in zip(found, wanted, strict=True):
    value = other["value"]
    assert all(r[name] == other[name] for name in ("quant", "method", "length", "metric", "weight"))
    if r["metric"] == "resident_bytes":  # norms, and scales along out, are on several devices
      assert value < r["value"] < 1.2 * value
    else:
      assert r["value"] == pytest.approx(value, rel=2e-4, abs=2e-3), r
  assert "--mesh=fsdp=2,tensor=4" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.slow
def test_a_scheme_that_hf_save_refuses_has_no_size_on_disk(case, tmp_path):
  args = (f"--model={case[0]}", f"--text={case[1]}", "--schemes=llm_int8:threshold=1e999", *QUICK)
  assert call(*args, f"--out={tmp_path / 'out'}") == 0
  row = next(
    r
    for r in rows(tmp_path / "out")
    if (r["quant"], r["metric"]) != ("none", "disk_bytes") and r["metric"] == "disk_bytes"
  )
  assert (
    row["status"] == "not applicable"
    and "hf.save: params: layers/0/attn/k/w: found threshold = inf" in row["reason"]
  )
  assert "hf.save: params" in (tmp_path / "out" / "report.md").read_text()


def test_a_cell_that_fails_is_said_and_tried_again(case, tmp_path, monkeypatch, capfd):
  base = (f"--model={case[0]}", f"--text={case[1]}", "--schemes=int8", *QUICK, f"--out={tmp_path / 'out'}")
  apply = quant.apply
  structs = lambda params: isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct)
  monkeypatch.setattr(
    quant, "apply", lambda params, *more: apply(params, *more) if structs(params) else 1 / 0
  )
  assert call(*base) == 1
  shown = capfd.readouterr().out
  assert "failed: int8: ZeroDivisionError" in shown and "rows of the table failed" in shown
  assert {row["status"] for row in rows(tmp_path / "out") if row["quant"] == "none"} == {"ok"}
  monkeypatch.setattr(quant, "apply", apply)
  assert call(*base) == 0
  assert {row["status"] for row in rows(tmp_path / "out")} == {"ok"}


def test_the_head_is_quantized_where_it_is_asked_for(case, tmp_path):
  base = (f"--model={case[0]}", f"--text={case[1]}", "--schemes=int8", *QUICK, f"--out={tmp_path / 'out'}")
  assert call(*base, "--quantize_head") == 0
  found = {(row["quant"], row["metric"]): row["value"] for row in rows(tmp_path / "out")}
  cfg = loaded_case.config()
  layer = 4 * 32 * 32 + 3 * 32 * 32
  size, columns = 2 * layer + 32 * 256, 2 * (4 * 32 + 3 * 32) + 256
  assert found["int8", "bits"] == 8 + 32 * columns / size
  assert found["none", "resident_bytes"] - found["int8", "resident_bytes"] == 3 * size - 4 * columns
  assert json.loads((tmp_path / "out" / "config.json").read_text())["weights"].count("head") == 1
  flags = type("Flags", (), {"quantize_head": True, "weights": ["embed=no"]})
  tied = dataclasses.replace(cfg, tie_embeddings=True)
  assert schemes.rules(flags, tied) == [("embed", False), ("embed", True)]


@pytest.mark.slow
def test_a_model_of_a_sweep_is_read_from_its_run(finished, tmp_path):
  run, _ = finished
  before = sorted(path.name for path in run.rglob("*"))
  args = (f"--run={run}", "--schemes=int8_tensor", *QUICK, f"--out={tmp_path / 'out'}")
  assert call(*args, "--lengths=32", "--methods=pi", "--windows=2") == 0
  found = rows(tmp_path / "out")
  assert {row["scheme"] for row in found} == {"rope"} and {row["train_length"] for row in found} == {16}
  assert {(row["method"], row["length"]) for row in found} == {("none", 16), ("pi", 32)}
  assert sorted(path.name for path in run.rglob("*")) == before
  # the sweep's own number of the same model, method and length
  own = next(
    r
    for r in rows(run)
    if (r["scheme"], r["method"], r["length"], r["metric"]) == ("rope", "pi", 32, "bpb_last")
  )
  here = next(r for r in found if (r["quant"], r["method"], r["metric"]) == ("none", "pi", "bpb_last"))
  assert here["value"] == pytest.approx(own["value"], rel=1e-6)


@pytest.mark.parametrize("name", [pytest.param("llm_int8", marks=pytest.mark.slow), "int4"])
def test_rules_say_what_each_weight_is_held_in_and_rows_decode_together(case, tmp_path, name):
  """And the report says of llm_int8, wherever it is, that it is not causal."""
  given = (
    "--weights=embed|head=int8",
    "--weights=layers/0/.+=no",
    f"--weights=layers/1/mlp/up/w={name}:{dict(int4='group=16').get(name, 'outliers=2')}",
  )
  base = (f"--model={case[0]}", f"--text={case[1]}", "--schemes=int8_tensor", *QUICK, "--batch=3")
  assert call(*base, *given, f"--out={tmp_path / 'out'}") == 0
  found = {(row["quant"], row["metric"]): row["value"] for row in rows(tmp_path / "out")}
  each = [
    row["weight"] for row in rows(tmp_path / "out") if (row["quant"], row["metric"]) == ("none", "error")
  ]
  assert set(each) == {"embed", "head", *(p for p in each if p.startswith("layers/1/"))} and len(each) == 9
  tables, layer, up = 2 * 256 * 32, 6 * 32 * 32, 32 * 32
  bits = {"int4": up / 2 + 2 * up / 16, "llm_int8": up + 4 * 32}[name]
  assert found["int8_tensor", "bits"] == 8 * (tables + 4 * 512 + layer + 4 * 6 + bits) / (tables + layer + up)
  report = (tmp_path / "out" / "report.md").read_text()
  assert "batch 3" in report and " ".join(given) in report
  assert ("not causal within a call" in report) == (name == "llm_int8")


@pytest.mark.slow
def test_smoke_trains_a_model_and_goes_through_everything(corpus, tmp_path):
  assert call("--smoke", f"--out={tmp_path / 'out'}") == 0
  found = rows(tmp_path / "out")
  assert {row["quant"].split(":")[0] for row in found} == {
    "none",
    *quant.SCHEMES,
  }  # groups as the width has them
  assert {row["method"] for row in found} == {"none", "yarn"}
  assert {row["status"] for row in found} == {"ok"}
  assert call("--smoke", f"--out={tmp_path / 'out'}") == 0
