"""experiments.generate on the models of a finished sweep."""

import io
import json
import shutil

import pytest
import sweep_case

from experiments import export, generate
from jaxllm.generate.output import Generated


def call(*args):
  return sweep_case.run(*args, script=generate, check=generate.check)


@pytest.mark.parametrize("method", ["none", pytest.param("yarn", marks=pytest.mark.core), "rerope"])
def test_a_prompt_is_continued_past_the_trained_length(finished, capfd, method):
  args = (
    f"--run={finished[0]}",
    f"--method={method}",
    "--prompt=def f(x):",
    "--tokens=30",
    "--temperature=0.7",
  )
  texts = []
  for seed in (0, 0):
    assert call(*args, f"--seed={seed}") == 0
    texts.append(capfd.readouterr().out)
  assert texts[0].startswith("def f(x):")
  assert texts[0].encode() != b"def f(x):\n"
  assert texts[0] == texts[1]


def test_the_method_and_its_factor_are_put_on_the_model(finished, monkeypatch):
  seen = []

  def watched(model, params, prompts, max_new_tokens, **kwargs):
    position = model.cfg.layers[0].position
    seen.append(
      (type(position).__name__, getattr(position, "factor", None), model.cfg.query_scale is not None)
    )
    return Generated([[65] * max_new_tokens], ["length"])

  monkeypatch.setattr("jaxllm.generate.loop.generate", watched)
  for extra in (["--method=pi"], ["--method=ntk_logn", "--factor=3"], ["--method=none"], ["--method=rerope"]):
    assert call(f"--run={finished[0]}", "--prompt=import", "--tokens=24", *extra) == 0
  assert seen == [
    ("PiRope", 2.0, False),
    ("NtkRope", 3.0, True),
    ("Rope", None, False),
    ("ReRope", None, False),
  ]


def test_the_prompt_may_come_from_standard_input(finished, capfd, monkeypatch):
  monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("±x".encode())))
  assert call(f"--run={finished[0]}", "--method=none", "--scheme=alibi", "--prompt=-", "--tokens=3") == 0
  assert capfd.readouterr().out.startswith("±x")


def test_the_flags_of_samplers_reach_the_text(finished, capfd):
  args = (f"--run={finished[0]}", "--method=none", "--prompt=ab", "--tokens=30", "--temperature=0")
  assert call(*args) == 0
  greedy = capfd.readouterr().out
  more = (
    "--no_repeat_ngram_size=1",
    "--repetition_penalty=2",
    "--dry_multiplier=1",
    "--min_p=0.1",
    "--mirostat_tau=3",
  )
  assert call(*args, *more) == 0
  assert capfd.readouterr().out != greedy


@pytest.mark.parametrize(
  ("args", "code", "named"),
  [
    pytest.param(["--method=yarnn"], 2, ["--method=yarnn", "rerope"], marks=pytest.mark.core),
    (["--method=pi,ntk"], 2, ["--method=pi,ntk"]),
    (["--scheme=all"], 2, ["--scheme=all", "rope_logn"]),
    (["--scheme=alibi", "--method=rerope"], 2, ["--method=rerope", "--scheme=alibi", "--method=none"]),
    (["--tokens=0"], 2, ["--max_new_tokens=0", "above 0"]),
    (["--factor=-1"], 2, ["--factor=-1"]),
    (["--factor=2", "--method=none"], 2, ["--factor=2.0", "--method=none", "takes no factor", "yarn"]),
    (["--factor=2", "--method=rerope"], 2, ["--factor=2.0", "--method=rerope"]),
    (["--prompt="], 2, ["--prompt="]),
    (["--temperature=-1"], 2, ["--temperature=-1.0", "0 or more"]),
    (["--min_p=2"], 2, ["--min_p=2.0", "from 0 to 1"]),
    (["--dry_allowed_length=0"], 2, ["--dry_allowed_length=0", "1 or more"]),
    (["--sampler_order=vllm"], 2, ["--sampler_order=vllm", "transformers", "llama.cpp"]),
    (["--run=/no/such/run"], 65, ["/no/such/run", "experiments.length_extrapolation"]),
    (["--model_seed=1"], 65, ["rope-1", "--scheme rope, alibi", "--seed 0", "new --out"]),
    (["--seed=-1"], 2, ["--seed=-1", "from 0 to 4294967295"]),
    (["--seed=4294967296"], 2, ["--seed=4294967296", "from 0 to 4294967295"]),
    (["--top-q=3"], 2, ["there is no flag --top-q"]),
    (
      ["--mirostat_tau=5", "--sampler_order=llama.cpp", "--top_p=0.9"],
      2,
      ["--top_p with --mirostat_tau=5.0", "leave one"],
    ),
    (["--dry_sequence_breaker="], 2, ["--dry_sequence_breaker=: empty"]),
    (["--scheme=rope_logn"], 65, ["rope_logn-0", "--scheme rope, alibi", "new --out"]),
  ],
)
def test_errors(finished, capfd, args, code, named):
  assert call(f"--run={finished[0]}", "--tokens=4", *args) == code
  error = capfd.readouterr().err
  assert error.startswith("error: ") and "Traceback" not in error
  for words in named:
    assert words in error


def test_without_a_run_that_of_smoke_is_named(tmp_path, capfd, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert call() == 65
  assert "_smoke" not in capfd.readouterr().err
  (tmp_path / "runs" / "length_extrapolation_smoke").mkdir(parents=True)
  (tmp_path / "runs" / "length_extrapolation_smoke" / "config.json").write_text("{}")
  for script in (generate, export):
    more = ("--out=x",) if script is export else ()
    assert sweep_case.run(*more, script=script, check=script.check) == 65
    assert "--run=runs/length_extrapolation_smoke" in capfd.readouterr().err


def test_damaged_and_foreign_checkpoints_are_bad_data(finished, tmp_path, capfd):
  run = shutil.copytree(finished[0], tmp_path / "run")
  model = run / "checkpoints" / "rope-0" / "model.json"
  model.write_text(json.dumps(json.loads(model.read_text()) | {"mlp_dim": 32}))
  assert call(f"--run={run}", "--method=none", "--tokens=4") == 65
  assert "layers/0/mlp" in capfd.readouterr().err
  whole = (finished[0] / "checkpoints" / "rope-0" / "model.json").read_bytes()
  for damaged in (b'{"vocab', b"[1]", b"3", b"\xff", whole.replace(b'"window"', b'"windw"')):
    model.write_bytes(damaged)
    assert call(f"--run={run}", "--method=none", "--tokens=4") == 65
    assert f"{model}: damaged" in capfd.readouterr().err
  model.write_bytes(whole)
  for path in (run / "checkpoints" / "rope-0" / "8").rglob("*"):
    if path.is_file():
      path.write_bytes(path.read_bytes()[:5])
  assert call(f"--run={run}", "--method=none", "--tokens=4") == 65
  assert "step 8" in capfd.readouterr().err


def damage(directory):
  for path in directory.rglob("*"):
    if path.is_file():
      path.write_bytes(path.read_bytes()[:5])


def remove_first_model(run):
  shutil.rmtree(run / "checkpoints" / "rope-0")


def damage_first_model(run):
  damage(run / "checkpoints" / "rope-0" / "8")


def remove_description(run):
  (run / "checkpoints" / "rope-0" / "model.json").unlink()


@pytest.mark.parametrize(
  "lose", [remove_first_model, pytest.param(damage_first_model, marks=pytest.mark.slow), remove_description]
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_command_of_a_finished_run_brings_back_a_model_that_was_lost(finished, tmp_path, capfd, lose):
  run = shutil.copytree(finished[0], tmp_path / "run")
  lose(run)
  ask = (f"--run={run}", "--method=none", "--tokens=8", "--temperature=0")
  assert call(*ask) == 65
  assert "run the command that trained" in capfd.readouterr().err
  assert sweep_case.run(f"--out={run}", *finished[1]) == 0
  assert (run / "cells.jsonl").read_bytes() == (finished[0] / "cells.jsonl").read_bytes()
  capfd.readouterr()
  assert call(*ask) == 0
  text = capfd.readouterr().out
  assert call(f"--run={finished[0]}", *ask[1:]) == 0
  assert text == capfd.readouterr().out


def test_a_damaged_newest_step_costs_the_steps_after_the_one_before(finished, tmp_path, caplog):
  run = shutil.copytree(finished[0], tmp_path / "run")
  model = run / "checkpoints" / "rope-0"
  shutil.copytree(model / "8", model / "9")
  damage(model / "9")
  assert call(f"--run={run}", "--method=none", "--tokens=4") == 0
  assert "step 9: cannot be read" in caplog.text
