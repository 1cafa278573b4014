"""experiments.flops: published numbers from its command line, what it writes, and what it refuses."""

import json

import pytest

from experiments import flops as script
from jaxllm import flops
from jaxllm.study import run_app

GLM = dict(
  model_type="glm-130b", vocab_size=150528, hidden_size=12288, inner_hidden_size=32768, num_layers=70
)
GLM |= dict(num_attention_heads=96, max_sequence_length=2048, layernorm_epsilon=1e-5, torch_dtype="float16")


def run(*args):
  """The exit code."""
  script.FLAGS.unparse_flags()
  for name in script.FLAGS:
    script.FLAGS[name].unparse()
  with pytest.raises(SystemExit) as ended:
    run_app(script.main, script.check, argv=["flops", *args], values=script.FLAGS)
  return ended.value.code


def rows(out):
  return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_llama_65b(tmp_path, capsys):
  """The example of README: 20.8 days."""
  args = (
    "--model=llama-65b",
    "--tokens=1.4e12",
    "--devices=2048",
    "--tokens_per_second=380",
    f"--out={tmp_path}",
  )
  assert run(*args) == 0
  shown = capsys.readouterr().out
  assert "llama-65b: 65,285,660,672 parameters" in shown and " 20.82 " in shown
  found = rows(tmp_path)
  (days,) = [row["value"] for row in found if row["quantity"] == "time" and row["devices"] == 2048]
  assert round(days, 1) == 20.8
  zero3 = [
    row["value"] for row in found if (row["unit"], row["devices"], row["zero"]) == ("B/device", 512, 3)
  ]
  assert sum(zero3[:3]) == pytest.approx(16 * 65_285_660_672 / 512)
  assert (tmp_path / "devices.png").read_bytes()[:4] == b"\x89PNG"
  assert "| device hours |" in (tmp_path / "report.md").read_text()


def test_a_directory_with_settings_only(tmp_path, capsys):
  """GLM-130B by its config.json: 4224 x 2048 tokens in 88.5 s on 768 A100 are MFU 32.36 and HFU 43.00 %."""
  (tmp_path / "config.json").write_text(json.dumps(GLM))
  args = (
    "--remat=full",
    f"--tokens_per_second={4224 * 2048 / 88.5 / 768}",
    "--devices=768",
    f"--out={tmp_path / 'out'}",
  )
  assert run(f"--model={tmp_path}", "--length=2048", "--device=a100-40gb", *args) == 0
  shown = capsys.readouterr().out
  assert "128,697,794,560 parameters" in shown and "32.36%" in shown and "43.00%" in shown
  numbers = {row["quantity"]: row["value"] for row in rows(tmp_path / "out") if row["devices"] == 768}
  assert numbers["MFU"] == pytest.approx(0.3236, abs=5e-5)


BAD = {
  "no model": ((), "--model is required"),
  "unknown model": (("--model=lama-65b",), "did you mean llama-65b"),
  "empty directory": (("--model=EMPTY",), "no config.json"),
  "device": (("--model=llama-7b", "--device=a1000"), "--device=a1000: found 'a1000', expected one of t4, l4"),
  "devices": (("--model=llama-7b", "--devices=0"), "--devices=0: expected a whole number of at least 1"),
  "tokens": (("--model=llama-7b", "--tokens=-1"), "--tokens=-1.0"),
  "stage": (("--model=llama-7b", "--zero=4"), "--zero=4: expected a stage from 0 to 3"),
  "both": (("--model=llama-7b", "--mfu=0.4", "--tokens_per_second=9"), "give one of them"),
  "share": (("--model=llama-7b", "--mfu=40"), "--mfu=40.0: expected a share"),
  "faster than it can": (("--model=llama-7b", "--tokens_per_second=1e6"), "expected at most 100 %"),
  "long": (
    ("--model=gpt3-175b", "--length=4096"),
    "--length: found 4096, expected at most max_length = 2048",
  ),
  "typing": (("--modle=llama-7b",), "did you mean --model"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_flags(name, tmp_path, capsys):
  args, reason = BAD[name]
  code = run(*(arg.replace("EMPTY", str(tmp_path)) for arg in args), f"--out={tmp_path / 'out'}")
  assert code == (65 if name == "empty directory" else 2)
  assert reason in capsys.readouterr().err
  assert not (tmp_path / "out").exists()


def test_the_flags_are_the_packages():
  """They are listed without importing it."""
  enums = {name: script.FLAGS[name].parser.enum_values for name in ("attention", "remat", "precision")}
  assert enums == {
    "attention": list(flops.ATTENTION),
    "remat": list(flops.REMAT),
    "precision": list(flops.PRECISIONS),
  }
