"""What experiments.generate refuses of a checkpoint's flags and prompts, with which reason and exit code; before any weight."""

import json
import subprocess
import sys
from pathlib import Path

import loaded_case
import numpy as np
import pytest
import sweep_case
from safetensors.numpy import load_file, save_file

from experiments import generate
from jaxllm.activation import Mlp
from jaxllm.config import Layer
from jaxllm.hf import loading
from jaxllm.norm import LayerNorm
from jaxllm.position import Learned

P = "--prompt=ab"
BIASES = ("q", "k", "v", "o", "up", "down")
KINDS = {  # of models of bytes, without a chat template
  "llama": {},
  "gpt2": dict(
    layers=(Layer(Learned(32)),),
    norm=LayerNorm(),
    mlp=Mlp("gelu_tanh"),
    mlp_dim=128,
    biases=BIASES,
    tie_embeddings=True,
  ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """{kind: directory}; "bare" has no tokenizer."""
  root = tmp_path_factory.mktemp("models")
  for kind in ("llama", "gpt2"):
    loaded_case.save(root / kind, loaded_case.config(num_layers=1, **KINDS[kind]))
  cfg = loaded_case.config(num_layers=1)
  loaded_case.hf.save(root / "bare", cfg, loaded_case.params(cfg))
  return root


@pytest.mark.parametrize(
  ("args", "code", "named"),
  [
    pytest.param(
      ["--model={}/llama", "--run=x", P],
      2,
      ["--run", "give one of --model and --run"],
      marks=pytest.mark.core,
    ),
    (["--model={}/llama", "--scheme=alibi", P], 2, ["--scheme: both name a model"]),
    (["--model={}/llama"], 2, ["--prompt=TEXT", "--prompts_file", "--interactive"]),
    (["--model={}/llama", P, "--interactive"], 2, ["--prompt with --interactive"]),
    (["--model={}/llama", P, "--prompts_file=x"], 2, ["--prompt with --prompts_file"]),
    (["--model={}/llama", "--prompt="], 2, ["--prompt=: empty"]),
    (["--model={}/llama", "--interactive", "--json"], 2, ["--interactive with --json"]),
    (["--model={}/llama", "--interactive", "--compare=none,ntk"], 2, ["--interactive with --compare"]),
    (["--model={}/llama", P, "--json", "--stream"], 2, ["--json with --stream"]),
    (["--model={}/llama", P, "--system=x"], 2, ["--system without --chat"]),
    (["--model={}/llama", P, "--logprobs=2"], 2, ["--logprobs without --json"]),
    (["--model={}/llama", P, "--json", "--logprobs=-1"], 2, ["--logprobs=-1", "0 or more"]),
    (["--model={}/llama", P, "--json", "--logprobs=257"], 2, ["--logprobs=257", "at most 256"]),
    (["--model={}/llama", P, "--rules=data"], 2, ["--rules without --mesh"]),
    (["--model={}/llama", P, "--mesh=data=3"], 2, ["data=3", "8"]),
    (["--model={}/llama", P, "--stop="], 2, ["--stop=: empty"]),
    (["--model={}/llama", P, "-n=0"], 2, ["--max_new_tokens=0", "above 0"]),
    (["--model={}/llama", P, "--batch_size=2"], 2, ["--batch_size=2", "--prompts_file"]),
    (["--model={}/llama", P, "--max_new_token=4"], 2, ["--max_new_token", "did you mean --max_new_tokens"]),
    (["--model={}/llama", P, "--temperature=-1"], 2, ["--temperature=-1.0", "0 or more"]),
    (["--model={}/llama", P, "--dtype=int8"], 2, ["--dtype=int8", "bfloat16"]),
    (["--model={}/llama", P, "--cache_type=int3"], 2, ["--cache_type=int3", "int4"]),
    (["--model={}/llama", P, "--compare=none,ntkk"], 2, ["--compare=none,ntkk", "did you mean ntk"]),
    (["--model={}/llama", P, "--compare=none,none"], 2, ["'none' is there twice"]),
    (["--model={}/llama", P, "--compare=none,ntk", "--method=pi"], 2, ["--compare with --method"]),
    (["--model={}/llama", P, "--compare=none,rerope", "--factor=2"], 2, ["--factor=2.0", "takes no factor"]),
    (
      ["--model={}/llama", P, "--method=yarn", "-n=4"],
      2,
      ["--method=yarn: yarn changes nothing on 6 tokens", "trained at 16"],
    ),
    (["--model={}/llama", "--interactive", "--method=yarn"], 2, ["--method=yarn", "give --factor"]),
    (
      ["--model={}/gpt2", P, "--method=yarn", "-n=9"],
      2,
      ["--method=yarn", "the model has no RoPE (its positions: learned)"],
    ),
    (["--model={}/gpt2", P, "--compare=none,pi", "-n=9"], 2, ["--compare=none,pi: pi: pi changes RoPE"]),
    (["--model={}/gpt2", P, "-n=31"], 2, ["found 33, expected at most max_length = 32"]),
    (["--model={}/llama", P, "--chat"], 65, ["no chat template"]),
    (["--model={}/llama", "--prompts_file={}/chat.jsonl"], 65, ["no chat template"]),
    (["--model={}/bare", P], 65, ["no tokenizer.json"]),
    (["--model={}/nothing", P], 65, ["nothing"]),
    (["--model={}/llama", "--prompts_file={}/none.txt"], 2, ["--prompts_file=", "no such file"]),
    (["--model={}/llama", "--prompts_file={}/empty.txt"], 65, ["empty.txt: 0 bytes"]),
    (["--model={}/llama", "--prompts_file={}/latin1.txt"], 65, ["latin1.txt: not UTF-8 at byte 1"]),
    (["--model={}/llama", "--prompt=a\udcff"], 65, ["lone surrogate"]),
    (["--chat"], 2, ["--chat without --model"]),
    (["--mesh=data=8"], 2, ["--mesh without --model"]),
    (["--compare=none,ntk", "--scheme=alibi"], 2, ["--compare=none,ntk with --scheme=alibi"]),
    (["--prompts_file={}/chat.jsonl"], 65, ["chats, which a model of --run has no template for"]),
  ],
)
def test_what_is_refused(models, monkeypatch, capfd, args, code, named):
  (models / "empty.txt").write_bytes(b"")
  (models / "latin1.txt").write_bytes(b"a\xe9b")
  (models / "chat.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "x"}]}))
  monkeypatch.setattr(loading.Opened, "params", lambda *_: pytest.fail("weights were read"))
  assert sweep_case.run(*(one.format(models) for one in args), script=generate, check=generate.check) == code
  out, error = capfd.readouterr()
  assert out == "" and error.startswith("error: ") and "Traceback" not in error
  for words in named:
    assert words in error, error


def test_weights_with_nan_end_the_run(tmp_path, capfd):
  """Whoever made the file kept no sums: the tensor is named, and no text begins."""
  cfg = loaded_case.config(num_layers=1)
  path = loaded_case.save(tmp_path / "m", cfg) / "model.safetensors"
  name = "model.layers.0.mlp.down_proj.weight"
  tensors = {key: x.copy() for key, x in load_file(path).items()}
  tensors[name][0, 0] = np.nan
  save_file(tensors, path)
  (tmp_path / "m" / "SHA256SUMS").unlink()
  args = (f"--model={tmp_path / 'm'}", P, "-n=4")
  assert sweep_case.run(*args, script=generate, check=generate.check) == 65
  out, error = capfd.readouterr()
  assert (
    out == "" and f"{name} of model.safetensors: 1 value is NaN or infinite, the first at [0, 0]" in error
  )


def test_flags_and_files_are_checked_before_jax_is_imported(tmp_path):
  program = (
    "import sys, runpy\nsys.argv = ['generate', '--model=x', '--prompts_file=y']\n"
    "try:\n  runpy.run_module('experiments.generate', run_name='__main__')\n"
    "except SystemExit as e:\n  print(e.code, 'jax' in sys.modules)\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
  )
  assert done.stdout == "2 False\n" and "no such file" in done.stderr
