"""Prompts: which are in a file, what a chat is made of, and what is refused with which line."""

import io

import pytest

from jaxllm.errors import ConfigError, DataError
from jaxllm.study.choices import STORES
from jaxllm.study.prompts import Prompt, read_prompt, read_prompts


@pytest.mark.core
@pytest.mark.parametrize(
  ("name", "content", "wanted"),
  [
    ("a.txt", "one\n\n  \r\ntwo \r\nñ\u2028three", [Prompt("one"), Prompt("two "), Prompt("ñ\u2028three")]),
    ("a", '{"prompt": "x"}', [Prompt('{"prompt": "x"}')]),
    ("a.jsonl", '{"prompt": "a\\nb", "id": 3}\n\n', [Prompt("a\nb")]),
    (
      "a.jsonl",
      '{"messages": [{"role": "user", "content": "x"}]}',
      [Prompt(messages=({"role": "user", "content": "x"},))],
    ),
  ],
)
def test_a_file_has_a_prompt_a_line(tmp_path, name, content, wanted):
  (tmp_path / name).write_bytes(content.encode())
  assert read_prompts(str(tmp_path / name)) == wanted


@pytest.mark.parametrize(
  ("name", "content", "words"),
  [
    ("a.txt", b"", "0 bytes"),
    ("a.txt", b"\n \r\n", "empty lines only"),
    ("a.txt", b"ok\n\xff", "not UTF-8 at byte 3"),
    ("a.jsonl", b'{"prompt": "a"}\n\n{"prompt"', "line 3: not JSON"),
    ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
    ("a.jsonl", b'["a"]', "line 1: found"),
    ("a.jsonl", b"{}", 'expected {"prompt": text} or'),
    ("a.jsonl", b'{"prompt": "a", "messages": []}', "line 1: found"),
    ("a.jsonl", b'{"prompt": ""}', "found the prompt ''"),
    ("a.jsonl", b'{"prompt": 1}', "found the prompt 1"),
    ("a.jsonl", b'{"messages": []}', "found the messages []"),
    ("a.jsonl", b'{"messages": [{"role": "user"}]}', "found the messages"),
    ("a.jsonl", b'{"messages": [{"role": 1, "content": "a"}]}', "found the messages"),
  ],
)
def test_what_is_no_prompt_is_refused(tmp_path, name, content, words):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(DataError) as e:
    read_prompts(str(tmp_path / name))
  assert words in str(e.value) and name in str(e.value)


def test_a_file_that_is_not_there_is_a_bad_flag(tmp_path):
  for path in (tmp_path, tmp_path / "x"):
    with pytest.raises(ConfigError, match="no such file"):
      read_prompts(str(path))


@pytest.mark.parametrize(("data", "words"), [(b"", "0 bytes"), (b"a\xc3", "not UTF-8 at byte 1")])
def test_standard_input(monkeypatch, data, words):
  monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
  with pytest.raises(DataError, match=words):
    read_prompt("-")
  assert read_prompt("--") == Prompt("--")


def test_a_system_message_is_first_and_there_once():
  user, system = {"role": "user", "content": "x"}, {"role": "system", "content": "y"}
  assert Prompt("x").in_chat().messages == (user,)
  assert (
    Prompt("x").in_chat("y").messages
    == (system, user)
    == Prompt(messages=(system, user)).in_chat("z").messages
  )


def test_names_of_caches_are_those_of_the_library():
  from jaxllm import nn

  assert tuple(nn.STORES) == STORES
