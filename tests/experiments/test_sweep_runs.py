"""Whole sweeps: what a run leaves, and what the same command does with it afterwards."""

import json
import shutil

import pytest
import sweep_case

from experiments.extrapolation import evaluate
from jaxllm.study import cells

FILES = (
  "results.jsonl",
  "results.csv",
  "report.md",
  "bpb_vs_length.png",
  "bpb_vs_position.png",
  "accuracy_vs_length.png",
  "config.json",
  "cells.jsonl",
  "checkpoints/rope-0/8",
  "checkpoints/alibi-0/4",
)


def ledger(out):
  return [json.loads(line) for line in (out / "cells.jsonl").read_text().splitlines()]


@pytest.fixture
def copy(finished, tmp_path):
  """(a copy of a finished run, its flags)."""
  out = shutil.copytree(finished[0], tmp_path / "out")
  return out, (f"--out={out}", *finished[1])


@pytest.fixture
def computed(monkeypatch):
  """The names of the groups that are computed, as they come."""
  names, compute = [], evaluate.compute

  def counted(settings, models, group):
    names.append(group.name)
    return compute(settings, models, group)

  monkeypatch.setattr(evaluate, "compute", counted)
  return names


@pytest.mark.core
def test_a_run_leaves_its_files_and_each_group_once(finished):
  out, _ = finished
  assert not [name for name in FILES if not (out / name).exists()]
  names = [line["group"] for line in ledger(out)]
  assert len(set(names)) == len(names)
  rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
  assert len(rows) == 2 * 5 * 2 * 4  # schemes, methods, lengths, metrics
  assert {(row["scheme"], row["method"]) for row in rows if row["status"] != "ok"} == {
    ("alibi", name) for name in ("pi", "yarn", "ntk", "rerope")
  }
  config = json.loads((out / "config.json").read_text())
  assert config["settings"]["train_length"] == 16 and "out" not in config["settings"]
  assert len(config["corpus"]["sha256"]) == 64
  assert set(config["models"]) == {"rope", "alibi"}


def test_a_finished_run_computes_nothing_and_leaves_the_same_bytes(finished, copy, computed, capfd):
  out, args = copy
  (out / "results.csv").unlink()
  assert sweep_case.run(*args) == 0
  assert computed == []
  assert "train rope" not in capfd.readouterr().err
  for name in ("results.csv", "results.jsonl", "report.md", "cells.jsonl", "bpb_vs_length.png"):
    assert (out / name).read_bytes() == (finished[0] / name).read_bytes(), name


def test_other_settings_in_the_same_place_are_refused_by_name(copy, capfd):
  out, args = copy
  assert sweep_case.run(*args, "--steps=9", "--mlp_dim=32") == 2
  error = capfd.readouterr().err
  for words in (
    str(out / "config.json"),
    "settings.steps: 8 there, 9 now",
    "training.rope.steps",
    "settings.mlp_dim",
  ):
    assert words in error
  assert sweep_case.run(*args) == 0  # and the run there is as it was


def test_a_changed_text_is_another_run(copy, corpus, tmp_path, capfd):
  text = tmp_path / "sources.txt"
  text.write_bytes(b"#" + corpus.read_bytes())
  assert sweep_case.run(*copy[1], f"--corpus={text}") == 2
  assert "corpus.sha256" in capfd.readouterr().err


def test_a_run_in_use_is_left_alone(copy, capfd):
  from jaxllm.study.files import Lock

  out, args = copy
  with Lock(out):
    assert sweep_case.run(*args) == 2
  assert "in use" in capfd.readouterr().err


def test_a_failed_cell_is_recorded_the_rest_goes_on_and_only_it_is_tried_again(
  finished, copy, monkeypatch, computed, capfd
):
  out, args = copy
  lines = (out / "cells.jsonl").read_text().splitlines(keepends=True)
  cut = next(i for i, line in enumerate(ledger(out)) if line["group"] == "rope/0/32/rerope/0")
  (out / "cells.jsonl").write_text("".join(lines[:cut]))  # as if it had been killed there
  score = evaluate.score_windows

  def fails(model, *rest):
    if type(model.cfg.layers[0].position).__name__ == "ReRope" and rest[1].shape[1] == 33:
      raise RuntimeError("no room at 0x7f00deadbeef")
    return score(model, *rest)

  with monkeypatch.context() as patch:
    patch.setattr(evaluate, "score_windows", fails)
    assert sweep_case.run(*args) == 1
  assert len(computed) == len(lines) - cut
  rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
  failed = [row for row in rows if row["status"] == "failed"]
  assert {(row["method"], row["length"], row["value"]) for row in failed} == {("rerope", 32, None)}
  assert {row["reason"] for row in failed} == {"RuntimeError: no room at 0x..."}
  assert len(rows) == 80 and len(failed) == 4
  assert "no room" in (out / "report.md").read_text()
  assert "cells failed" in capfd.readouterr().out

  computed.clear()
  assert sweep_case.run(*args) == 0
  assert computed == ["rope/0/32/rerope/0"]
  for name in ("results.csv", "report.md"):
    assert (out / name).read_bytes() == (finished[0] / name).read_bytes(), name


def test_a_model_that_diverges_fails_its_cells_and_not_the_others(tmp_path, corpus, monkeypatch, capfd):
  from jaxllm.train import loop

  make_step = loop.make_step

  def poisoned(model, *args, **kwargs):
    step_fn = make_step(model, *args, **kwargs)

    def step(state, tokens):
      state, metrics = step_fn(state, tokens)
      return state, metrics | ({"loss": float("nan")} if model.cfg.ropes else {})

    return step

  monkeypatch.setattr(loop, "make_step", poisoned)
  out = tmp_path / "out"
  args = (
    *sweep_case.TINY,
    f"--corpus={corpus}",
    "--methods=none",
    "--lengths=16,32",
    "--metrics=bpb,bpb_last",
  )
  assert sweep_case.run(f"--out={out}", *args) == 1
  rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
  assert {(row["scheme"], row["status"]) for row in rows} == {("rope", "failed"), ("alibi", "ok")}
  assert all("the loss is nan at step 1" in row["reason"] for row in rows if row["scheme"] == "rope")
  assert not [p for p in (out / "checkpoints" / "rope-0").iterdir() if p.name.isdigit()]
  assert "Traceback" not in capfd.readouterr().err


def test_the_ledger_is_written_a_group_at_a_time(copy, monkeypatch):
  """A stop between groups leaves what is done, and nothing of the rest."""
  out, args = copy
  (out / "cells.jsonl").unlink()
  record, count = cells.Ledger.record, []

  def stops(self, group, rows):
    record(self, group, rows)
    count.append(group)
    if len(count) == 3:
      raise KeyboardInterrupt

  monkeypatch.setattr(cells.Ledger, "record", stops)
  assert sweep_case.run(*args) == 75
  assert [line["group"] for line in ledger(out)] == count


def test_learned_positions_have_no_value_beyond_their_table(corpus, tmp_path, capfd):
  """The cells are there, with the reason; the table says n/a, and the run is a success."""
  tiny = [flag for flag in sweep_case.TINY if not flag.startswith(("--schemes", "--methods"))]
  args = (*tiny, "--schemes=learned", "--methods=none", f"--corpus={corpus}", f"--out={tmp_path / 'out'}")
  assert sweep_case.run(*args) == 0
  rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
  assert {(row["length"], row["status"], row["value"] is None) for row in rows} == {
    (16, "ok", False),
    (32, "not applicable", True),
  }
  assert {row["reason"] for row in rows if row["length"] == 32} == {
    "learned positions end at the training length, 16"
  }
  assert "n/a" in capfd.readouterr().out
  assert "n/a" in (tmp_path / "out" / "report.md").read_text()
