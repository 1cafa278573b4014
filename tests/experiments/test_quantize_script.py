"""experiments.quantize: the numbers beside direct computation, the joint table beside the sweep, resuming, what is refused."""

import dataclasses
import itertools
import json
import math
import re

import jax
import jax.numpy as jnp
import loaded_case
import numpy as np
import pytest
import sweep_case

from experiments import decoding, quantize
from experiments.quantization import cells, joint, schemes
from jaxllm import hf, quant, tree
from jaxllm.activation import Mlp
from jaxllm.config import Layer
from jaxllm.errors import ConfigError, QuantError
from jaxllm.evaluate import strided
from jaxllm.nn import Transformer
from jaxllm.norm import LayerNorm
from jaxllm.position import Learned
from jaxllm.quant import Int8
from jaxllm.study import interval

WINDOW, TOKENS = loaded_case.LENGTH, 401
SCHEMES = ("int8", "int8_tensor")
WEIGHTS = 14
"""Matrices of two layers."""
OWN = (
  *(
    "bits",
    "disk_bytes",
    "resident_bytes",
    "weight_error",
    *["error"] * WEIGHTS,
    "perplexity",
    "perplexity_difference",
  ),
  *("bpb", "bpb_difference", "tokens_per_second", "times_none"),
)
TIMED = ("tokens_per_second", "times_none")
QUICK = (f"--tokens={TOKENS}", "--prompt=4", "--new=5", "--rounds=2", "--seconds=0")


def call(*args):
  return sweep_case.run(*args, script=quantize, check=quantize.check)


def rows(out):
  return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def fixed(out):
  """The rows that no clock has touched."""
  return [row for row in rows(out) if row["metric"] not in TIMED]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
  """(a directory of a model of bytes, a text as a file)."""
  root = tmp_path_factory.mktemp("quantize")
  loaded_case.save(root / "model", loaded_case.config(), seed=2)
  (root / "text.txt").write_text(loaded_case.text(20))
  return root / "model", root / "text.txt"


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


def test_a_cell_that_fails_is_said_and_tried_again(case, tmp_path, monkeypatch, capfd):
  base = (f"--model={case[0]}", f"--text={case[1]}", "--schemes=int8", *QUICK, f"--out={tmp_path / 'out'}")
  apply = quant.apply
  structs = lambda params: isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct)
  monkeypatch.setattr(
    quant, "apply", lambda params, *more: apply(params, *more) if structs(params) else 1 / 0
  )
  assert call(*base) == 1
  shown = capfd.readouterr().out
  assert "failed: int8: ZeroDivisionError" in shown and "cells failed" in shown
  assert {row["status"] for row in rows(tmp_path / "out") if row["quant"] == "none"} == {"ok"}
  monkeypatch.setattr(quant, "apply", apply)
  assert call(*base) == 0
  assert {row["status"] for row in rows(tmp_path / "out")} == {"ok"}


@dataclasses.dataclass(frozen=True)
class Picky(Int8):
  """Int8 of widths that a group divides."""

  group: int = 128

  def quantize(self, w):
    if w.shape[-2] % self.group:
      raise QuantError(f"found a width of {w.shape[-2]}, expected a multiple of {self.group}")
    return super().quantize(w)


@dataclasses.dataclass(frozen=True)
class Never(Int8):
  """Int8 of no width."""

  def quantize(self, w):
    raise QuantError(f"found a width of {w.shape[-2]}")


def test_a_scheme_that_cannot_hold_the_weights_is_refused_by_name_and_in_all_has_smaller_groups_or_is_left_out(
  case, tmp_path, monkeypatch, capfd
):
  monkeypatch.setattr(quant, "SCHEMES", {"picky": Picky, "never": Never})
  base = (f"--model={case[0]}", f"--text={case[1]}", *QUICK, f"--out={tmp_path / 'out'}")
  assert call(*base, "--schemes=picky:group=64,picky") == 2
  error = capfd.readouterr().err
  assert (
    "picky:group=64 cannot hold the weights of the model: layers/0/attn/k/w: found a width of 32, expected a multiple of 64"
    in error
  )
  assert not (tmp_path / "out").exists()
  assert call(*base, "--schemes=all") == 0
  shown, text = capfd.readouterr().out, (tmp_path / "out" / "report.md").read_text()
  reasons = (
    "picky: layers/0/attn/k/w: found a width of 32, expected a multiple of 128; in its place picky:group=32\n",
    "never: layers/0/attn/k/w: found a width of 32\n",
  )
  for reason in reasons:
    assert f"--schemes=all without {reason}" in shown and f"- left out: {reason}" in text
  assert {row["quant"] for row in rows(tmp_path / "out")} == {"none", "picky:group=32"}
  monkeypatch.setattr(quant, "SCHEMES", {"never": Never})
  assert call(*base, "--schemes=all") == 2
  assert "no scheme can hold the weights" in capfd.readouterr().err


def test_schemes_are_judged_by_the_shapes_of_the_model():
  """Wider than any group, and with a vocabulary that columns in a byte do not divide."""
  cfg = loaded_case.config(
    embed_dim=512, num_heads=8, num_kv_heads=8, head_dim=64, mlp_dim=512, tie_embeddings=True
  )
  flags = lambda **given: type("Flags", (), {"quantize_head": True, "weights": [], **given})
  kept, left_out = schemes.fitting(flags(schemes="int4:group=512"), cfg)
  assert list(kept) == ["int4:group=512"] and not left_out
  odd = dataclasses.replace(cfg, vocab_size=257)
  with pytest.raises(
    ConfigError, match=r"int4:group=512 cannot hold .*: embed: found the shape \(512, 257\)"
  ):
    schemes.fitting(flags(schemes="int4:group=512"), odd)
  assert list(schemes.fitting(flags(schemes="int4", quantize_head=False), odd)[0]) == ["int4"]
  assert list(schemes.fitting(flags(schemes="int4", weights=["embed=int8"]), odd)[0]) == ["int4"]
  with pytest.raises(ConfigError, match="--weights: rules: 'heads' matches no parameter"):
    schemes.fitting(flags(schemes="int4", weights=["heads=no"]), odd)


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
  assert {row["quant"] for row in found} == {"none", *quant.SCHEMES}
  assert {row["method"] for row in found} == {"none", "yarn"}
  assert {row["status"] for row in found} == {"ok"}
  assert call("--smoke", f"--out={tmp_path / 'out'}") == 0


def test_fields_of_a_scheme_are_read_and_wrong_ones_named():
  found = schemes.parse("int8, int8_tensor:symmetric=False,nf4:double_quant=True:block=32,none")
  assert found == {
    "int8": Int8(),
    "int8_tensor:symmetric=False": Int8(per="tensor", symmetric=False),
    "nf4:double_quant=True:block=32": quant.SCHEMES["nf4"](double_quant=True, block=32),
  }
  assert list(schemes.parse("all")) == list(quant.SCHEMES)
  for text, words in {
    "int8:per=row": "found 'row', expected one of column, tensor",
    "int8:bits=4": "unexpected keyword argument 'bits'",
    "int8:per": "found 'per', expected field=value",
    "int4:bits=3:group=32": "int4:bits=3:group=32 is what the name int3 says; give int3:group=32",
    "int4_asym:symmetric=True": "give int4",
    "int8:symmetric=False": "give int8_asym",
    "int4:group=32:group=64": "a field is there twice",
    "nf4:levels=fp4": "give fp4",
    "glm_int8:bits=4": "give glm_int4",
  }.items():
    with pytest.raises(ConfigError, match=f"--schemes={text}: .*{re.escape(words.split(': ')[-1])}$"):
      schemes.parse(text)


@pytest.mark.parametrize(
  ("args", "code", "named"),
  [
    pytest.param(
      ["--schemes=int9"],
      2,
      ["--schemes=int9", "'int9'", "did you mean int8 or", "int8_asym"],
      marks=pytest.mark.core,
    ),
    (["--schemes=int8,int8"], 2, ["'int8' is there twice"]),
    (["--schemes="], 2, ["--schemes=", "empty item"]),
    (["--schemes=none"], 2, ["--schemes=none", "nothing to compare"]),
    (["--text=no/such/text"], 2, ["--text=no/such/text", "no such file"]),
    (["--weights=embed"], 2, ["--weights=embed", "PATTERN=yes"]),
    (["--weights=embed=int4:bits=3"], 2, ["--weights=embed=int4:bits=3", "give int3"]),
    (["--weights=(=no"], 2, ["--weights=(=no", "regular expression"]),
    (["--weights=wte=no"], 2, ["--weights", "'wte' matches no parameter"]),
    (["--rules=fsdp"], 2, ["--rules=fsdp without --mesh"]),
    (["--batch=0"], 2, ["--batch=0", "at least 1"]),
    (["--batch=200"], 65, ["text: found 401 tokens, expected at least 800"]),
    (["--rounds=1"], 2, ["--rounds=1", "at least 2"]),
    (["--new=1"], 2, ["--new=1", "at least 2"]),
    (["--seconds=-1"], 2, ["--seconds=-1", "at least 0"]),
    (["--windows=3"], 2, ["--windows=3", "--lengths"]),
    (["--methods=yarn"], 2, ["--methods=yarn", "--lengths"]),
    (["--lengths=32", "--methods=yarm"], 2, ["--methods=yarm", "did you mean yarn"]),
    (["--lengths=8"], 2, ["--lengths=8", "8 is below --train_length=16"]),
    (["--lengths=16", "--methods=pi"], 2, ["--methods=pi", "changes nothing"]),
    (["--lengths=x"], 2, ["--lengths=x", "found 'x'"]),
    (["--run=runs/some"], 2, ["--model", "--run=runs/some", "give one of them"]),
    (["--model=no/such/place/here"], 65, ["no/such/place/here"]),
    (["--lengths=4096"], 65, ["--text", "tokens, expected at least"]),
  ],
)
def test_what_is_refused(case, tmp_path, capfd, args, code, named):
  assert call(f"--model={case[0]}", f"--text={case[1]}", *QUICK, f"--out={tmp_path / 'out'}", *args) == code
  error = capfd.readouterr().err
  assert error.startswith("error: ") and "Traceback" not in error
  for words in named:
    assert words in error, error
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
  ("args", "code", "named"),
  [
    (["--model=DIR"], 2, ["--model=DIR without --text", "give --text=FILE"]),
    (["--text=README.md"], 2, ["--text=README.md without --model"]),
    (["--mesh=tensor=2"], 2, ["--mesh=tensor=2 without --model"]),
    (["--dtype=bfloat16"], 2, ["--dtype=bfloat16 without --model"]),
    (
      ["--run=no/such/run"],
      65,
      ["no/such/run/config.json", "experiments.length_extrapolation --out=no/such/run"],
    ),
  ],
)
def test_flags_that_do_not_go_together_are_refused(tmp_path, capfd, args, code, named):
  assert call(f"--out={tmp_path / 'out'}", *args) == code
  error = capfd.readouterr().err
  assert error.startswith("error: ") and all(words in error for words in named), error
  assert not (tmp_path / "out").exists()


def test_lengths_beyond_learned_positions_are_refused_before_the_weights_are_read(
  case, tmp_path, capfd, monkeypatch
):
  cfg = loaded_case.config(
    **dict(layers=(Layer(Learned(32)),), norm=LayerNorm(), mlp=Mlp("gelu_tanh"), mlp_dim=128),
    **dict(biases=("q", "k", "v", "o", "up", "down"), tie_embeddings=True, context_length=32),
  )
  loaded_case.save(tmp_path / "gpt2", cfg)
  base = (
    f"--model={tmp_path / 'gpt2'}",
    f"--text={case[1]}",
    "--schemes=int8",
    *QUICK,
    f"--out={tmp_path / 'out'}",
  )
  monkeypatch.setattr("experiments.checkpoint.Checkpoint.params", lambda *_: pytest.fail("weights were read"))
  for args, words in {
    ("--lengths=32,64", "--methods=none"): "--lengths=32,64: 64: learned positions end at 32",
    ("--window=33",): "--window: found 33, expected at most",
    ("--new=33",): "--prompt and --new: found 37, expected at most",
  }.items():
    assert call(*base, *args) == 2
    assert words in capfd.readouterr().err
  assert not (tmp_path / "out").exists()
