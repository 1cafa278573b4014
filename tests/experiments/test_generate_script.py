"""experiments.generate on the models of a finished sweep."""

import io
import json
import shutil
import types

import pytest
import sweep_case

from experiments import generate


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
    return types.SimpleNamespace(tokens=[[65] * max_new_tokens])

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


@pytest.mark.parametrize(
  ("args", "code", "named"),
  [
    pytest.param(["--method=yarnn"], 2, ["--method=yarnn", "rerope"], marks=pytest.mark.core),
    (["--method=pi,ntk"], 2, ["--method=pi,ntk"]),
    (["--scheme=all"], 2, ["--scheme=all", "rope_logn"]),
    (["--scheme=alibi"], 2, ["--method=rerope", "--scheme=alibi", "--method=none"]),
    (["--tokens=0"], 2, ["--tokens=0", "above 0"]),
    (["--factor=-1"], 2, ["--factor=-1"]),
    (["--prompt="], 2, ["--prompt="]),
    (["--temperature=-1"], 2, ["emperature", "-1"]),
    (["--run=/no/such/run"], 65, ["/no/such/run", "experiments.length_extrapolation"]),
    (["--seed=1"], 65, ["rope-1"]),
    (["--scheme=rope_logn"], 65, ["rope_logn-0", "--schemes=rope_logn"]),
  ],
)
def test_errors(finished, capfd, args, code, named):
  assert call(f"--run={finished[0]}", "--tokens=4", *args) == code
  error = capfd.readouterr().err
  assert error.startswith("error: ") and "Traceback" not in error
  for words in named:
    assert words in error


def test_damaged_and_foreign_checkpoints_are_bad_data(finished, tmp_path, capfd):
  run = shutil.copytree(finished[0], tmp_path / "run")
  model = run / "checkpoints" / "rope-0" / "model.json"
  model.write_text(json.dumps(json.loads(model.read_text()) | {"mlp_dim": 32}))
  assert call(f"--run={run}", "--method=none", "--tokens=4") == 65
  assert "layers/0/mlp" in capfd.readouterr().err
  shutil.copy(finished[0] / "checkpoints" / "rope-0" / "model.json", model)
  for path in (run / "checkpoints" / "rope-0" / "8").rglob("*"):
    if path.is_file():
      path.write_bytes(path.read_bytes()[:5])
  assert call(f"--run={run}", "--method=none", "--tokens=4") == 65
  assert "step 8" in capfd.readouterr().err
