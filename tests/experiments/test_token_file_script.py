"""experiments.token_file: text to a file of tokens, which the reader of training opens."""

import json

import pytest
import sweep_case

from experiments import token_file
from jaxllm import hf
from jaxllm.train.packing import documents
from jaxllm.train.tokens import open_text

pytestmark = pytest.mark.filterwarnings("ignore")


def call(*args):
  return sweep_case.run(*args, script=token_file, check=token_file.check)


@pytest.fixture
def byte_files(tmp_path):
  (tmp_path / "tokenizer").mkdir()
  for name, content in hf.byte_tokenizer().contents().items():
    (tmp_path / "tokenizer" / name).write_bytes(content)
  text = tmp_path / "text"
  text.mkdir()
  (text / "b.txt").write_text("zwei\n\nTage")
  (text / "a.txt").write_text("grün")
  return tmp_path


@pytest.mark.core
def test_files_are_documents(byte_files, capsys):
  out = byte_files / "made" / "a.bin"
  args = (
    f"--text={byte_files / 'text'}",
    f"--tokenizer={byte_files / 'tokenizer'}",
    f"--out={out}",
    "--separator=0",
  )
  assert call(*args) == 0
  text = open_text(out)
  assert bytes(text.read(0, 99).tolist()) == "grün\0zwei\n\nTage\0".encode()
  assert documents(text).tolist() == [[0, 6], [6, 17]] and text.separator == 0
  assert "17 tokens of 2 documents, uint16, vocabulary 256, separator 0" in capsys.readouterr().out
  assert call(*args) == 2 and "a.json there already" in capsys.readouterr().err


def test_a_tokenizer_of_words_puts_its_bos_and_ends_documents_with_its_eos(tmp_path, capsys):
  tokenizers = pytest.importorskip("tokenizers")
  vocab = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4, "?": 5}
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="?"))
  made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  made.add_special_tokens(["<s>", "</s>"])
  made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
  made.save(str(tmp_path / "tokenizer.json"))
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
  records = [{"text": "a b"}, {"text": "c\nc", "id": 3}, {"text": "x"}]
  (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n\n")
  args = (f"--text={tmp_path / 'a.jsonl'}", f"--tokenizer={tmp_path}")
  assert call(*args, f"--out={tmp_path / 'a.bin'}", "--documents=jsonl") == 0
  assert open_text(tmp_path / "a.bin").read(0, 99).tolist() == [0, 2, 3, 1, 0, 4, 4, 1, 0, 5, 1]
  (tmp_path / "b.txt").write_text("a b\n\nc </s> c\n")
  code = call(
    f"--text={tmp_path / 'b.txt'}",
    f"--tokenizer={tmp_path}",
    f"--out={tmp_path / 'b.bin'}",
    "--documents=line",
  )
  assert code == 65 and not (tmp_path / "b.bin").exists()
  assert "b.txt, line 3: its text has the token 1, which ends documents" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("line", "reason"),
  [
    (b"{", "line 1: expected JSON"),
    (b"[1]", "found '[1]'"),
    (b'{"text": 1}', 'expected {"text": ...}'),
    (b"\xff", "JSON"),
  ],
)
def test_bad_lines_are_named(byte_files, capsys, line, reason):
  (byte_files / "a.jsonl").write_bytes(line + b"\n")
  args = (
    f"--text={byte_files / 'a.jsonl'}",
    f"--tokenizer={byte_files / 'tokenizer'}",
    f"--out={byte_files / 'a.bin'}",
  )
  assert call(*args, "--documents=jsonl", "--separator=0") == 65
  error = capsys.readouterr().err
  assert reason in error and "a.jsonl, line 1" in error and "Traceback" not in error


def test_bad_flags(byte_files, capsys):
  args = (f"--text={byte_files / 'text'}", f"--tokenizer={byte_files / 'tokenizer'}")
  for more, reason in (
    ((), "--out: missing"),
    (("--out=a.txt",), "ends with .bin"),
    ((f"--out={byte_files / 'a.bin'}",), "names no eos; give the id"),
    ((f"--out={byte_files / 'a.bin'}", "--separator=256"), "--separator=256: expected an id from 0 to 255"),
  ):
    assert call(*args, *more) == 2 and reason in capsys.readouterr().err
