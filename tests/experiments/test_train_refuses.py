"""experiments.train: flags and texts that are refused, before anything is computed."""

import json
import re

import loaded_case
import numpy as np
import pytest
from train_case import QUICK, call, write_text
from training_table import refused

from experiments.training import settings
from jaxllm.errors import ConfigError
from jaxllm.nn.layers import REMATS
from jaxllm.train import objectives, optimizers, precision, schedules

FLAGS = {
  "--steps=0": "--steps=0: expected a whole number of at least 1",
  "--keep=1": "--keep=1: expected a whole number of at least 2",
  "--seed=4294967296": "--seed=4294967296: expected a whole number below 2.32",
  "--learning_rate=nan": "--learning_rate=nan: found nan, expected a number above 0",
  "--warmup=1": "--warmup=1.0: expected a number from 0 to below 1",
  "--weight_decay=-1": "--weight_decay=-1.0: expected a number of at least 0",
  "--eval_share=0": "--eval_share=0: expected a number above 0",
  "--accumulate=3": "--accumulate=3: expected a divisor of --batch_size=8",
  "--num_heads=3": "--num_heads=3: embed_dim / num_heads must be an even whole number",
  "--num_heads=4 --num_kv_heads=3": "--num_kv_heads=3: expected a divisor of --num_heads=4",
  "--model=": "--model=: empty",
  "--model=nowhere --shape=llama-7b": "--model=nowhere with --shape=llama-7b: both name a model",
  "--shape=llama-7": "--shape=llama-7: not known; did you mean llama-7b",
  "--shape=llama-7b --num_layers=3": "--num_layers=3 with --shape=llama-7b, which has its own",
  "--verify": "--verify=True without --model",
  "--position=rop": "--position=rop: not known; did you mean rope",
  "--position=alibi --base=100": "--base=100.0 with --position=alibi, which has none",
  "--text=nowhere": "--text=nowhere: there is no such file",
  "--text=TEXT.bin --separator=10": "--separator=10 with --text=TEXT.bin, whose header says it",
  "--separator=10": "--separator=10: it is for --text=FILE of bytes",
  "--glm_ids=1,2,3": "--glm_ids=1,2,3 with --objective=causal",
  "--objective=glm --glm_ids=1,2": "--glm_ids=1,2: found 2 ids, expected those of",
  "--objective=glm --shape=llama-7b": "--objective=glm: the ids of .* are the model's",
  "--objective=glm --glm_ids=1,2,900": "--glm_ids=1,2,900: the model's ids are below 256",
  "--rules=fsdp": "--rules=fsdp without --mesh",
  "--mesh=data=8 --rules=fdsp": "--rules=fdsp: not known; did you mean fsdp",
  "--mesh=data=3": "mesh 'data=3': .* sizes that fit are 1, 2, 4, 8",
  "--mesh=datta=8": "mesh 'datta=8': .*did you mean 'data'",
  "--mesh=data=8 --batch_size=12": "batch_size: found 12 rows .* expected a multiple of 8 .* nearest is",
  "--mesh=tensor=8 --rules=sequence --length=20": "num_heads|length: found 20 tokens",
  "--mesh=data=8 --rules=tensor": "rules: found tensor, .* does not have it; the nearest are",
  "--train=lora --trained=.+=yes": "--trained=.+=yes with --train=lora",
  "--trained=.+": "--trained=.+: expected PATTERN=yes or PATTERN=no",
  "--trained=(=yes": "is no regular expression",
  "--trained=nothing=yes": "rules: 'nothing' matches no parameter",
  "--trained=embed=yes": "no rule matches the parameter",
  "--lora_rank=4": "--lora_rank=4 with --train=full",
  "--train=qlora --scan": "--scan with --train=qlora",
  "--train=lora --lora_rank=1000": "rank: found 1000, expected an integer from 1 to",
  "--topology=v5e:4x4": "--topology=v5e:4x4 without --compile_only",
  "--compile_only --topology=v5e:3x4": "topology 'v5e:3x4'",
  "--tokenizer=there": "--tokenizer=there: it is for --text=FILE.bin, from scratch",
  "--profile=5": "--profile=5: expected FIRST:LAST",
  "--profile=5:90": "--profile=5:90: expected FIRST:LAST with FIRST below LAST and LAST at most 12",
  "--length=1000000": "expected at least 1000001 in a row",
}
"""Flags, and what is said of them; the last one is of the text (65)."""


@pytest.mark.parametrize("args", FLAGS)
def test_flags(tmp_path, monkeypatch, capsys, args):
  monkeypatch.chdir(tmp_path)
  write_text(tmp_path)
  (tmp_path / "TEXT.bin").write_bytes(b"1234")
  given = args.split()
  text = [] if any(one.startswith(("--text", "--separator")) for one in given) else ["--text=text.txt"]
  code = call(*QUICK, *text, *given)
  said = capsys.readouterr().err
  assert code == (65 if "--length=1000000" in args else 2), said
  assert said.startswith("error: ") and said.count("\n") == 1
  assert re.search(FLAGS[args].replace("--trained=.+", r"--trained=\.\+"), said), said
  refused(args, ConfigError(said.removeprefix("error: ").strip()))
  assert not (tmp_path / "runs").exists()


def test_names_are_those_of_the_package():
  assert tuple(objectives.OBJECTIVES) == settings.OBJECTIVES
  assert tuple(optimizers.OPTIMIZERS) == settings.OPTIMIZERS
  assert tuple(schedules.SCHEDULES) == settings.SCHEDULES
  assert ("auto", *precision.POLICIES) == settings.PRECISIONS
  assert tuple(REMATS) == settings.REMATS


def test_a_text_of_another_vocabulary(tmp_path, capsys):
  np.arange(2000, dtype="<u2").tofile(tmp_path / "text.bin")
  header = {"dtype": "uint16", "vocab_size": 2000, "tokens": 2000}
  (tmp_path / "text.json").write_text(json.dumps(header))
  loaded_case.save(tmp_path / "model", loaded_case.config())
  args = (f"--model={tmp_path / 'model'}", f"--text={tmp_path / 'text.bin'}", f"--out={tmp_path / 'out'}")
  assert call(*QUICK, *args) == 2
  assert "need a vocabulary of 2000, and the model has 256" in capsys.readouterr().err


def test_another_run_in_the_same_place(tmp_path, capsys):
  text = write_text(tmp_path)
  args = (*QUICK, "--steps=2", f"--text={text}", f"--out={tmp_path / 'out'}")
  assert call(*args) == 0
  assert call(*args, "--seed=1") == 65
  assert "another run's checkpoints (seed: 0 there, 1 here)" in capsys.readouterr().err
