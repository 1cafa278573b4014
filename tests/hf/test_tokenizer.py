"""Tokenizers: bytes by tokenizers and transformers alike, files of others, chats in a sandbox, and what does not fit."""

import functools
import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.errors import TokenizerError
from jaxllm.hf import chat
from jaxllm.hf import tokenizer as tokenizer_lib
from jaxllm.hf.tokenizer import byte_tokenizer, load_tokenizer

tokenizers = pytest.importorskip("tokenizers")

TEXTS = [
  "",
  "plain",
  "tab\tnewline\r\n\0end",
  "é ü 你好 \U0001f600",
  "<s> [PAD] </s> <|endoftext|>",
  " \u00a0\u00ad\ufeff ",
  "a" * 999,
]


def save(directory, tokenizer):
  for name, data in tokenizer.contents().items():
    (directory / name).write_bytes(data)
  return directory


@pytest.mark.core
@pytest.mark.parametrize("text", TEXTS)
def test_bytes_are_ids_to_all_three(tmp_path, text):
  save(tmp_path, byte_tokenizer())
  data = text.encode()
  for ours in (byte_tokenizer(), load_tokenizer(tmp_path)):
    assert ours.vocab_size == 256 and ours.encode(text) == list(data) and ours.decode(list(data)) == text
  theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
  assert (
    theirs.encode(text).ids == list(data) and theirs.decode(list(data), skip_special_tokens=False) == text
  )
  transformers = pytest.importorskip("transformers", minversion="5.0")
  auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert auto(text)["input_ids"] == list(data) and auto.decode(list(data)) == text and len(auto) == 256


def test_each_byte_is_a_token_of_its_own(tmp_path):
  """Also those that no UTF-8 has, which decode to the replacement character."""
  theirs = tokenizers.Tokenizer.from_file(str(save(tmp_path, byte_tokenizer()) / "tokenizer.json"))
  ids = list(range(256))
  assert [theirs.token_to_id(theirs.id_to_token(i)) for i in ids] == ids
  assert len({theirs.id_to_token(i) for i in ids}) == 256
  for chunk in (ids, [0xE4, 0xBD], [0xFF, 0x41, 0xC3], [0xED, 0xA0, 0x80]):
    assert byte_tokenizer().decode(chunk) == bytes(chunk).decode(errors="replace")
    assert byte_tokenizer().decode(chunk) == theirs.decode(chunk, skip_special_tokens=False)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.text())
def test_any_text_comes_back(text):
  ours, theirs = byte_tokenizer(), backend()
  ids = ours.encode(text)
  assert ids == list(text.encode()) == theirs.encode(text).ids
  assert ours.decode(ids) == text == theirs.decode(ids, skip_special_tokens=False)


@functools.cache
def backend():
  """The byte-level tokenizer in `tokenizers`."""
  return tokenizers.Tokenizer.from_str(byte_tokenizer().contents()["tokenizer.json"].decode())


def test_what_was_saved_needs_no_package(tmp_path, monkeypatch):
  """Our own bytes are known without `tokenizers`; another file says what to install."""
  save(tmp_path, byte_tokenizer())
  monkeypatch.setitem(sys.modules, "tokenizers", None)
  assert load_tokenizer(tmp_path).encode("é") == [0xC3, 0xA9]
  plain = json.loads((tmp_path / "tokenizer.json").read_text())
  (tmp_path / "tokenizer.json").write_text(json.dumps(plain))  # the same, spelled otherwise
  with pytest.raises(
    TokenizerError,
    match=r"tokenizer.json: the package tokenizers reads it; install the extra `hub` \(pip install -e '\.\[hub\]'\)",
  ):
    load_tokenizer(tmp_path)


@pytest.fixture
def words(tmp_path):
  """A word-level tokenizer with special tokens, a first bos, a truncation and a padding left from training, and a template."""
  vocab = {
    word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "hello", "world", ":", "user", "assistant"])
  }
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  backend.add_special_tokens(["<s>", "</s>", "<pad>"])
  backend.post_processor = tokenizers.processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", 1)]
  )
  backend.enable_truncation(2)
  backend.enable_padding(length=9)
  backend.save(str(tmp_path / "tokenizer.json"))
  template = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ' : ' + m['content'] }}{{ eos_token }}{% endfor %}"
  )
  template += "{% if add_generation_prompt %}assistant :{% endif %}"
  plain = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "chat_template": template}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(plain))
  return tmp_path


def test_a_tokenizer_of_others(words):
  ours = load_tokenizer(words)
  assert (ours.vocab_size, ours.bos_id, ours.eos_ids) == (9, 1, (2,))
  assert ours.encode("hello world hello") == [1, 3, 4, 3]  # whole and unpadded
  assert ours.encode("hello </s> mars", special_tokens=False) == [3, 2, 0]
  assert ours.decode([1, 3, 4, 2]) == "<s> hello world </s>"
  assert ours.decode([1, 3, 4, 2], special_tokens=False) == "hello world"
  assert ours.decode(np.array([3, 4])) == "hello world"


def test_where_tokens_end_in_the_text(words):
  """In characters; a token that is no part of the text ends at its beginning."""
  assert load_tokenizer(words).encode_ends("hello  world") == ([1, 3, 4], [0, 5, 12])
  assert byte_tokenizer().encode_ends("aé\U0001f600") == (
    list("aé\U0001f600".encode()),
    [1, 2, 2, 3, 3, 3, 3],
  )
  encoding = backend().encode("aé\U0001f600")
  assert byte_tokenizer().encode_ends("aé\U0001f600") == (encoding.ids, [end for _, end in encoding.offsets])


def test_saved_files_are_the_same(words, tmp_path):
  contents = load_tokenizer(words).contents()
  assert contents == {
    name: (words / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")
  }


def test_chats(words):
  ours = load_tokenizer(words)
  messages = [{"role": "user", "content": "hello"}]
  assert ours.chat_text(messages) == "<s>user : hello</s>assistant :"
  assert ours.chat(messages) == [1, 6, 5, 3, 2, 7, 5]  # one bos, the template's
  assert ours.chat(messages, generation_prompt=False) == [1, 6, 5, 3, 2]
  with pytest.raises(TokenizerError, match="no chat template"):
    byte_tokenizer().chat(messages)


@pytest.mark.parametrize("form", ["file", "list"])
def test_where_templates_are(words, form):
  plain = json.loads((words / "tokenizer_config.json").read_text())
  if form == "file":  # comes first
    (words / "chat_template.jinja").write_text("of the file")
  else:
    plain["chat_template"] = [
      {"name": "tool_use", "template": "x"},
      {"name": "default", "template": "of the file"},
    ]
  (words / "tokenizer_config.json").write_text(json.dumps(plain))
  assert load_tokenizer(words).chat_text([]) == "of the file"


TEMPLATES = [
  "{%- for m in messages %}\n    {%- if loop.first %}\n[{{ m.role | upper }}]\n{% endif %}\n{{ m['content'] | trim }}\n"
  "{% endfor %}",
  "{% generation %}{% set x = 1 %}in{{ x }}{% endgeneration %}{{ x }}|{{ messages | tojson(indent=1) }}",
  "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% if ns.n > 1 %}{% break %}{% endif %}"
  "{{ ns.n }}{% endfor %}",
  "{{ messages[0].content.split('<')[0] }}{{ strftime_now('%%') }}{{ messages[0].get('name', 'none') }}{{ bos_token }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_as_transformers_renders_them(template, tmp_path):
  transformers = pytest.importorskip("transformers", minversion="5.0")
  messages = [{"role": "user", "content": " <hé>&\"' "}, {"role": "assistant", "content": "b"}]
  auto = transformers.AutoTokenizer.from_pretrained(save(tmp_path, byte_tokenizer()), bos_token="A")
  expected = auto.apply_chat_template(
    messages, chat_template=template, tokenize=False, add_generation_prompt=True
  )
  values = {"messages": messages, "add_generation_prompt": True, "bos_token": "A"}
  assert chat.render(template, values, "here") == expected


ATTACKS = [
  "{{ ''.__class__.__mro__[1].__subclasses__() }}",
  "{{ messages.__init__.__globals__ }}",
  "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
  "{{ self.__init__.__globals__['__builtins__'] }}",
  "{{ lipsum() }}",
  "{{ messages.append(1) }}",
  "{{ messages[0].update(role='x') }}",
  "{% include '/etc/passwd' %}",
  "{% import 'os' as os %}{{ os }}",
  "{{ raise_exception('not this role') }}",
  "{% for i in range(999999999) %}{% endfor %}",
  "{% for i in range(99999) %}{{ 'x' * 99 }}{% endfor %}",
  "{% if %}",
  "{{ 1 / 0 }}",
]


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}"
ENDLESS = [
  LOOP + "{% endfor %}{% endfor %}",
  LOOP + "{% set x = i * j %}{% endfor %}{% endfor %}",
  "{% macro f(n) %}{{ f(n - 1) ~ f(n - 2) if n > 1 else 'x' }}{% endmacro %}{{ f(60) }}",
  "{{ 10 ** (10 ** 10) }}",
  "{{ (range(99999) | list * 99999) | sort }}",
]
"""What no sandbox stops: it has to be stopped from outside."""
LARGE = [
  "{{ ('ab' * 99999).replace('b', 'a' * 99999) | length }}",
  "{{ 'x' * 10 ** 10 }}",
  "{{ 'x' * 10 ** 18 }}",
  "{{ ('x' | center(10 ** 10)) | length }}",
  "{{ '%9999999999d' | format(1) | length }}",
  "{{ '{:9999999999}'.format(1) | length }}",
  "{{ 'x'.ljust(10 ** 10) | length }}",
  "{{ ([0] * 10 ** 10) | length }}",
  "{% set ns = namespace(x='x' * 1000) %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x | length }}",
  "{% set ns = namespace(x=['x']) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x | length }}",
  "{{ ('x' * 99999).join(range(99999) | map('string')) | length }}",
  "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
]
"""More memory than there is, in one step or by doubling, or a stack without end."""


def test_there_are_payloads_enough():
  assert len(ATTACKS + ENDLESS + LARGE) >= 30


@pytest.mark.parametrize("template", ATTACKS + LARGE)
def test_templates_stay_in_the_sandbox(template, monkeypatch):
  """Each fails with the place it is from; none has read or run anything."""
  monkeypatch.setattr(chat, "MEMORY", 1 << 28)  # soon full
  with pytest.raises(TokenizerError, match="here: the chat template failed") as e:
    chat.render(template, {"messages": [{"role": "user", "content": "x"}]}, "here")
  assert "root:" not in str(e.value) and "uid=" not in str(e.value) and len(str(e.value)) < 1000
  if "raise_exception" in template:
    assert "not this role" in str(e.value)


@pytest.mark.parametrize("template", ENDLESS)
def test_templates_are_stopped(template, monkeypatch):
  monkeypatch.setattr(chat, "SECONDS", 0.7)
  start = time.perf_counter()
  with pytest.raises(
    TokenizerError, match=r"here: the chat template failed \((stopped after 0.7 s|MemoryError)"
  ):
    chat.render(template, {"messages": []}, "here")
  assert time.perf_counter() - start < 2


def test_templates_see_nothing_of_the_environment(monkeypatch):
  """Nor can a file be written by whoever gets out."""
  monkeypatch.setenv("HF_TOKEN", "secret")
  monkeypatch.setattr(chat, "PROCESS", Path(__file__).with_name("chat_probe.py"))
  answer = chat.render("x", {"messages": []}, "here")
  assert "secret" not in answer and "HF_TOKEN" not in answer and "OSError" in answer


@pytest.mark.parametrize("template", ["{{ 'x'.__class__ }}", "{{ '{0.__class__}'.format(messages) }}"])
def test_attributes_that_lead_out_are_undefined(template):
  assert chat.render(template, {"messages": []}, "here") == ""


def test_values_of_templates_are_plain(monkeypatch):
  with pytest.raises(TokenizerError, match=r"messages: .*lists, objects, texts and numbers only"):
    chat.render("{{ messages }}", {"messages": [object()]}, "here")
  import jinja2

  monkeypatch.setattr(jinja2, "__version__", "3.1.5")
  with pytest.raises(TokenizerError, match=r"not rendered by jinja2 3.1.5, whose sandbox has holes"):
    chat.render("x", {}, "here")


def test_more_ids_than_embeddings(words):
  (words / "config.json").write_text('{"vocab_size": 9}')
  assert load_tokenizer(words).vocab_size == 9
  (words / "config.json").write_text('{"vocab_size": 7}')
  with pytest.raises(TokenizerError, match=r"has ids up to 7, but the embedding of .*config.json has 7 rows"):
    load_tokenizer(words)


@pytest.mark.parametrize("by_transformers", [False, True])
def test_an_added_token_without_an_embedding(words, caplog, monkeypatch, by_transformers):
  """As Gemma 3 1B has: it is named, and only text that has it is refused."""
  (words / "config.json").write_text('{"vocab_size": 8}')
  if by_transformers:
    pytest.importorskip("transformers", minversion="5.0")
    read = tokenizer_lib._from_transformers
    monkeypatch.setattr(tokenizer_lib, "_from_json", read)
    settings = json.loads((words / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (words / "tokenizer_config.json").write_text(json.dumps(settings))
  ours = load_tokenizer(words)
  assert re.search(r"without a row in the embedding of .*config.json, which has 8: <pad> \(8\)", caplog.text)
  assert ours.encode("hello world") == [1, 3, 4]
  assert ours.vocab_size == (10 if by_transformers else 9)  # which adds a [PAD], as the file pads
  assert ours.encode_ends("hello")[0] == [1, 3]
  for encode in (ours.encode, ours.encode_ends):
    with pytest.raises(TokenizerError, match=r"the token '<pad>', id 8, but the embedding .* has 8 rows"):
      encode("hello <pad> world")


@pytest.mark.parametrize("settings", [None, {}, {"bos_token": None}, {"bos_token": "</s>"}])
def test_special_tokens_that_only_their_map_names(words, settings):
  """tokenizer_config.json comes first, where it names one."""
  (words / "tokenizer_config.json").unlink()
  if settings is not None:
    (words / "tokenizer_config.json").write_text(json.dumps(settings))
  plain = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "additional_special_tokens": ["<pad>"]}
  (words / "special_tokens_map.json").write_text(json.dumps(plain))
  ours = load_tokenizer(words)
  assert (ours.bos_id, ours.eos_ids) == (2 if settings and settings["bos_token"] else 1, (2,))
  assert ours.special["eos_token"] == "</s>" and len(ours.special) == 2


def test_ids_and_texts_that_cannot_be(words):
  for ours in (byte_tokenizer(), load_tokenizer(words)):
    for wrong in (-1, ours.vocab_size, 2**40):
      with pytest.raises(
        TokenizerError, match=f"token id {wrong}: expected one from 0 to {ours.vocab_size - 1}"
      ):
        ours.decode([3, wrong])
    with pytest.raises(TokenizerError, match=r"lone surrogate .* at character 2"):
      ours.encode("ab\ud800")


def test_a_directory_without_one(tmp_path):
  with pytest.raises(TokenizerError, match=r"no tokenizer.json, tokenizer.model or vocab.json"):
    load_tokenizer(tmp_path)


def test_transformers_reads_other_kinds(tmp_path, monkeypatch):
  """GPT-2's vocab.json and merges.txt, by AutoTokenizer; without transformers the error says so."""
  pytest.importorskip("transformers", minversion="5.0")
  vocab = byte_tokenizer().contents()["tokenizer.json"]
  vocab = json.loads(vocab)["model"]["vocab"] | {"th": 256, "<|endoftext|>": 257}
  (tmp_path / "vocab.json").write_text(json.dumps(vocab))
  (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\n")
  plain = {
    "tokenizer_class": "GPT2Tokenizer",
    "eos_token": "<|endoftext|>",
    "auto_map": {"AutoTokenizer": "code.Of"},
  }
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(plain))
  ours = load_tokenizer(tmp_path)
  assert ours.encode("that é") == [256, *b"at ", *"é".encode()]
  assert ours.decode(ours.encode("that é")) == "that é"
  assert (ours.vocab_size, ours.eos_ids) == (258, (257,))
  monkeypatch.setitem(sys.modules, "transformers", None)
  with pytest.raises(TokenizerError, match="pip install transformers"):
    load_tokenizer(tmp_path)
