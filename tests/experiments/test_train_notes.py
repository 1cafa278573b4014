"""What experiments.train says before a run, and what it takes along for the model that it leaves."""

import json
import re

import jax
import loaded_case
import numpy as np
import pytest
from train_case import QUICK, call, settings_of, write_text

from experiments.training import notes, setup
from jaxllm import flops, hf
from jaxllm.errors import ConfigError


def prepared(directory, *args):
  """(what is said of a run of these flags, its setup)."""
  s = settings_of(*QUICK, *args, f"--out={directory / 'out'}")
  made = setup.set_up(s)
  return notes.notes(s, made), made


def test_a_plain_run_says_nothing(tmp_path):
  assert prepared(tmp_path, f"--text={write_text(tmp_path)}")[0] == []


def test_a_mesh_is_told_with_what_a_device_holds(tmp_path):
  """ZeRO 3 of float32: parameters and two moments, and counters."""
  args = (f"--text={write_text(tmp_path)}", "--mesh=fsdp=8", "--embed_dim=64", "--mlp_dim=192")
  (said,), made = prepared(tmp_path, *args)
  assert said.startswith("mesh fsdp=8, rules fsdp: parameters and the optimizer's state take ")
  held = float(said.split("take ")[1].split()[0]) * 1e9
  assert held == pytest.approx(12 * flops.count(made.model.cfg, 16).parameters / 8, rel=0.01)
  factors = prepared(tmp_path, *args, "--train=lora", "--lora_rank=2")[0][0]
  assert (
    float(factors.split("take ")[1].split()[0]) * 1e9 < 0.6 * held
  )  # of what is frozen there are no moments


def test_several_processes_have_a_mesh(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(
    ConfigError, match=r"--mesh: missing, and 2 processes .* 8 devices; give it, as --mesh=fsdp=8"
  ):
    prepared(tmp_path, f"--text={write_text(tmp_path)}")


def test_what_blocks_do_not_divide_is_not_quantized(tmp_path, capsys):
  args = (f"--text={write_text(tmp_path)}", "--train=qlora", "--embed_dim=64", "--num_heads=4")
  (said,), _ = prepared(tmp_path, *args, "--mlp_dim=100")
  assert said == (
    "not quantized: layers/0/mlp/down/w and 1 more, whose inputs blocks of 64 do not divide; they get LoRA as they are"
  )
  assert prepared(tmp_path, *args, "--mlp_dim=128")[0] == []
  assert call(*QUICK, *args, "--mlp_dim=100", "--steps=2", f"--out={tmp_path / 'run'}") == 0
  assert said in capsys.readouterr().out and hf.load(tmp_path / "run" / "model")
  with pytest.raises(ConfigError, match=r"--train=qlora: .* divide none of .* 36, 100; take --train=lora"):
    prepared(tmp_path, args[0], args[1], "--embed_dim=36", "--num_heads=2", "--mlp_dim=100")


@pytest.mark.parametrize(
  ("args", "words"),
  [
    (("--objective=glm",), "no model for transformers will be written: rope_2d.*--position=rope has one"),
    (("--position=alibi",), "no model for transformers will be written: .*; --position=rope has one"),
    (("--objective=prefix_lm",), "the model will be written as one with a causal mask"),
    (("--objective=glm", "--position=rope"), "the model will be written as one with a causal mask"),
  ],
)
def test_what_a_model_will_not_be_is_said_before(tmp_path, args, words):
  (said,), _ = prepared(tmp_path, f"--text={write_text(tmp_path)}", *args)
  assert re.match(words, said)


def tokens(directory, **header):
  np.tile(np.arange(256, dtype="<u2"), 40).tofile(directory / "text.bin")
  known = {"dtype": "uint16", "vocab_size": 256, "tokens": 256 * 40, "separator": 10}
  (directory / "text.json").write_text(json.dumps(known | header))
  return f"--text={directory / 'text.bin'}"


def test_the_tokenizer_of_a_token_file_goes_with_the_model(tmp_path, capsys):
  """By name of the header, or of the flag; its separator is the model's eos.  Of ids no bits a byte are told."""
  loaded_case.save(tmp_path / "bytes", loaded_case.config())
  (said,), made = prepared(tmp_path, tokens(tmp_path))
  assert "written without a tokenizer: the header" in said and made.tokenizer is None
  said, made = prepared(tmp_path, tokens(tmp_path, tokenizer=str(tmp_path / "bytes")))
  assert said == [] and made.tokenizer.encode("so") == [115, 111] and made.model.cfg.eos_ids == (10,)
  run = (*QUICK, tokens(tmp_path), f"--tokenizer={tmp_path / 'bytes'}", f"--out={tmp_path / 'run'}")
  assert call(*run) == 0
  assert hf.load_tokenizer(tmp_path / "run" / "model").encode("so") == [115, 111]
  assert hf.load(tmp_path / "run" / "model")[0].eos_ids == (10,)
  assert "bits_per_byte" not in capsys.readouterr().out
  with pytest.raises(ConfigError, match=r"--tokenizer=.*has 256 ids, and the tokens of --text are of 300"):
    prepared(tmp_path, tokens(tmp_path, vocab_size=300), f"--tokenizer={tmp_path / 'bytes'}")
  with pytest.raises(ConfigError, match=r"its header names the tokenizer .* has 256 ids"):
    prepared(tmp_path, tokens(tmp_path, vocab_size=300, tokenizer=str(tmp_path / "bytes")))


def test_the_separator_of_bytes_is_the_models_eos(tmp_path):
  _, made = prepared(tmp_path, f"--text={write_text(tmp_path)}", "--separator=10")
  assert made.model.cfg.eos_ids == (10,) and made.tokenizer.vocab_size == 256


def test_a_checkpoints_ids_are_its_own(tmp_path):
  loaded_case.save(tmp_path / "model", loaded_case.config())
  said, made = prepared(tmp_path, f"--model={tmp_path / 'model'}", tokens(tmp_path))
  assert said == [] and made.model.cfg.eos_ids == loaded_case.config().eos_ids and made.tokenizer is not None
