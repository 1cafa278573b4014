"""Files of tokens: written, mapped, and every kind of damage by name."""

import hashlib
import json
import resource

import numpy as np
import pytest

from jaxllm.errors import DataError
from jaxllm.train.tokens import open_text, write_text

DOCUMENTS = [[5, 6, 7], [], [8], list(range(10, 60))]


def write(path, **kwargs):
  write_text(path, DOCUMENTS, 300, separator=2, tokenizer="a tokenizer", **kwargs)
  return path


@pytest.mark.core
def test_a_written_file_is_what_its_bytes_say(tmp_path):
  path = write(tmp_path / "a.bin")
  expected = [5, 6, 7, 2, 2, 8, 2, *range(10, 60), 2]
  assert path.read_bytes() == b"".join(i.to_bytes(2, "little") for i in expected)
  text = open_text(path)
  assert text.read(0, len(text)).tolist() == expected and text.read(3, 4).dtype == np.int32
  assert (text.vocab_size, text.separator, text.about["tokenizer"]) == (300, 2, "a tokenizer")
  assert text.about["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
  text.check()
  assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "a.json"]
  assert isinstance(text.ids, np.memmap)


def test_large_ids_are_of_four_bytes(tmp_path):
  write_text(tmp_path / "a.bin", [[70_000, 1]], 70_001)
  text = open_text(tmp_path / "a.bin")
  assert (
    text.about["dtype"] == "uint32" and text.read(0, 9).tolist() == [70_000, 1] and text.separator is None
  )


def test_any_other_file_is_its_bytes(tmp_path):
  (tmp_path / "a.txt").write_bytes(b"so we\0beat on")
  text = open_text(tmp_path / "a.txt", separator=0)
  assert (
    text.vocab_size == 256 and bytes(text.read(0, 99).tolist()) == b"so we\0beat on" and text.separator == 0
  )


def header(**changes):
  def damage(path):
    beside = path.with_suffix(".json")
    plain = json.loads(beside.read_text()) | changes
    beside.write_text(json.dumps({k: v for k, v in plain.items() if v != "gone"}))

  return damage


def content(change):
  return lambda path: path.write_bytes(change(path.read_bytes()))


def text_header(text):
  return lambda path: path.with_suffix(".json").write_text(text)


BAD = {
  "cut": (content(lambda b: b[:-2]), "found 114 bytes, expected 116, as its header says 58 tokens of uint16"),
  "odd": (content(lambda b: b[:-1]), "found 115 bytes, the last 1 of which are no whole token, expected 116"),
  "longer": (content(lambda b: b + b"xx"), "found 118 bytes, expected 116"),
  "empty": (content(lambda b: b""), "found 0 bytes, expected tokens"),
  "no header": (lambda path: path.with_suffix(".json").unlink(), r"a\.json: no such header"),
  "not JSON": (text_header("{"), r"a\.json: not JSON .*expected the like of"),
  "deep JSON": (text_header("[" * 100_000), r"a\.json: not JSON"),
  "a list": (text_header("[]"), r"a\.json: found a JSON list"),
  "no type": (header(dtype="gone"), r"a\.json: dtype missing"),
  "type": (header(dtype="float32"), "dtype is 'float32', expected one of uint8, uint16, uint32"),
  "another type": (header(dtype="uint32"), "found 116 bytes, expected 232"),
  "bool": (header(vocab_size=True), "vocab_size is 'True', expected a whole number"),
  "vocabulary": (header(vocab_size=0), "vocab_size is 0, expected from 1 to"),
  "tokens": (header(tokens=-1), "tokens is -1, expected"),
  "separator": (header(separator=300), "the separator is 300, expected an id from 0 to 299"),
  "key": (header(eos=2), "found the key 'eos', expected some of dtype"),
}


@pytest.mark.parametrize("name", BAD)
def test_damage_is_named(tmp_path, name):
  damage, reason = BAD[name]
  damage(write(tmp_path / "a.bin"))
  with pytest.raises(DataError, match=reason) as e:
    open_text(tmp_path / "a.bin")
  assert str(tmp_path) in str(e.value) and len(str(e.value)) < 600


def test_an_id_beyond_the_vocabulary_is_named_where_it_is_read(tmp_path):
  path = write(tmp_path / "a.bin")
  data = bytearray(path.read_bytes())
  data[41] = 3  # token 20 is 23 + 3 * 256
  path.write_bytes(data)
  text = open_text(path)
  text.read(0, 20)
  for read in (lambda: text.read(15, 20), text.check):
    with pytest.raises(DataError, match=r"a\.bin: token 20 \(at byte 40\) is 791, expected an id below 300"):
      read()


def test_an_id_of_32_bits_is_no_negative_one(tmp_path):
  write_text(tmp_path / "a.bin", [[70_000, 1]], 70_001)
  (tmp_path / "a.bin").write_bytes(b"\xff" * 8)
  with pytest.raises(DataError, match=r"token 0 .*is 4294967295"):
    open_text(tmp_path / "a.bin").read(0, 2)


def test_a_changed_byte_is_found_by_its_sum(tmp_path):
  path = write(tmp_path / "a.bin")
  path.write_bytes(path.read_bytes().replace(b"\x05", b"\x06", 1))
  with pytest.raises(DataError, match=r"its SHA-256 is .*expected"):
    open_text(path).check()


@pytest.mark.parametrize(
  ("documents", "reason"),
  [([[5], [300]], "document 1: found the id 300, expected one from 0 to 299"), ([], "0 tokens to write")],
)
def test_nothing_is_left_of_a_write_that_failed(tmp_path, documents, reason):
  write(tmp_path / "a.bin")
  with pytest.raises(DataError, match=reason):
    write_text(tmp_path / "a.bin", documents, 300)
  with pytest.raises(DataError, match="no such header"):
    open_text(tmp_path / "a.bin")
  assert not list(tmp_path.glob("*.partial"))


def test_a_file_larger_than_memory_is_opened(tmp_path):
  """A sparse file of 64 GiB, of which a few tokens are read."""
  path, tokens = tmp_path / "a.bin", 1 << 35
  with open(path, "wb") as file:
    file.truncate(2 * tokens)
    file.seek(2 * tokens - 4)
    file.write((7).to_bytes(2, "little") + (9).to_bytes(2, "little"))
  header = {"dtype": "uint16", "vocab_size": 100, "tokens": tokens}
  path.with_suffix(".json").write_text(json.dumps(header))
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  assert open_text(path).read(tokens - 3, 3).tolist() == [0, 7, 9]
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_a_fifo_is_not_waited_for(tmp_path):
  import os

  os.mkfifo(tmp_path / "a.txt")
  with pytest.raises(DataError, match="not a regular file"):
    open_text(tmp_path / "a.txt")
