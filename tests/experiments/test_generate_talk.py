"""Dialogues of experiments.generate: what was said stays, Ctrl-C ends an answer, a bad line ends nothing; closed pipes."""

import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import loaded_case
import pytest
import sweep_case

from experiments import dialogue, generate, showing
from jaxllm import hf
from jaxllm.config import Layer
from jaxllm.generate import loop
from jaxllm.position import Learned

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}a:"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """A model of bytes with a chat template."""
  directory = tmp_path_factory.mktemp("talk") / "model"
  cfg = loaded_case.config(num_layers=1)
  loaded_case.hf.save(directory, cfg, loaded_case.params(cfg, seed=1), hf.byte_tokenizer())
  settings = directory / "tokenizer_config.json"
  settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": TEMPLATE}))
  (directory / "SHA256SUMS").unlink()
  return directory


@pytest.fixture
def talk(model, monkeypatch, capfdbinary):
  """talk(text on standard input, *flags): (what is written, what each call of `generate` was given)."""

  def answered(said, *args, code=0, model=model):
    asked, own = [], loop.generate

    def watched(model, params, prompts, **kwargs):
      asked.append([bytes(prompt).decode(errors="replace") for prompt in prompts])
      return own(model, params, prompts, **kwargs)

    with monkeypatch.context() as patch:
      patch.setattr(loop, "generate", watched)
      patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(said)))
      flags = (f"--model={model}", "--interactive", "--temperature=0", "-n=6", *args)
      assert sweep_case.run(*flags, script=generate, check=generate.check) == code
    answered.out, answered.err = (one.decode() for one in capfdbinary.readouterr())
    return answered.out, [prompt for (prompt,) in asked]

  return answered


@pytest.mark.core
def test_a_dialogue_goes_on_from_what_was_said(talk):
  out, asked = talk("hé\n \nb\r\n".encode(), "--chat", "--system=x")
  begin, end = "s:x;u:hé;a:", ";u:b;a:"
  assert asked[0] == begin and asked[1].startswith(begin) and asked[1].endswith(end)
  answer = asked[1].removeprefix(begin).removesuffix(end)
  assert answer and out.startswith(answer + "\n") and len(out) > len(answer) + 2
  assert talk.err == ""


def test_without_a_chat_each_line_is_a_text_of_its_own(talk):
  out, asked = talk(b"abc\nabc\n")
  assert asked == ["abc", "abc"] and out[: len(out) // 2] == out[len(out) // 2 :]  # greedy


def test_the_same_line_is_answered_by_another_draw_each_time(talk):
  """The first as if it were alone."""
  draw = lambda said: talk(said, "--temperature=1", "--seed=3", "-n=12")[0]
  twice, once = draw(b"abc\nabc\n"), draw(b"abc\n")
  assert twice.startswith(once) and twice != once * 2


def test_ctrl_c_ends_an_answer_and_what_was_shown_stays(talk, monkeypatch):
  own, turns = dialogue.continued, []

  def interrupted(*args):
    turns.append(args[4])
    if len(turns) == 1:
      args[-1](0, list(b"sho"))
      raise KeyboardInterrupt
    return own(*args)

  monkeypatch.setattr(dialogue, "continued", interrupted)
  out, asked = talk(b"a\nb\n", "--chat")
  assert out.startswith("sho\n") and asked == ["u:a;a:sho;u:b;a:"] and "the answer ends here" in talk.err


def test_ctrl_c_between_answers_ends_the_program(talk, monkeypatch):
  class Asking(io.BytesIO):
    def readline(self, *_):
      raise KeyboardInterrupt

  monkeypatch.setattr(io, "BytesIO", Asking)
  assert talk(b"")[1] == []


def test_a_line_that_cannot_be_answered_is_told_and_left_out(talk, tmp_path):
  from jaxllm.activation import Mlp
  from jaxllm.norm import LayerNorm

  biases = ("q", "k", "v", "o", "up", "down")
  cfg = loaded_case.config(
    num_layers=1,
    layers=(Layer(Learned(16)),),
    norm=LayerNorm(),
    mlp=Mlp("gelu_tanh"),
    mlp_dim=128,
    biases=biases,
    tie_embeddings=True,
  )
  loaded_case.save(tmp_path / "gpt2", cfg)
  _, asked = talk(b"12345678901\nabc\n", model=tmp_path / "gpt2")
  assert asked == ["12345678901", "abc"] and talk.err.startswith("error: ") and "max_length = 16" in talk.err
  talk(b"ab\xff\nab\n", model=tmp_path / "gpt2")
  assert "not UTF-8 at byte 2" in talk.err


def test_a_closed_pipe_ends_the_program_quietly(model, monkeypatch, capfd):
  def closed(text):
    raise BrokenPipeError(32, "Broken pipe")

  monkeypatch.setattr("experiments.texts.write", closed)
  args = (f"--model={model}", "--prompt=abc", "-n=4", "--temperature=0", "--stream")
  assert sweep_case.run(*args, script=generate, check=generate.check) == 74
  assert capfd.readouterr() == ("", "") and showing.write is not closed


@pytest.mark.slow
def test_signals_and_pipes_of_a_process(model):
  """SIGINT within an answer of hours, a second answer, then the end of the input; and a reader that leaves early."""
  command = [
    sys.executable,
    "-m",
    "experiments.generate",
    f"--model={model}",
    "--temperature=0",
    "--ignore_eos",
  ]
  popen = {"cwd": Path(__file__).parents[2], "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
  with subprocess.Popen([*command, "--interactive", "-n=100000"], stdin=subprocess.PIPE, **popen) as process:
    process.stdin.write(b"abc\n")
    process.stdin.flush()
    assert process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    process.stdin.close()
    error = process.stderr.read().decode()
    process.stdout.read()
    assert process.wait(60) == 0 and "the answer ends here" in error and "Traceback" not in error
  with subprocess.Popen([*command, "--prompt=abc", "--stream", "-n=100000"], **popen) as process:
    assert process.stdout.read(5)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) == 74
