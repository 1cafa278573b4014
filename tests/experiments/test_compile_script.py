"""experiments.compile: for the devices at hand, what it writes, and what it refuses."""

import json

import pytest

from experiments import compile as script
from jaxllm import quant
from jaxllm.parallel import topology
from jaxllm.study import run_app


def run(*args):
  """The exit code."""
  script.FLAGS.unparse_flags()
  for name in script.FLAGS:
    script.FLAGS[name].unparse()
  with pytest.raises(SystemExit) as ended:
    run_app(script.main, script.check, argv=["compile", *args], values=script.FLAGS)
  return ended.value.code


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """A directory with the config of a small Llama, and no weights."""
  config = dict(
    **dict(architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=96, hidden_size=32),
    **dict(intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2),
    **dict(max_position_embeddings=64, tie_word_embeddings=False, torch_dtype="float32", rms_norm_eps=1e-6),
  )
  path = tmp_path_factory.mktemp("llama")
  (path / "config.json").write_text(json.dumps(config))
  return path


def test_the_devices_at_hand(tmp_path, capsys, model):
  mesh = "data=4,tensor=2"
  assert run(f"--model={model}", f"--mesh={mesh}", "--length=16", "--batch_size=8", f"--out={tmp_path}") == 0
  rows = {
    row["quantity"]: row for row in map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
  }
  value = lambda name: rows[name]["value"]
  assert value("needed") >= value("arguments") > 0 and value("all-reduce, number") > 0
  assert value("fits") is None and rows["fits"]["reason"] == "the memory of a device is not known"
  assert value("FLOPs of the program's products") == value("FLOPs by formula")
  assert mesh in capsys.readouterr().out and "| needed" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
  ("args", "named"),
  [
    ((), ("--model is required",)),
    (("--model=llama-3-9b",), ("--model=llama-3-9b", "llama-3-8b")),
    (("--model=llama-7b", "--length=0"), ("--length=0",)),
    (("--model=llama-7b", "--mesh=data=8", "--batch_size=12"), ("--batch_size=12", "multiple of 8", "16")),
    (("--model=llama-7b", "--mesh=fsdp=3"), ("fsdp=3", "1, 2, 4, 8")),
    (("--model=llama-7b", "--topology=v5e:3x3"), ("found 3x3", "v5e:2x4 and v5e:4x4")),
    (("--model=llama-7b", "--quant=int5"), ("--quant=int5", "int4")),
  ],
)
def test_what_is_refused(capsys, args, named):
  assert run(*args) == 2
  said = capsys.readouterr().err
  assert said.startswith("error: ") and all(part in said for part in named), said


def test_without_libtpu(capsys, monkeypatch):
  monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
  assert run("--model=llama-7b", "--topology=v5e:4x4") == 2
  assert "pip install 'jaxllm[tpu]'" in capsys.readouterr().err


def test_the_names_that_flags_list():
  assert set(script.SCHEMES) == {"none", *quant.SCHEMES}
