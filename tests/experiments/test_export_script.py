"""experiments.export: what the sweep trains, as transformers has it; and the sweep of the exported directory."""

import json
import re

import jax
import numpy as np
import pytest
import sweep_case

from experiments import export
from jaxllm import hf, tree
from jaxllm.leaf import dense
from jaxllm.nn import Transformer

# of sweep_case.TINY, and the perplexity of tokens
SWEEP = ("--methods=none,pi,yarn,ntk,rerope", "--lengths=16,32", "--windows=2")


def call(*args):
  return sweep_case.run(*args, script=export, check=export.check)


def values(out, scheme):
  """{what a cell is: its value} of a sweep's model."""
  rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
  return {
    (r["method"], r["factor"], r["length"], r["metric"]): r["value"] for r in rows if r["scheme"] == scheme
  }


@pytest.fixture(scope="module")
def trained(finished):
  """The output of a sweep."""
  return finished[0]


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
  out = tmp_path_factory.mktemp("export") / "model"
  assert call(f"--run={trained}", f"--out={out}") == 0
  return out


@pytest.mark.core
def test_what_is_exported_has_the_same_parameters_and_logits(trained, exported):
  """Bit for bit but for the embeddings, which are multiplied; compiled programs then fuse, and round, in another order."""
  from experiments.restored import load

  cfg, params = load(trained, "rope", 0)
  loaded_cfg, loaded = hf.load(exported)
  loaded = as_dense(loaded)
  assert (loaded_cfg.embed_scale, loaded_cfg.context_length) == (1.0, 16) and cfg.embed_scale == 4.0
  wanted = tree.flatten({**params, "embed": params["embed"] * np.float32(4.0)})
  for path, leaf in tree.flatten(loaded).items():
    np.testing.assert_array_equal(leaf, wanted[path], err_msg=path)
  tokens = np.arange(80, dtype=np.int32).reshape(2, 40) % 256
  wanted, _ = jax.jit(Transformer(cfg).apply)({"params": params}, tokens)
  found, _ = jax.jit(Transformer(loaded_cfg).apply)({"params": loaded}, tokens)
  np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())
  tokenizer = hf.load_tokenizer(exported)
  assert tokenizer.encode("aé") == [97, 0xC3, 0xA9]


def as_dense(params):
  """The tree with plain [in, out] arrays."""
  return tree.unflatten({path: np.asarray(dense(leaf)) for path, leaf in tree.flatten(params).items()})


def test_the_sweep_of_the_exported_directory_is_that_of_the_checkpoint(
  trained, exported, corpus, tmp_path, capfd
):
  args = (f"--model={exported}", f"--corpus={corpus}", *SWEEP)
  assert sweep_case.run(*args, f"--out={tmp_path / 'out'}") == 0
  shown = capfd.readouterr().out
  wanted, found = values(trained, "rope"), values(tmp_path / "out", "-")
  assert wanted.keys() == {key for key in found if key[-1] != "perplexity"}
  difference = max(abs(found[key] - wanted[key]) for key in wanted)
  print(f"the largest difference of {len(wanted)} cells is {difference:.1e}")
  # two orders of float32 sums; methods differ by more
  assert difference <= 2e-6
  at_32 = [value for (_, _, length, metric), value in wanted.items() if (length, metric) == (32, "bpb_last")]
  assert len(set(at_32)) == 5 and min(abs(a - b) for a in at_32 for b in at_32 if a != b) > 1e-4
  for key, value in found.items():
    if key[-1] == "perplexity":
      assert value == pytest.approx(2 ** found[*key[:-1], "bpb"], rel=1e-12)  # a token is a byte
  for words in ("family llama", "rope (base 10000.0", "trained length: 16 tokens", "attention of 32 tokens"):
    assert words in shown
  report = (tmp_path / "out" / "report.md").read_text()
  assert "`yarn`" in report and "`- yarn`" not in report and "Next-token accuracy" in report
  for name in ("config.json", "cells.jsonl", "results.csv", "bpb_vs_length.png", "windows.csv"):
    assert (tmp_path / "out" / name).stat().st_size > 100, name
  # the same command goes on from its ledger, and loads nothing
  assert sweep_case.run(*args, f"--out={tmp_path / 'out'}") == 0
  assert "loading" not in capfd.readouterr().err


def test_perplexity_is_that_of_transformers_under_four_methods(trained, capfd):
  pytest.importorskip("torch")
  pytest.importorskip("transformers")
  assert call(f"--run={trained}", "--check", "--times=4", "--windows=2") == 0
  table = capfd.readouterr().out
  rows = re.findall(r"^\| (\w+)[^|]*\| +([\d.]+) \| +([\d.]+) \| +([\d.e+-]+) \|$", table, re.MULTILINE)
  assert [name for name, *_ in rows] == list(export.CHECKED)
  assert len({ours for _, ours, *_ in rows}) == 4  # each method is another model
  for _, ours, theirs, difference in rows:
    assert float(ours) == pytest.approx(float(theirs), rel=1e-4) and float(difference) <= 1e-5
  assert "within 0.0001" in table


def test_a_method_is_exported_with_its_settings(trained, tmp_path):
  assert call(f"--run={trained}", "--method=yarn", "--factor=4", f"--out={tmp_path / 'yarn'}") == 0
  cfg, _ = hf.load(tmp_path / "yarn")
  position = cfg.layers[0].position
  assert (type(position).__name__, position.factor, position.original_length) == ("YarnRope", 4.0, 16)
  assert cfg.context_length == 64
  assert call(f"--run={trained}", "--method=dynamic_ntk", "--factor=2", f"--out={tmp_path / 'dynamic'}") == 0
  cfg, _ = hf.load(tmp_path / "dynamic")
  assert (type(cfg.layers[0].position).__name__, cfg.context_length) == ("DynamicNtkRope", 16)


@pytest.mark.parametrize(
  ("args", "code", "named"),
  [
    (["--method=rerope", "--out=x"], 2, ["rerope", "transformers has no such position method"]),
    (["--scheme=alibi", "--out=x"], 2, ["transformers has no family"]),
    (["--scheme=rope_logn", "--out=x"], 65, ["rope_logn", "rope, alibi"]),
    (["--method=ntk_logn", "--factor=2", "--out=x"], 2, ["--method=ntk_logn", "log n"]),
    (["--method=yarn", "--out=x"], 2, ["--method=yarn", "--factor"]),
    (["--factor=2", "--out=x"], 2, ["--factor=2.0", "takes no factor"]),
    (["--method=pi", "--factor=2", "--check"], 2, ["--check", "--method=pi"]),
    ([], 2, ["--out=DIR", "--check"]),
    (["--out=x", "--check"], 2, ["--out=DIR", "--check"]),
    (["--check", "--times=0.5"], 2, ["--times=0.5"]),
    (["--run=no/run", "--out=x"], 65, ["no/run"]),
  ],
)
def test_what_is_refused(trained, capfd, monkeypatch, tmp_path, args, code, named):
  monkeypatch.chdir(tmp_path)
  assert call(f"--run={trained}", *args) == code
  error = capfd.readouterr().err
  assert error.startswith("error: ") and "Traceback" not in error
  for words in named:
    assert words in error, error
  assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model-00001-of-00002.safetensors"])
def test_a_directory_with_a_model_is_not_written_over(trained, tmp_path, capfd, name):
  (tmp_path / name).write_text("mine")
  assert call(f"--run={trained}", f"--out={tmp_path}") == 2
  error = capfd.readouterr().err
  assert f"--out={tmp_path}: holds a model already ({name})" in error and "another --out" in error
  assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "mine"


def test_an_empty_directory_may_be_the_out(trained, tmp_path):
  assert call(f"--run={trained}", f"--out={tmp_path}") == 0
  assert (tmp_path / "config.json").is_file()
