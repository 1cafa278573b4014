"""experiments.evaluate: the numbers of transformers on the same windows, intervals, resuming, and what is refused."""

import functools
import itertools
import json
import math
import re
import shutil

import loaded_case
import numpy as np
import pytest
import safetensors.numpy
import sweep_case

from experiments import evaluate
from experiments.checkpoint import Checkpoint, sampled
from jaxllm.evaluate import strided
from jaxllm.hf import files, header
from jaxllm.study import interval, progress

WINDOW, STRIDE = 24, 10


def call(*args):
  return sweep_case.run(*args, script=evaluate, check=evaluate.check)


def rows(out):
  return {row["metric"]: row for row in map(json.loads, (out / "results.jsonl").read_text().splitlines())}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """(a directory whose tokens are parts of words, a text of UTF-8 as a file)."""
  root = tmp_path_factory.mktemp("evaluate")
  size = loaded_case.word_tokenizer(root / "model")
  cfg = loaded_case.config(vocab_size=size)
  loaded_case.hf.save(root / "model", cfg, loaded_case.params(cfg, seed=2))  # it has some hits
  (root / "text.txt").write_text(loaded_case.text(20))
  return root / "model", root / "text.txt"


@pytest.fixture(scope="module")
def finished(checkpoint, tmp_path_factory):
  """The output of a whole run, and its flags."""
  out = tmp_path_factory.mktemp("evaluate") / "out"
  args = (f"--model={checkpoint[0]}", f"--text={checkpoint[1]}", f"--window={WINDOW}", f"--stride={STRIDE}")
  args += ("--method=yarn", "--factor=2", "--batch_size=5")
  assert call(*args, f"--out={out}") == 0
  return out, args


def in_transformers(directory, text):
  """(losses, hits, ids) of each token but the first, by windows that a loop lays over the text, each begun with <s>."""
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  config = transformers.AutoConfig.from_pretrained(directory)
  config.max_position_embeddings = 2 * loaded_case.LENGTH
  config.rope_parameters = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 2.0,
    "original_max_position_embeddings": loaded_case.LENGTH,
  }
  model = transformers.AutoModelForCausalLM.from_pretrained(
    directory, config=config, dtype=torch.float32, attn_implementation="eager"
  )
  ids = transformers.PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))(text)[
    "input_ids"
  ]
  places, windows, scored, end = [], [], 1, WINDOW
  while scored < len(ids):
    end = min(end, len(ids) - 1)
    places += [(len(windows), WINDOW - (end - token) - 1) for token in range(scored, end + 1)]
    windows.append([ids[0], *ids[end - WINDOW + 1 : end]])
    scored, end = end + 1, end + STRIDE
  with torch.no_grad():
    log_p = model(torch.tensor(windows)).logits.double().log_softmax(-1).numpy()
  log_p = np.array([log_p[place] for place in places])
  labels = np.array(ids[1:])
  return -log_p[np.arange(len(labels)), labels], log_p.argmax(-1) == labels, np.array(ids)


@pytest.mark.core
def test_the_numbers_are_those_of_transformers_on_the_same_windows(checkpoint, finished):
  directory, path = checkpoint
  found, text = rows(finished[0]), path.read_text()
  nats, hits, ids = in_transformers(directory, text)
  assert len(nats) == len(ids) - 1 == found["perplexity"]["tokens"]
  assert found["bpb"]["bytes"] == len(text.encode())  # <s> is the one token that is not scored, and no text
  wanted = {
    "perplexity": math.exp(nats.mean()),
    "bpb": nats.sum() / math.log(2) / len(text.encode()),
    "accuracy": hits.mean(),
  }
  for metric, value in wanted.items():
    assert found[metric]["value"] == pytest.approx(value, rel=1e-5), metric
  # and the interval is that of 50 stretches
  edges = strided.block_edges(len(ids), 50)
  sums = [math.fsum(nats[a - 1 : b - 1]) for a, b in itertools.pairwise(edges)]
  mean, half = interval.ratio(sums, np.diff(edges).tolist())
  assert found["perplexity"]["low"] == pytest.approx(math.exp(mean - half), rel=1e-5)
  assert found["perplexity"]["high"] == pytest.approx(math.exp(mean + half), rel=1e-5)
  for row in found.values():
    assert row["low"] < row["value"] < row["high"] and row["value"] > 0
    assert (row["scheme"], row["method"], row["factor"], row["length"]) == ("-", "yarn", 2.0, WINDOW)


def test_a_run_that_was_stopped_goes_on_and_ends_with_the_same_bytes(finished, tmp_path, monkeypatch, capfd):
  out, args = finished
  score, seen = strided.score_windows, []

  def stops(*call):
    if len(seen) == 7:
      raise KeyboardInterrupt
    seen.append(call)
    return score(*call)

  monkeypatch.setattr(strided, "score_windows", stops)
  assert call(*args, f"--out={tmp_path / 'out'}") == 75
  assert not (tmp_path / "out" / "results.jsonl").exists()
  monkeypatch.setattr(strided, "score_windows", score)
  monkeypatch.setattr(progress, "Progress", functools.partial(progress.Progress, every=0.0))
  capfd.readouterr()
  assert call(*args, f"--out={tmp_path / 'out'}") == 0
  shown = capfd.readouterr()
  assert shown.err.startswith("windows: 40/")  # seven calls of five windows were done, the eighth is the next
  assert re.search(r"windows: 45/\d+ .* tokens/s  .* left", shown.err)
  for name in ("results.jsonl", "results.csv"):
    assert (tmp_path / "out" / name).read_bytes() == (out / name).read_bytes()
  assert "perplexity" in shown.out and "95 %" in shown.out and "yarn (base 10000.0" in shown.out


def test_a_checkpoint_is_told_by_samples_of_every_tensor(checkpoint, tmp_path):
  """A copy elsewhere is the same one; with a tensor overwritten in its place, and the sizes kept, it is another."""
  shutil.copytree(checkpoint[0], tmp_path / "copy")
  about = lambda directory: Checkpoint.open(str(directory)).about()
  assert about(tmp_path / "copy") == about(checkpoint[0])
  path = tmp_path / "big.safetensors"
  safetensors.numpy.save_file({"a": np.zeros(8), "b": np.arange(1 << 19, dtype=float)}, path)
  stored = header.read_header(path)
  digests = {sampled(path, stored.values())}
  small, big = stored["a"], stored["b"]
  gap = (big.stop - big.start) // 63
  assert path.stat().st_size > 4 << 20
  for start, size in ((small.stop - 1, 1), (big.start, 1), (big.start + 2 * gap, gap), (big.stop - 1, 1)):
    _overwrite(path, start, size)
    digests.add(sampled(path, stored.values()))
  assert len(digests) == 5
  weight = files.Checkpoint(tmp_path / "copy").tensors["model.layers.1.mlp.up_proj.weight"]
  _overwrite(weight.file, (weight.start + weight.stop) // 2, 1)
  assert about(tmp_path / "copy") != about(checkpoint[0])


def _overwrite(path, start, size):
  with path.open("r+b") as file:
    file.seek(start)
    file.write(b"\x2a" * size)


def test_another_text_is_another_run(finished, checkpoint, tmp_path, capfd):
  text = tmp_path / "text.txt"
  text.write_text(checkpoint[1].read_text() + "more")
  assert call(*finished[1], f"--text={text}", f"--out={finished[0]}") == 2
  assert "text.sha256" in capfd.readouterr().err


def test_a_loss_that_is_no_number_fails_and_says_so(finished, tmp_path, monkeypatch, capfd):
  score = strided.score_windows
  monkeypatch.setattr(strided, "score_windows", lambda *call: [x * np.nan for x in score(*call)])
  assert call(*finished[1], f"--out={tmp_path / 'out'}") == 1
  assert {row["status"] for row in rows(tmp_path / "out").values()} == {"failed"}
  assert "the value is nan" in capfd.readouterr().out


def test_smoke_scores_the_beginning(checkpoint, tmp_path, capfd):
  out = tmp_path / "out"
  assert (
    call(f"--model={checkpoint[0]}", f"--text={checkpoint[1]}", "--smoke", "--metrics=bpb", f"--out={out}")
    == 0
  )
  assert list(rows(out)) == ["bpb"] and rows(out)["bpb"]["tokens"] == evaluate.SMOKE_TOKENS - 1
  assert "stride 32; each begins with token" in capfd.readouterr().out


@pytest.mark.parametrize(
  ("args", "code", "named"),
  [
    pytest.param(["--window=8", "--stride=9"], 2, ["--stride=9", "--window=8"], marks=pytest.mark.core),
    (["--window=0"], 2, ["--window=0", "at least 1"]),
    (["--metrics=ppl"], 2, ["--metrics=ppl", "'ppl'", "perplexity"]),
    (["--factor=2"], 2, ["--factor=2.0", "--method=none", "takes no factor"]),
    (["--factor=0.5", "--method=yarn", "--window=32"], 2, ["--factor=0.5", "at least 1"]),
    (["--factor=nan", "--method=yarn", "--window=32"], 2, ["--factor=nan", "at least 1"]),
    (["--method=yarn", "--window=16"], 2, ["--method=yarn", "changes nothing", "trained at 16"]),
    (["--rules=tensor"], 2, ["--rules=tensor", "--mesh"]),
    (["--mesh=tensor=3"], 2, ["tensor=3", "8"]),
    (["--mesh=fsdp=8", "--rules=tensr"], 2, ["--rules=tensr", "did you mean tensor"]),
    (["--model=no/such/place/here"], 65, ["no/such/place/here"]),
    (["--text=no/such/text"], 2, ["--text=no/such/text"]),
  ],
)
def test_what_is_refused(checkpoint, tmp_path, capfd, args, code, named):
  base = (f"--model={checkpoint[0]}", f"--text={checkpoint[1]}", f"--out={tmp_path / 'out'}")
  assert call(*base, *args) == code
  error = capfd.readouterr().err
  assert error.startswith("error: ") and "Traceback" not in error
  for words in named:
    assert words in error, error
  assert not (tmp_path / "out").exists()


def test_texts_and_ids_that_cannot_be_scored_are_bad_data(checkpoint, tmp_path, capfd):
  directory, _ = checkpoint
  for content, words in ((b"", "0 bytes"), (b"a\xff", "not UTF-8"), (b"x", None)):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    code = call(f"--model={directory}", f"--text={path}", f"--out={tmp_path / 'out'}", "--window=8")
    error = capfd.readouterr().err
    assert (code, error) == (0, error) if words is None else (code == 65 and words in error), error
  small = tmp_path / "small"
  size = loaded_case.word_tokenizer(small)
  cfg = loaded_case.config(vocab_size=size - 5)
  loaded_case.hf.save(small, cfg, loaded_case.params(cfg))
  (tmp_path / "text.txt").write_text(loaded_case.text())
  assert call(f"--model={small}", f"--text={tmp_path / 'text.txt'}") == 65
  assert f"{size - 5} rows" in capfd.readouterr().err


def test_a_window_beyond_learned_positions_is_refused_before_the_text_is_read(tmp_path, capfd, monkeypatch):
  from experiments.checkpoint import Checkpoint
  from jaxllm.activation import Mlp
  from jaxllm.config import Layer
  from jaxllm.norm import LayerNorm
  from jaxllm.position import Learned

  cfg = loaded_case.config(
    layers=(Layer(Learned(32)),),
    norm=LayerNorm(),
    mlp=Mlp("gelu_tanh"),
    mlp_dim=128,
    biases=("q", "k", "v", "o", "up", "down"),
    tie_embeddings=True,
    context_length=32,
  )
  loaded_case.save(tmp_path / "gpt2", cfg)
  monkeypatch.setattr(Checkpoint, "text", lambda *_: pytest.fail("the text was read"))
  (tmp_path / "text.txt").write_text("text")
  assert call(f"--model={tmp_path / 'gpt2'}", f"--text={tmp_path / 'text.txt'}", "--window=33") == 2
  assert "--window: found 33, expected at most max_length = 32" in capfd.readouterr().err


def test_a_checkpoint_that_does_not_fit_its_config_is_bad_data_before_any_part(checkpoint, tmp_path, capfd):
  directory = shutil.copytree(checkpoint[0], tmp_path / "model")
  plain = json.loads((directory / "config.json").read_text())
  (directory / "config.json").write_text(json.dumps(plain | {"vocab_size": plain["vocab_size"] + 100}))
  out = tmp_path / "out"
  base = (f"--model={directory}", f"--text={checkpoint[1]}", f"--out={out}")
  for run in (call, sweep_case.run):
    assert run(*base) == 65
    assert "config.json: found the SHA-256" in capfd.readouterr().err
    assert run(*base, "--noverify") == 65
    error = capfd.readouterr().err
    assert error.count("error: ") == 1 and "embed_tokens" in error and "vocab_size" in error, error
    assert not out.exists()


def test_a_mesh_and_its_rules_are_said(checkpoint, tmp_path, capfd):
  base = (f"--model={checkpoint[0]}", f"--text={checkpoint[1]}", f"--out={tmp_path / 'out'}", "--smoke")
  assert call(*base, "--mesh=data=2,tensor=4", "--dtype=float32", "--window=16") == 0
  assert "mesh: data=2,tensor=4 of cpu, rules tensor\n" in capfd.readouterr().out


@pytest.mark.parametrize(
  ("args", "said"),
  [(["--window=24"], True), (["--window=16"], False), (["--window=24", "--method=yarn"], False)],
)
def test_a_window_above_the_trained_length_is_said_where_no_method_is_on(
  checkpoint, tmp_path, capfd, args, said
):
  base = (f"--model={checkpoint[0]}", f"--text={checkpoint[1]}", f"--out={tmp_path / 'out'}", "--smoke")
  assert call(*base, *args) == 0
  line = "window: 1.5 times the trained length of 16; --method puts a position method on"
  assert (line in capfd.readouterr().out.splitlines()) == said


def test_weights_that_cannot_be_used_end_the_run_and_fail_no_part(checkpoint, tmp_path, capfd):
  directory = shutil.copytree(checkpoint[0], tmp_path / "model")
  tensors = safetensors.numpy.load_file(directory / "model.safetensors")
  tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], np.nan)
  safetensors.numpy.save_file(tensors, directory / "model.safetensors")
  base = (f"--model={directory}", f"--text={checkpoint[1]}", "--noverify")
  for name, run, more in (
    ("evaluate", call, ()),
    ("sweep", sweep_case.run, ("--methods=none", "--lengths=16", "--windows=2")),
  ):
    assert run(*base, *more, f"--out={tmp_path / name}") == 65
    error = capfd.readouterr().err
    assert f"error: {directory}: model.norm.weight of model.safetensors" in error and "NaN" in error, error
    assert (tmp_path / name / "cells.jsonl").read_bytes() == b""
